"""vCache's policy, to compare ours with: every entry learns from its own labels how similar a question must be.

After the mathematics in Schroeder et al., "vCache: Verified Semantic Prompt Caching" (arXiv 2502.03771), not after its code.
An entry's labels are pairs (similarity s, right or not), with (0, wrong) and (1, right) among them from the start. With
P(right | s) = 1 / (1 + exp(-γ (s - t))) fitted to them by maximum likelihood, and the variance of t, a question is computed
with a probability τ so large that (1 - τ) · P(wrong) <= δ, for the best of fifty confidence bounds on t. δ bounds wrong
answers among all requests, not among hits; what is served is never looked at again.

Where no similarity of a wrong answer lies above one of a right answer, the likelihood has no maximum: γ grows without end.
Then t is the middle of the gap, γ is `STEEP`, and t's variance is what `separable_variance` finds by simulation. The paper's
own figures for that case are not used here, so hit rates may differ somewhat from the authors'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import msgspec
import numpy as np

MIN_LABELS = 6
"""The two that every entry begins with are among them."""
DIGITS = 3
"""To which similarities are rounded."""
STEEP = 1_000.0
FLATTEST = 1e-6
_EPSILONS = [1e-6 + (1 - 2e-6) * i / 49 for i in range(50)]
_BOUNDS = [(1 - epsilon, NormalDist().inv_cdf(1 - epsilon)) for epsilon in _EPSILONS]

Variance = Callable[[int], float]
"""Of t, after so many labels, where they are separable."""


class Fit(msgspec.Struct, frozen=True):
    threshold: float
    slope: float
    variance: float


def exploration(similarity: float, fit: Fit, budget: float) -> float:
    """τ: the probability with which the question is to be computed. Below 0: it never is."""
    deviation = math.sqrt(fit.variance)
    taus = []
    for confidence, quantile in _BOUNDS:
        threshold = min(1.0, max(0.0, fit.threshold + quantile * deviation))
        taus.append(1 - budget / (1 - confidence * _logistic(fit.slope * (similarity - threshold))))
    return min(taus)


def fitted(labels: Sequence[tuple[float, bool]], variance: Variance) -> Fit | None:
    """None: the fit failed. `labels` hold a right and a wrong one."""
    lowest_right = min(similarity for similarity, right in labels if right)
    highest_wrong = max(similarity for similarity, right in labels if not right)
    if lowest_right >= highest_wrong:
        return Fit((lowest_right + highest_wrong) / 2, STEEP, variance(len(labels)))
    found = _maximum_likelihood(labels)
    if found is None:
        return None
    intercept, slope = found
    slope = max(slope, FLATTEST)
    # How uncertain t = -intercept / slope is, to first order, from the information that the labels have.
    a = b = c = 0.0
    for similarity, _ in labels:
        p = _logistic(intercept + slope * similarity)
        weight = p * (1 - p)
        a, b, c = a + weight, b + weight * similarity, c + weight * similarity * similarity
    determinant = a * c - b * b
    if not determinant > 0:
        return None
    by_intercept, by_slope = -1 / slope, intercept / slope**2
    spread = (c * by_intercept**2 - 2 * b * by_intercept * by_slope + a * by_slope**2) / determinant
    return Fit(min(1.0, max(0.0, -intercept / slope)), slope, max(0.0, spread))


class Entry:
    """The labels of one cached answer."""

    def __init__(self, variance: Variance) -> None:
        self._labels = [(0.0, False), (1.0, True)]
        self._variance = variance
        self._fit: Fit | None = None

    def add(self, similarity: float, *, right: bool) -> None:
        self._labels.append((round(similarity, DIGITS), right))
        self._fit = fitted(self._labels, self._variance) if len(self._labels) >= MIN_LABELS else None

    def serves(self, similarity: float, u: float, budget: float) -> bool:
        """`u`: drawn from [0, 1) for this question."""
        return self._fit is not None and u > exploration(round(similarity, DIGITS), self._fit, budget)


def separable_variance(similarities: Sequence[float], *, seed: int, num_draws: int = 4_000, most: int = 48) -> Variance:
    """By simulation: thresholds are drawn evenly from [0, 1], labels' similarities from those of a workload.

    The two labels that every entry begins with count; beyond `most` labels the figure for `most` stands.
    """
    rng = np.random.default_rng(seed)
    pool = np.asarray(similarities, dtype=np.float64)
    thresholds = rng.random(num_draws)
    below, above = np.zeros(num_draws), np.ones(num_draws)
    table = []
    for _ in range(most - 1):
        table.append(float(np.mean(((below + above) / 2 - thresholds) ** 2)))
        label = rng.choice(pool, num_draws)
        below = np.where(label < thresholds, np.maximum(below, label), below)
        above = np.where(label >= thresholds, np.minimum(above, label), above)
    return lambda num_labels: table[min(max(num_labels - 2, 0), len(table) - 1)]


def _logistic(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    power = math.exp(x) if x > -700 else 0.0
    return power / (1 + power)


def _maximum_likelihood(labels: Sequence[tuple[float, bool]]) -> tuple[float, float] | None:
    """Intercept and slope, by Newton's method with steps halved until they help. None: no maximum in reach."""
    intercept = slope = 0.0
    likelihood = _log_likelihood(labels, intercept, slope)
    for _ in range(100):
        g0 = g1 = a = b = c = 0.0
        for similarity, right in labels:
            p = _logistic(intercept + slope * similarity)
            weight, miss = p * (1 - p), right - p
            g0, g1 = g0 + miss, g1 + miss * similarity
            a, b, c = a + weight, b + weight * similarity, c + weight * similarity * similarity
        determinant = a * c - b * b
        if determinant <= 1e-300:
            return None
        step0, step1 = (c * g0 - b * g1) / determinant, (a * g1 - b * g0) / determinant
        if step0 * g0 + step1 * g1 < 1e-12:  # twice what the likelihood could still gain
            return intercept, slope
        scale = 1.0
        while (better := _log_likelihood(labels, intercept + scale * step0, slope + scale * step1)) < likelihood:
            scale /= 2
            if scale < 1e-12:
                return intercept, slope
        intercept, slope, likelihood = intercept + scale * step0, slope + scale * step1, better
    return None


def _log_likelihood(labels: Sequence[tuple[float, bool]], intercept: float, slope: float) -> float:
    total = 0.0
    for similarity, right in labels:
        x = intercept + slope * similarity
        x = x if right else -x
        total -= math.log1p(math.exp(-x)) if x > -700 else -x
    return total
