"""A cache that was filled before, asked questions whose truth is known: what each way of deciding gives. Pure.

Thresholds of cosine that are chosen by what they would have given are of two kinds: chosen on the very questions they are
judged by, which nobody can do, and chosen on one half of the questions and judged by the other, both ways round.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from anaphora.levels.semantic.comparing import Verifies, compare
from anaphora.levels.semantic.evaluation.figures import at_most, interval, loosest
from anaphora.levels.semantic.evaluation.kept import Kept, Vector, Vectors, space_of
from anaphora.levels.semantic.evaluation.questions import DataSet, Wording, is_right
from anaphora.levels.semantic.evaluation.ways import DEFAULTS
from anaphora.levels.semantic.texts import prepare

ALLOWED_TRAPS = 0.03
NOTHING = -1.0
NUM_SHOWN = 50
ROUNDS = 200
"""Of drawing the questions again."""


class Looked(msgspec.Struct, frozen=True):
    """What is found for one question."""

    asked: Wording
    candidate: Wording | None
    """Ours."""
    answerable: bool
    """There is a right answer, wherever it lies."""
    cosine: float
    """Of the nearest. `NOTHING`: there is none."""
    nearest_right: bool
    score: float
    """Of our candidate. 0: there is none."""
    found_right: bool
    threshold: float
    """From which our verifier, as shipped, says yes in the question's language."""


class Row(msgspec.Struct, frozen=True):
    """What one way of deciding gives."""

    way: str
    num_asked: int
    num_answerable: int
    num_served: int
    num_right: int
    num_wrong: int
    wrong_at_most: float
    """Of what is served, with 95 % confidence."""
    hit_rate: float
    """Of the questions with a right answer, those that get it."""
    hit_rate_interval: tuple[float, float]
    threshold: float | None = None
    num_traps: int = 0
    """Questions without a right answer, and of those how many get one."""
    num_traps_served: int = 0
    of_cosine: float | None = None
    """Right ones, in multiples of those of the best cosine that is no more often wrong than this way, or than the budget."""
    of_cosine_interval: tuple[float, float | None] = (0.0, None)
    """95 %, by drawing the questions again, and the best cosine anew for each draw. None: without a limit."""


class Kind(msgspec.Struct, frozen=True):
    """What one kind of question gets: shares of those that are served."""

    kind: str
    num: int
    answerable: bool
    sure: float
    candidates: float
    cosine: float
    """Of the lowest threshold that no more traps pass than are allowed."""


class Wrong(msgspec.Struct, frozen=True):
    """An answer of ours that the truth says is wrong."""

    asked: str
    means: str
    cached: str
    cached_means: str
    score: float


class Filled(msgspec.Struct, frozen=True):
    num_cached: int
    num_asked: int
    num_repeats: int
    """Asked in the very words of a cached one: the exact level's, so left out."""
    rows: list[Row]
    kinds: list[Kind]
    wrong: list[Wrong]
    """The first `NUM_SHOWN`."""


Thresholds = Callable[[str], float]
"""By language: from which the verifier, as shipped, says yes."""


async def look_up(
    data: DataSet, vectors: Vectors, verifier: Verifies, thresholds: Thresholds, *, unrelated: float
) -> list[Looked]:
    kept, places = Kept(vectors), set()
    meanings = {wording.means for wording in data.cached}
    for wording in data.cached:
        if (wording.space, wording.text) not in places:
            kept.add(wording)
            places.add((wording.space, wording.text))
    asked = [wording for wording in data.asked if not (data.exact and (wording.space, wording.text) in places)]
    return [
        await _looked(wording, kept, vectors, verifier, thresholds, unrelated, wording.means in meanings) for wording in asked
    ]


async def _looked(
    wording: Wording,
    kept: Kept,
    vectors: Vectors,
    verifier: Verifies,
    thresholds: Thresholds,
    unrelated: float,
    answerable: bool,
) -> Looked:
    prepared = prepare(wording.text)

    async def vector() -> Vector:
        return vectors[wording.text]

    found = await compare(
        prepared, [space_of(wording)], kept, verifier, vector, lambda _id, _content: False, unrelated=unrelated
    )
    nearest = kept.nearest(wording)
    candidate = None if not found.candidate or found.entry is None else kept.wording(found.entry.id)
    return Looked(
        asked=wording,
        candidate=candidate,
        answerable=answerable,
        cosine=NOTHING if nearest is None else nearest[1],
        nearest_right=nearest is not None and is_right(wording, kept.wording(nearest[0])),
        score=0.0 if candidate is None or found.score is None else found.score,
        found_right=candidate is not None and is_right(wording, candidate),
        threshold=thresholds(prepared.language),
    )


def judged(data: DataSet, looked: Sequence[Looked], *, budget: float, seed: int = 1) -> Filled:
    cosines, nearest_right = [one.cosine for one in looked], [one.nearest_right for one in looked]

    def row(way: str, served: Sequence[bool], right: Sequence[bool], threshold: float | None = None) -> Row:
        return _row(way, looked, served, right, threshold)

    def by_cosine(way: str, threshold: float) -> Row:
        served = [cosine >= threshold and cosine > NOTHING for cosine in cosines]
        return row(way, served, nearest_right, threshold if NOTHING < threshold < math.inf else None)

    def of_ours(way: str, served: Sequence[bool]) -> Row:
        of_cosine, interval_of_it = _of_cosine(looked, served, budget, seed)
        found = row(way, served, ours_right)
        return msgspec.structs.replace(found, of_cosine=of_cosine, of_cosine_interval=interval_of_it)

    ours_right = [one.found_right for one in looked]
    sure = of_ours("ours, sure", [ours_serves(one) for one in looked])
    own_error = sure.num_wrong / sure.num_served if sure.num_served else 0.0
    halves = _halves(len(looked), seed)
    rows = [
        sure,
        of_ours("ours, every candidate", [one.score > 0 for one in looked]),
        row("ours, same content alone", [one.score == 1 for one in looked], ours_right),
        _chosen(
            f"ours, score from the other half, {budget:.0%}",
            looked,
            halves,
            [one.score for one in looked],
            ours_right,
            budget,
        ),
        by_cosine(f"cosine, at most {budget:.0%} wrong here", loosest(cosines, nearest_right, budget)),
        by_cosine("cosine, no more wrong than ours, sure", loosest(cosines, nearest_right, own_error)),
        _chosen(f"cosine, from the other half, {budget:.0%}", looked, halves, cosines, nearest_right, budget),
        *(by_cosine(way, threshold) for way, threshold in DEFAULTS.items()),
    ]
    traps = sorted((one.cosine for one in looked if not one.answerable), reverse=True)
    few = _above(traps, ALLOWED_TRAPS)
    if traps and traps[0] > NOTHING:
        rows.insert(6, by_cosine(f"cosine, at most {ALLOWED_TRAPS:.0%} of traps here", few))
    kinds = [
        Kind(
            kind,
            len(of),
            of[0].answerable,
            sum(map(ours_serves, of)) / len(of),
            sum(one.score > 0 for one in of) / len(of),
            sum(one.cosine >= few and one.cosine > NOTHING for one in of) / len(of),
        )
        for kind in dict.fromkeys(one.asked.kind for one in looked)
        if (of := [one for one in looked if one.asked.kind == kind])
    ]
    num_asked = len(data.asked)
    wrong = [
        Wrong(one.asked.text, one.asked.means, one.candidate.text, one.candidate.means, one.score)
        for one in looked
        if ours_serves(one) and not one.found_right and one.candidate is not None
    ]
    shown = kinds if len(kinds) > 1 else []
    return Filled(len(data.cached), num_asked, num_asked - len(looked), rows, shown, wrong[:NUM_SHOWN])


def ours_serves(one: Looked) -> bool:
    return one.score > 0 and one.score >= one.threshold


def _of_cosine(
    looked: Sequence[Looked], ours: Sequence[bool], budget: float, seed: int
) -> tuple[float | None, tuple[float, float | None]]:
    """Right answers of ours in multiples of the best cosine's, with a 95 % interval."""
    served = np.array(ours, dtype=bool)
    right = served & np.array([one.found_right for one in looked], dtype=bool)
    cosines = np.array([one.cosine for one in looked])
    nearest_right = np.array([one.nearest_right for one in looked], dtype=bool)

    def ratio(places: npt.NDArray[np.int64]) -> float:
        num_served, num_right = int(served[places].sum()), int(right[places].sum())
        allowed = max(budget, 1 - num_right / num_served if num_served else 0.0)
        threshold = loosest(cosines[places], nearest_right[places], allowed)
        against = int((nearest_right[places] & (cosines[places] >= threshold)).sum())
        return num_right / against if against else math.inf

    found = ratio(np.arange(len(looked)))
    if not math.isfinite(found):
        return None, (0.0, None)
    dice = np.random.default_rng(seed)
    drawn = sorted(ratio(dice.integers(0, len(looked), len(looked))) for _ in range(ROUNDS))
    low, high = drawn[round(0.025 * ROUNDS)], drawn[round(0.975 * ROUNDS) - 1]
    return found, (low, high if math.isfinite(high) else None)


def _row(
    way: str, looked: Sequence[Looked], served: Sequence[bool], right: Sequence[bool], threshold: float | None = None
) -> Row:
    num_served = sum(served)
    num_right = sum(one and true for one, true in zip(served, right, strict=True))
    hits = [one and true for one, true, of in zip(served, right, looked, strict=True) if of.answerable]
    traps = [one for one, of in zip(served, looked, strict=True) if not of.answerable]
    return Row(
        way=way,
        num_asked=len(looked),
        num_answerable=len(hits),
        num_served=num_served,
        num_right=num_right,
        num_wrong=num_served - num_right,
        wrong_at_most=at_most(num_served - num_right, num_served),
        hit_rate=sum(hits) / len(hits) if hits else 0.0,
        hit_rate_interval=interval(hits),
        threshold=threshold,
        num_traps=len(traps),
        num_traps_served=sum(traps),
    )


def _chosen(
    way: str,
    looked: Sequence[Looked],
    halves: tuple[list[int], list[int]],
    scores: Sequence[float],
    right: Sequence[bool],
    budget: float,
) -> Row:
    """Each half served by the threshold that the other one chose."""
    served = [False] * len(looked)
    for judge, other in (halves, halves[::-1]):
        threshold = loosest([scores[i] for i in other], [right[i] for i in other], budget)
        for i in judge:
            served[i] = scores[i] >= threshold and scores[i] > 0
    return _row(way, looked, served, right)


def _halves(num: int, seed: int) -> tuple[list[int], list[int]]:
    order = list(range(num))
    random.Random(seed).shuffle(order)
    return order[: num // 2], order[num // 2 :]


def _above(descending: Sequence[float], allowed: float) -> float:
    """The lowest threshold that at most the share `allowed` of `descending` reaches."""
    num = int(allowed * len(descending))
    return math.inf if num >= len(descending) else math.nextafter(descending[num], math.inf)
