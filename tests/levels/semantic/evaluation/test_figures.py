from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.levels.semantic.evaluation.figures import at_most, interval, loosest


@pytest.mark.parametrize(
    ("num_wrong", "num", "confidence", "bound"),
    [
        # Without an error it is 1 - α^(1/n); the others are quantiles of the beta distribution (wrong + 1, right).
        (0, 300, 0.95, 1 - 0.05 ** (1 / 300)),
        (0, 1, 0.95, 0.95),
        (1, 10, 0.95, 0.394163),
        (3, 300, 0.95, 0.025641),
        (3, 300, 0.975, 0.028945),
        (10, 1000, 0.95, 0.016903),
        (500, 1000, 0.95, 0.526482),
        (5, 5, 0.95, 1.0),
        (0, 0, 0.95, 1.0),
    ],
)
def test_the_bound_is_clopper_and_pearsons(num_wrong: int, num: int, confidence: float, bound: float) -> None:
    assert at_most(num_wrong, num, confidence) == pytest.approx(bound, abs=2e-6)


@given(st.integers(1, 400), st.data())
def test_the_bound_is_above_the_share_and_grows_with_each_error(num: int, data: st.DataObject) -> None:
    wrong = data.draw(st.integers(0, num - 1))
    assert wrong / num < at_most(wrong, num) <= at_most(wrong + 1, num) <= 1


def test_the_interval_of_a_share_is_around_it_and_the_same_every_time() -> None:
    flags = [True] * 30 + [False] * 70
    low, high = interval(flags)
    assert 0.18 < low < 0.3 < high < 0.42
    assert interval(flags) == (low, high)
    assert interval([]) == (0.0, 1.0)


def test_the_loosest_threshold_takes_all_of_one_score_or_none() -> None:
    scores, right = [0.9, 0.8, 0.8, 0.7, 0.6], [True, True, False, True, True]
    assert loosest(scores, right, 0.0) == 0.9
    assert loosest(scores, right, 0.2) == 0.6
    assert loosest(scores, right, 0.25) == 0.6
    assert loosest([0.9, 0.5], [False, True], 0.1) == math.inf
    assert loosest([], [], 0.1) == math.inf


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.booleans())), st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_the_loosest_threshold_errs_no_more_than_allowed_and_any_looser_one_does(
    pairs: list[tuple[float, bool]], allowed: float
) -> None:
    threshold = loosest([score for score, _ in pairs], [right for _, right in pairs], allowed)

    def kept(at: float) -> bool:
        served = [right for score, right in pairs if score >= at]
        return served.count(False) <= allowed * len(served)

    assert kept(threshold)
    assert not any(kept(score) for score, _ in pairs if score < threshold)
