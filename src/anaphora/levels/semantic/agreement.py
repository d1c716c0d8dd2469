"""Do two answers say the same? What an audit asks of the answer that might have been given and the one that was computed.

In doubt they do not: what is called different by mistake only costs hits, what is called the same by mistake costs the promise.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from anaphora.levels.semantic.guards import refusal
from anaphora.levels.semantic.texts import normal_form, prepare

Embed = Callable[[Sequence[str]], Awaitable[NDArray[np.float32]]]
"""Texts to vectors of length 1, one row each."""

ALIKE = 0.85
"""Cosine that the sentences of one answer have with the nearest ones of the other, on average, both ways round."""
MAX_SENTENCES = 24
"""Of one answer. Longer ones differ somewhere: only the same words are the same."""

_ENDS = re.compile(r"(?<=[.!?…])\s+|\n+")


async def agree(first: str, second: str, embed: Embed) -> bool:
    """Numbers, names and negations must be the same in both; then what their sentences are about must be alike."""
    if normal_form(first) == normal_form(second):
        return True
    ours, theirs = _sentences(first), _sentences(second)
    if not ours or not theirs or max(len(ours), len(theirs)) > MAX_SENTENCES:
        return False
    if refusal(prepare(first), prepare(second)) is not None:
        return False
    vectors = await embed([*ours, *theirs])
    cosines = vectors[: len(ours)] @ vectors[len(ours) :].T
    return bool(min(cosines.max(axis=0).mean(), cosines.max(axis=1).mean()) >= ALIKE)


def _sentences(text: str) -> list[str]:
    return [sentence for piece in _ENDS.split(text) if (sentence := piece.strip())]
