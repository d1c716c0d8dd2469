"""Prompts of token ids, for engines over tiny models, and what was reused of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anaphora.types import Request, Sampling

if TYPE_CHECKING:
    from anaphora.testing.engines import Asked

GREEDY = Sampling(temperature=0.0)
BLOCK = 16
"""Tokens of a KV block, unless an engine is told otherwise."""


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 100_000 + i).randrange(20, 400) for i in range(count)]


def raw(tokens: Sequence[int], *, max_tokens: int | None = 4, sampling: Sampling = GREEDY, **fields: Any) -> Request:
    return Request("m", prompts=(tuple(tokens),), max_tokens=max_tokens, sampling=sampling, **fields)


def reused(asked: Asked) -> int:
    return asked.completion.usage.kv_reused_tokens
