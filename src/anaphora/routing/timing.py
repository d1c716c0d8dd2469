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
"""Of an accelerator of the present. The first answer says how many times slower, or faster, all of it is."""
_PREFILL_TYPICAL = (1.0, 2.0, 2.0, 2.0, 2.0)
_DECODE_PRIOR = (0.01, 0.0003, 0.003, 0.5)
_DECODE_TYPICAL = (1.0, 4.0, 0.5, 0.005)
_STALL = 3
"""A share of a prefill's time: the same at every speed."""


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
        self._decode = Rates(_DECODE_PRIOR, _DECODE_TYPICAL, fixed=(_STALL,))
        self._all = (Factor(keep=0.998), Factor(keep=0.998))
        self._own: dict[str, tuple[Factor, Factor]] = {}

    @property
    def known(self) -> bool:
        """A prefill was seen."""
        return self._prefill.num_observations > 0

    def prefill_s(self, replica: str, features: Prefill) -> float:
        return self._factor(replica, 0) * self._prefill(features)

    def token_s(self, replica: str, num_decoding: float, context_tokens: float, prefill_share: float = 0.0) -> float:
        """Between two tokens of an answer, with `num_decoding` answers over `context_tokens` in all."""
        return self._factor(replica, 1) * self._decode((1.0, num_decoding, context_tokens / 1e6, prefill_share))

    @property
    def stall(self) -> float:
        """How long answers stand still while a second of prefill is computed, in seconds."""
        return min(1.0, self._decode.rates[_STALL])

    def prefilled(self, replica: str, features: Prefill, took_s: float) -> None:
        self._learn(replica, 0, self._prefill, features, took_s)

    def decoded(self, replica: str, num_decoding: float, context_tokens: float, prefill_share: float, token_s: float) -> None:
        self._learn(replica, 1, self._decode, (1.0, num_decoding, context_tokens / 1e6, prefill_share), token_s)

    def removed(self, replica: str) -> None:
        self._own.pop(replica, None)

    def _learn(self, replica: str, kind: int, rates: Rates, features: Sequence[float], took_s: float) -> None:
        if rates.num_observations:  # the first tells how fast all of them are, and nothing of this one among them
            expected = rates(features)
            self._all[kind].add(expected, took_s)
            self._own.setdefault(replica, (Factor(), Factor()))[kind].add(expected, took_s)
        rates.add(features, took_s)

    def _factor(self, replica: str, kind: int) -> float:
        own = self._own.get(replica)
        return 1.0 if own is None else own[kind].beside(self._all[kind])


class Pools:
    """How fast all replicas are. A pool that has answered nothing yet is taken to be like the one that was learned of last."""

    def __init__(self) -> None:
        self._pools: dict[str, str] = {}
        self._timings: dict[str, Timing] = {}
        self._latest = Timing()

    def joins(self, replica: str, pool: str) -> None:
        self._pools[replica] = pool
        self._timings.setdefault(pool, Timing())

    def removed(self, replica: str) -> None:
        pool = self._pools.pop(replica, None)
        if pool is not None:
            self._timings[pool].removed(replica)

    def known(self, replica: str) -> bool:
        """A prefill of its pool was seen: times are no mere guesses."""
        return self._own(replica).known

    def of(self, replica: str) -> Timing:
        own = self._own(replica)
        return own if own.known else self._latest

    def prefilled(self, replica: str, features: Prefill, took_s: float) -> None:
        self._latest = self._own(replica)
        self._latest.prefilled(replica, features, took_s)

    def decoded(self, replica: str, num_decoding: float, context_tokens: float, prefill_share: float, token_s: float) -> None:
        self._own(replica).decoded(replica, num_decoding, context_tokens, prefill_share, token_s)

    def _own(self, replica: str) -> Timing:
        return self._timings[self._pools[replica]]
