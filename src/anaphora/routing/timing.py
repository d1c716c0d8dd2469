"""How fast the replicas of a pool compute, learned from when first tokens came and when answers were complete.

A prompt's prefill takes a constant, so much per token, so much per token and token before it, so much per token while others
decode, and so much per token that is loaded from a slower place. A token of an answer takes a constant, so much per answer
that is written at the same time, so much per token of their contexts, and what others' prefills cost in between.

All replicas of a pool share these rates; each has a factor of its own for what makes it slower or faster than its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from anaphora.routing.rates import Factor, Rates

_PREFILL_PRIOR = (0.01, 0.05, 0.002, 0.001, 0.005)
"""Of an accelerator of the present; a few answers of one that is ten or a hundred times slower outweigh it."""
_PREFILL_TYPICAL = (1.0, 2.0, 2.0, 2.0, 2.0)
_DECODE_PRIOR = (0.01, 0.0003, 0.003, 0.5)
_DECODE_TYPICAL = (1.0, 4.0, 0.5, 0.005)


class Prefill(NamedTuple):
    """What prefill times depend on. Those of several prompts add up."""

    num_prompts: float = 0.0
    thousands: float = 0.0
    """of tokens to compute"""
    attention: float = 0.0
    """millions of pairs of a token and one before it, in tens"""
    beside: float = 0.0
    """thousands of tokens times answers being written at the same time, in tens"""
    loaded: float = 0.0
    """thousands of tokens from slower places"""

    def __add__(self, other: object) -> Prefill:
        if not isinstance(other, Prefill):
            return NotImplemented
        return Prefill(*(mine + its for mine, its in zip(self, other, strict=True)))


def prefill(num_tokens: int, cached_tokens: int, loaded_tokens: int, num_decoding: int) -> Prefill:
    """`num_tokens` in all, `cached_tokens` of them present, `loaded_tokens` of these in a slower place."""
    computed = max(1, num_tokens - cached_tokens)
    pairs = computed * (num_tokens - computed / 2)
    return Prefill(1.0, computed / 1e3, pairs / 1e7, computed * num_decoding / 1e4, loaded_tokens / 1e3)


class Timing:
    """Of one pool."""

    def __init__(self) -> None:
        self._prefill = Rates(_PREFILL_PRIOR, _PREFILL_TYPICAL)
        self._decode = Rates(_DECODE_PRIOR, _DECODE_TYPICAL)
        self._all = (Factor(keep=0.998), Factor(keep=0.998))
        self._own: dict[str, tuple[Factor, Factor]] = {}

    def prefill_s(self, replica: str, features: Prefill) -> float:
        return self._factor(replica, 0) * self._prefill(features)

    def token_s(self, replica: str, num_decoding: float, context_tokens: float, prefill_share: float = 0.0) -> float:
        """Between two tokens of an answer, with `num_decoding` answers over `context_tokens` in all."""
        return self._factor(replica, 1) * self._decode((1.0, num_decoding, context_tokens / 1e6, prefill_share))

    @property
    def stall(self) -> float:
        """How long answers stand still while a second of prefill is computed, in seconds."""
        return min(1.0, self._decode.rates[3])

    def prefilled(self, replica: str, features: Prefill, took_s: float) -> None:
        self._learn(replica, 0, self._prefill, features, took_s)

    def decoded(self, replica: str, num_decoding: float, context_tokens: float, prefill_share: float, token_s: float) -> None:
        self._learn(replica, 1, self._decode, (1.0, num_decoding, context_tokens / 1e6, prefill_share), token_s)

    def removed(self, replica: str) -> None:
        self._own.pop(replica, None)

    def _learn(self, replica: str, kind: int, rates: Rates, features: Sequence[float], took_s: float) -> None:
        expected = rates(features)
        self._all[kind].add(expected, took_s)
        self._own.setdefault(replica, (Factor(), Factor()))[kind].add(expected, took_s)
        rates.add(features, took_s)

    def _factor(self, replica: str, kind: int) -> float:
        own = self._own.get(replica)
        return 1.0 if own is None else own[kind].beside(self._all[kind])
