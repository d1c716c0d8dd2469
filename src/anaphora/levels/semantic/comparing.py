"""From a question to the one asked before that says the same, if there is one: neighbours, guards, verifier, judge.

Every step can only say no, or leave a candidate to the next one. Whether the candidate's answer may be given is for `risk`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from anaphora.keys import digest
from anaphora.levels.semantic.forms import recalled
from anaphora.levels.semantic.guards import refusal
from anaphora.levels.semantic.records import Entry
from anaphora.levels.semantic.texts import Prepared

NUM_NEIGHBOURS = 4
MIN_SIMILARITY = 0.5
"""Cosine below which nothing asks the same: the verifier need not be asked."""
MIN_SCORE = 0.5
"""Probability of being right below which a candidate is none."""
GREY = 0.15
"""From here to `MIN_SCORE` a judge, where there is one, has the last word."""

Vector = NDArray[np.float32]
Step = Literal["scope", "neighbours", "guards", "verifier", "judge", "risk", "answer"]


class Verifies(Protocol):
    def probability(self, a: Prepared, b: Prepared, similarity: float) -> float:
        """That the answer to one is the right answer to the other."""
        ...


class Near(Protocol):
    """What `Entries` can be asked."""

    def same(self, space: bytes, digest: bytes) -> Entry | None: ...

    def near(self, space: bytes, vector: Vector, k: int) -> Sequence[tuple[Entry, float]]: ...


class Compared(msgspec.Struct, frozen=True):
    """With the entry that came nearest to standing for the question."""

    step: Step
    """The last one that was reached."""
    why: str
    """What it found, in words."""
    entry: Entry | None = None
    similarity: float | None = None
    score: float | None = None
    candidate: bool = False
    """No step said no."""


NOTHING = Compared("neighbours", "nothing like it was asked under the same circumstances")


def digest_of(prepared: Prepared) -> bytes:
    """The same for the same content."""
    return digest((b"content", prepared.normal.encode()))


async def compare(
    prepared: Prepared,
    spaces: Sequence[bytes],
    entries: Near,
    verifier: Verifies,
    vector: Callable[[], Awaitable[Vector]],
    refuted: Callable[[int, bytes], bool],
    fits: Callable[[Entry], Awaitable[bool]] | None = None,
    *,
    unrelated: float = 0.0,
) -> Compared:
    """The nearest candidate of all `spaces`, else what the one that came nearest to being one failed by.

    `vector` is the question's, computed only where content alone finds nothing. `refuted` says, of an entry's id and a content,
    that the answer was found wrong for it. `fits` asks the judge about an entry. `unrelated` is the cosine that texts about
    different things have: similarities are what is above it, as a share of what there can be.
    """
    content = digest_of(prepared)
    for space in spaces:
        entry = entries.same(space, content)
        if entry is not None and not refuted(entry.id, content):
            return Compared("verifier", "the same content", entry, None, 1.0, candidate=True)
    near = [pair for space in spaces for pair in entries.near(space, await vector(), NUM_NEIGHBOURS)]
    best = NOTHING
    for entry, cosine in sorted(near, key=lambda pair: pair[1], reverse=True):
        similarity = (cosine - unrelated) / (1 - unrelated)
        if similarity < MIN_SIMILARITY or best.candidate:
            break
        best = max(best, _judged(prepared, entry, similarity, verifier, refuted=refuted(entry.id, content)), key=_rank)
    if best.candidate or fits is None or best.entry is None or best.score is None or best.score < GREY:
        return best
    yes = await fits(best.entry)
    why = "the judge says that its answer fits" if yes else "the judge says that its answer does not fit"
    score = max(best.score, MIN_SCORE) if yes else best.score
    return msgspec.structs.replace(best, step="judge", why=why, score=score, candidate=yes)


def _judged(prepared: Prepared, entry: Entry, similarity: float, verifier: Verifies, *, refuted: bool) -> Compared:
    other = recalled(entry.text, entry.form)
    guard = refusal(prepared, other)
    if guard is not None:
        return Compared("guards", f"they differ in: {guard}", entry, similarity)
    if refuted:
        return Compared("verifier", "its answer was found wrong for this question", entry, similarity)
    score = verifier.probability(prepared, other, similarity)
    if not score >= MIN_SCORE:  # also where it is no number
        return Compared("verifier", "not found to ask the same", entry, similarity, score)
    return Compared("verifier", "found to ask the same", entry, similarity, score, candidate=True)


def _rank(found: Compared) -> tuple[bool, float, float]:
    return found.candidate, -1.0 if found.score is None else found.score, found.similarity or 0.0
