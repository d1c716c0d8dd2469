"""The bound holds however often one looks, and moves only where it may."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.levels.semantic.bounds import BETS, Burst, log_evidence, right_needed, upper_bound

COUNTS = st.integers(min_value=0, max_value=5_000)
FEW = st.integers(min_value=0, max_value=50)
BUDGETS = st.floats(min_value=1e-4, max_value=0.5)


def share_ever_shown(needed: list[int], error_rate: float, *, num_runs: int, num_labels: int, seed: int) -> float:
    """Of streams with this error rate, the share that ever has `needed[errors]` right labels, looking after each."""
    wrong = np.random.default_rng(seed).random((num_runs, num_labels)) < error_rate
    errors = wrong.cumsum(axis=1)
    right = np.arange(1, num_labels + 1) - errors
    table = np.array(needed + [2**40] * (int(errors.max()) + 1 - len(needed)))
    return float((right >= table[errors]).any(axis=1).mean())


def limit(alpha: float, num_runs: int) -> float:
    """Three standard deviations of Monte Carlo above what is promised."""
    return alpha + 3 * math.sqrt(alpha * (1 - alpha) / num_runs)


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("above", [1.0, 1.2])
def test_an_error_rate_of_the_budget_or_more_is_hardly_ever_shown_to_be_less(budget: float, above: float) -> None:
    needed = [right_needed(errors, budget, 0.05) for errors in range(120)]
    share = share_ever_shown(needed, above * budget, num_runs=1_000, num_labels=int(60 / budget), seed=1)
    assert share <= limit(0.05, 1_000)


def test_a_bound_that_is_made_for_one_look_does_not_survive_looking_after_every_label() -> None:
    """The test above can fail: this is Clopper and Pearson's bound, which needs fewer labels, in its place."""
    budget = 0.05

    def enough(errors: int, right: int) -> bool:
        n = errors + right
        return sum(math.comb(n, k) * budget**k * (1 - budget) ** (n - k) for k in range(errors + 1)) <= 0.05

    needed = []
    right = 1
    for errors in range(30):
        while not enough(errors, right):
            right += 1
        needed.append(right)
    assert share_ever_shown(needed, budget, num_runs=1_000, num_labels=1_200, seed=1) > limit(0.05, 1_000)


@pytest.mark.parametrize(
    ("budget", "without", "one", "two"),
    [(0.005, 684, 1_393, 1_825), (0.01, 341, 695, 910), (0.02, 170, 346, 452), (0.05, 67, 136, 178), (0.1, 33, 66, 86)],
)
def test_so_many_right_labels_are_needed(budget: float, without: int, one: int, two: int) -> None:
    assert [right_needed(errors, budget, 0.05) for errors in range(3)] == [without, one, two]


def test_half_the_budget_is_shown_after_some_thousand_labels() -> None:
    needed = [right_needed(errors, 0.01, 0.05) for errors in range(120)]
    assert share_ever_shown(needed, 0.005, num_runs=300, num_labels=4_000, seed=2) > 0.8
    assert share_ever_shown(needed, 0.002, num_runs=300, num_labels=1_500, seed=2) > 0.9


@given(COUNTS, FEW, BUDGETS)
def test_what_is_needed_is_the_least_that_suffices(right: int, wrong: int, budget: float) -> None:
    needed = right_needed(wrong, budget, 0.05)
    assert (log_evidence(right, wrong, budget) >= math.log(20)) == (right >= needed)


@given(COUNTS, FEW)
def test_a_right_label_never_raises_the_bound_and_a_wrong_one_never_lowers_it(right: int, wrong: int) -> None:
    bound = upper_bound(right, wrong, 0.95)
    assert upper_bound(right + 1, wrong, 0.95) <= bound <= upper_bound(right, wrong + 1, 0.95)
    assert bound >= wrong / (right + wrong) if right + wrong else bound > 0.9


@given(COUNTS, FEW, BUDGETS, BUDGETS)
def test_a_larger_budget_is_shown_where_a_smaller_one_is(right: int, wrong: int, one: float, other: float) -> None:
    smaller, larger = sorted((one, other))
    assert log_evidence(right, wrong, smaller) <= log_evidence(right, wrong, larger) + 1e-9


@given(FEW, FEW, BUDGETS)
def test_no_label_pays_in_the_mean_where_the_budget_is_passed(right: int, wrong: int, budget: float) -> None:
    """The supermartingale itself, one step from any history, at the budget and above it."""
    now = math.exp(log_evidence(right, wrong, budget))
    for rate in (budget, min(1.0, 1.5 * budget)):
        after_right, after_wrong = (math.exp(log_evidence(right + d, wrong + 1 - d, budget)) for d in (1, 0))
        assert (1 - rate) * after_right + rate * after_wrong <= now * (1 + 1e-9)


def test_before_the_first_label_nothing_has_been_won() -> None:
    assert math.isclose(sum(weight for _, weight in BETS), 1.0)
    assert math.isclose(log_evidence(0, 0, 0.01), 0.0, abs_tol=1e-12)


def test_errors_in_close_succession_are_a_burst_and_rare_ones_are_not() -> None:
    burst = Burst(0.01, 0.95)
    for _ in range(3):
        burst.add(wrong=True)
        for _ in range(99):
            burst.add(wrong=False)
        assert not burst.on
    burst.add(wrong=True)
    burst.add(wrong=True)
    assert burst.on
    for _ in range(burst.missing - 1):
        burst.add(wrong=False)
    assert burst.on
    burst.add(wrong=False)
    assert not burst.on


def test_a_burst_is_over_after_a_bounded_number_of_right_labels_however_long_it_was() -> None:
    burst = Burst(0.01, 0.95)
    for _ in range(1_000):
        burst.add(wrong=True)
    assert 100 < burst.missing < 200


def test_an_error_rate_of_half_the_budget_rarely_looks_like_a_burst() -> None:
    rng, burst, num_alarms, was_on = random.Random(3), Burst(0.01, 0.95), 0, False
    for _ in range(50_000):
        burst.add(rng.random() < 0.005)
        num_alarms += burst.on and not was_on
        was_on = burst.on
    assert num_alarms <= 25
