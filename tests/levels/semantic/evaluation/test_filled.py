from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from anaphora.levels.semantic.evaluation.filled import Filled, Looked, judged, look_up
from anaphora.levels.semantic.evaluation.kept import Kept, Vector, Vectors
from anaphora.levels.semantic.evaluation.questions import DataSet, Wording
from anaphora.levels.semantic.texts import Prepared


class Word:
    """A verifier that says what it was told to."""

    def __init__(self, **chances: float) -> None:
        self.chances = chances

    def probability(self, a: Prepared, b: Prepared, similarity: float) -> float:
        return self.chances.get(a.text.split()[0].lower(), 0.0)


def at(degrees: float) -> Vector:
    return np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))], np.float32)


CACHED = (Wording("how do birds fly", "fly"), Wording("where do birds sleep", "sleep"))
ASKED = (
    Wording("explain how birds fly", "fly", kind="same"),
    Wording("explain how birds swim", "swim", kind="trap"),
    Wording("How do birds fly?", "fly", kind="same"),
    Wording("where do birds sleep", "sleep", kind="same"),
)
VECTORS: Vectors = {
    "how do birds fly": at(0),
    "where do birds sleep": at(80),
    "explain how birds fly": at(10),
    "explain how birds swim": at(20),
    "How do birds fly?": at(1),
}


def looked(**chances: float) -> list[Looked]:
    data = DataSet("birds", CACHED, ASKED)
    return asyncio.run(look_up(data, VECTORS, Word(**chances), lambda _language: 0.8, unrelated=0.0))


def test_every_question_goes_through_the_steps_and_beside_the_nearest_cosine() -> None:
    first, trap, same = looked(explain=0.7)
    assert (first.answerable, first.score, first.found_right, first.threshold) == (True, 0.7, True, 0.8)
    assert first.cosine == pytest.approx(math.cos(math.radians(10)), abs=1e-6)
    assert (trap.answerable, trap.found_right, trap.nearest_right) == (False, False, False)
    assert (same.score, same.found_right) == (1.0, True)  # the same content needs no verifier


def test_the_very_words_of_a_cached_question_are_left_out_where_the_exact_level_answers_them() -> None:
    for exact, num in ((True, 3), (False, 4)):
        data = DataSet("birds", CACHED, ASKED, exact=exact)
        found = asyncio.run(look_up(data, VECTORS, Word(), lambda _language: 0.8, unrelated=0.0))
        assert len(found) == num
        assert judged(data, found, budget=0.01).num_repeats == 4 - num


def test_what_guards_or_the_verifier_refuse_is_no_candidate() -> None:
    first, trap, _ = looked(explain=0.4)
    assert first.score == trap.score == 0
    assert first.nearest_right


def told(*found: Looked) -> Filled:
    asked = tuple(Wording(f"q{n}", "") for n in range(len(found)))
    return judged(DataSet("made up", (), asked), found, budget=0.25)


def one(*, score: float, cosine: float, right: bool, answerable: bool = True) -> Looked:
    asked = Wording("asked", "this")
    return Looked(asked, Wording("cached", "this" if right else "that"), answerable, cosine, right, score, right, 0.8)


def test_rows_count_what_is_served_right_and_wrong() -> None:
    found = told(
        one(score=0.9, cosine=0.95, right=True),
        one(score=1.0, cosine=0.99, right=True),
        one(score=0.7, cosine=0.97, right=True),
        one(score=0.0, cosine=0.96, right=False, answerable=False),
        one(score=0.85, cosine=0.3, right=False, answerable=False),
    )
    rows = {row.way: row for row in found.rows}
    ours = rows["ours, sure"]
    assert (ours.num_served, ours.num_right, ours.num_wrong, ours.num_answerable) == (3, 2, 1, 3)
    assert (ours.num_traps, ours.num_traps_served) == (2, 1)
    assert ours.hit_rate == pytest.approx(2 / 3)
    assert ours.wrong_at_most == pytest.approx(0.864650, abs=1e-5)
    assert rows["ours, same content alone"].num_served == 1
    assert rows["ours, every candidate"].num_served == 4
    swept = rows["cosine, at most 25% wrong here"]
    assert (swept.threshold, swept.num_right, swept.num_wrong) == (0.95, 3, 1)
    assert (rows["RedisVL's default"].num_served, rows["GPTCache's default"].num_served) == (4, 4)
    assert ours.of_cosine == pytest.approx(2 / 3)  # a cosine that is as often wrong is right three times
    assert ours.of_cosine_interval[0] <= 2 / 3
    assert [(wrong.asked, wrong.cached_means, wrong.score) for wrong in found.wrong] == [("asked", "that", 0.85)]


def test_a_cosine_that_no_threshold_makes_good_serves_nothing() -> None:
    found = told(one(score=0.9, cosine=0.5, right=True), *[one(score=0.0, cosine=0.9, right=False, answerable=False)] * 9)
    rows = {row.way: row for row in found.rows}
    assert rows["cosine, at most 25% wrong here"].num_served == 0
    assert rows["ours, sure"].of_cosine is None


def test_a_threshold_from_the_other_half_is_not_chosen_by_its_own_questions() -> None:
    """Right ones and wrong ones of one cosine: whichever half has more of the wrong ones forbids what the other serves."""
    found = [one(score=0.0, cosine=0.9, right=n % 3 > 0, answerable=n % 3 > 0) for n in range(30)]
    rows = {row.way: row for row in told(*found).rows}
    assert rows["cosine, at most 25% wrong here"].num_served == 0
    other = rows["cosine, from the other half, 25%"]
    assert other.num_served in (0, 15)
    assert told(*found) == told(*found)


def test_neighbours_are_the_exact_ones_and_equal_ones_in_the_order_in_which_they_came() -> None:
    texts = [f"text {n}" for n in range(40)]
    vectors = {text: at(n % 20) for n, text in enumerate(texts)}
    kept = Kept(vectors)
    for text in texts:
        kept.add(Wording(text, text, space="one"))
    found = kept.near(b"one", at(7.1), 4)
    assert [entry.text for entry, _ in found] == ["text 7", "text 27", "text 8", "text 28"]
    assert kept.near(b"other", at(7.1), 4) == []
    nearest = kept.nearest(Wording("text 3", "", space="one"))
    assert nearest is not None
    assert nearest[0] == 4
    assert kept.nearest(Wording("text 3", "")) is None
