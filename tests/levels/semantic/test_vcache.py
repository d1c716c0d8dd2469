"""vCache's published decision rule, and what it is fed with."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.levels.semantic.vcache import STEEP, Entry, Fit, Variance, exploration, fitted, separable_variance

Labels = list[tuple[float, bool]]


def fit_of(labels: Labels, variance: Variance) -> Fit | None:
    return fitted([similarity for similarity, _ in labels], [right for _, right in labels], variance)


def never(_: int) -> float:
    raise AssertionError("the labels overlap")


@pytest.mark.parametrize(
    ("similarity", "threshold", "slope", "variance", "budget", "tau"),
    [
        (0.97, 0.85, 40, 4e-4, 0.02, 0.66742),
        (0.97, 0.85, 200, 4e-4, 0.02, -1.94745),
        (0.97, 0.90, 200, 1e-4, 0.02, -0.80789),
        (0.95, 0.5, 30, 0.0354, 0.02, 0.69047),
        (0.95, 0.5, 30, 0.0095, 0.02, 0.04490),
        (0.95, 0.5, 30, 0.005, 0.02, 0.02496),
        (1.0, 0.5, 1000, 0.0354, 0.02, 0.02005),
        (0.97, 0.85, 200, 4e-4, 0.05, -6.36863),
    ],
)
def test_how_often_to_explore_follows_from_the_formula(
    similarity: float, threshold: float, slope: float, variance: float, budget: float, tau: float
) -> None:
    assert exploration(similarity, Fit(threshold, slope, variance), budget) == pytest.approx(tau, abs=6e-6)


def test_the_fit_finds_the_curve_that_labels_were_drawn_from() -> None:
    rng = random.Random(1)
    labels = [(0.0, False), (1.0, True)]
    for _ in range(3_000):
        similarity = rng.uniform(0.5, 1.0)
        labels.append((similarity, rng.random() < 1 / (1 + math.exp(-20 * (similarity - 0.8)))))
    fit = fit_of(labels, never)
    assert fit is not None
    assert fit.threshold == pytest.approx(0.8, abs=0.01)
    assert fit.slope == pytest.approx(20, rel=0.1)
    assert math.sqrt(fit.variance) < 0.005


def test_the_variance_of_the_threshold_is_what_repeated_fits_show() -> None:
    rng = random.Random(2)
    thresholds: list[float] = []
    variances: list[float] = []
    for _ in range(200):
        labels = [(0.0, False), (1.0, True)]
        for _ in range(200):
            similarity = rng.random()
            labels.append((similarity, rng.random() < 1 / (1 + math.exp(-10 * (similarity - 0.6)))))
        fit = fit_of(labels, never)
        assert fit is not None
        thresholds.append(fit.threshold)
        variances.append(fit.variance)
    assert np.mean(variances) == pytest.approx(np.var(thresholds), rel=0.3)


@given(
    st.lists(st.tuples(st.floats(min_value=0, max_value=1), st.booleans()), max_size=40), st.floats(min_value=0, max_value=1)
)
def test_any_labels_give_a_sound_fit_or_none(labels: Labels, similarity: float) -> None:
    fit = fit_of([(0.0, False), (1.0, True), *labels], lambda _: 0.01)
    if fit is not None:
        assert 0 <= fit.threshold <= 1
        assert fit.slope > 0
        assert fit.variance >= 0
        assert exploration(similarity, fit, 0.01) <= 1


def test_separable_labels_put_the_threshold_in_the_middle_of_the_gap() -> None:
    fit = fit_of([(0.0, False), (1.0, True), (0.7, False), (0.9, True)], lambda num_labels: num_labels / 1_000)
    assert fit == Fit(0.8, STEEP, 0.004)


def test_the_simulated_variance_agrees_with_what_can_be_computed_for_even_similarities() -> None:
    """A uniform t among n uniform points: its mean squared distance from the middle of its gap is 1 / 2(n + 2)(n + 3)."""
    variance = separable_variance(np.linspace(0, 1, 10_001).tolist(), seed=1, num_draws=40_000)
    for num_labels in (2, 6, 12, 30, 48):
        n = num_labels - 2
        assert variance(num_labels) == pytest.approx(1 / (2 * (n + 2) * (n + 3)), rel=0.06)
    assert variance(1_000) == variance(48)


def test_similarities_that_lie_close_together_teach_less() -> None:
    even = separable_variance(np.linspace(0, 1, 101).tolist(), seed=1)
    close = separable_variance(np.linspace(0.7, 1, 101).tolist(), seed=1)
    assert close(12) > 3 * even(12)


def test_an_entry_serves_after_four_labels_of_its_own_and_not_before() -> None:
    entry = Entry(lambda _: 0.001)
    for _ in range(3):
        entry.add(0.9, right=True)
        assert not entry.serves(0.99, 0.999, 0.02)
    entry.add(0.9, right=True)
    assert entry.serves(0.99, 0.5, 0.02)
    assert not entry.serves(0.2, 0.9, 0.02)


def test_wrong_answers_among_all_requests_stay_within_the_budget() -> None:
    """vCache's own promise, which is per request, on entries that its model describes."""
    rng, budget, num_wrong, num_requests, num_served = random.Random(3), 0.05, 0, 0, 0
    variance = separable_variance([rng.random() for _ in range(1_000)], seed=1)
    for _ in range(60):
        threshold, entry = rng.uniform(0.3, 0.9), Entry(variance)
        for _ in range(60):
            similarity = rng.random()
            right = rng.random() < 1 / (1 + math.exp(-30 * (similarity - threshold)))
            num_requests += 1
            if entry.serves(similarity, rng.random(), budget):
                num_served += 1
                num_wrong += not right
            else:
                entry.add(similarity, right=right)
    assert num_served > 0.1 * num_requests
    assert num_wrong <= budget * num_requests
