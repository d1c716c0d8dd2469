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
import numpy.typing as npt

MIN_LABELS = 6
"""The two that every entry begins with are among them."""
DIGITS = 3
"""To which similarities are rounded."""
STEEP = 1_000.0
FLATTEST = 1e-6
_EPSILONS = [1e-6 + (1 - 2e-6) * i / 49 for i in range(50)]
_BOUNDS = [(1 - epsilon, NormalDist().inv_cdf(1 - epsilon)) for epsilon in _EPSILONS]

Floats = npt.NDArray[np.float64]
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
        taus.append(1 - budget / (1 - confidence * 0.5 * (1 + math.tanh(fit.slope * (similarity - threshold) / 2))))
    return min(taus)


def fitted(similarities: Sequence[float], right: Sequence[bool], variance: Variance) -> Fit | None:
    """None: the fit failed. There are a right and a wrong one among the labels."""
    s, c = np.asarray(similarities, dtype=np.float64), np.asarray(right, dtype=np.float64)
    lowest_right, highest_wrong = float(s[c > 0].min()), float(s[c == 0].max())
    if lowest_right >= highest_wrong:
        return Fit((lowest_right + highest_wrong) / 2, STEEP, variance(len(s)))
    found = _maximum_likelihood(s, c)
    if found is None:
        return None
    intercept, slope = found[0], max(found[1], FLATTEST)
    # How uncertain t = -intercept / slope is, to first order, from the information that the labels have.
    w00, w01, w11 = _information(s, _logistic(intercept + slope * s))
    determinant = w00 * w11 - w01 * w01
    if not determinant > 0:
        return None
    by_intercept, by_slope = -1 / slope, intercept / slope**2
    spread = (w11 * by_intercept**2 - 2 * w01 * by_intercept * by_slope + w00 * by_slope**2) / determinant
    return Fit(min(1.0, max(0.0, -intercept / slope)), slope, max(0.0, spread))


class Entry:
    """The labels of one cached answer."""

    def __init__(self, variance: Variance) -> None:
        self._similarities = [0.0, 1.0]
        self._right = [False, True]
        self._variance = variance
        self._fit: Fit | None = None

    def add(self, similarity: float, *, right: bool) -> None:
        self._similarities.append(round(similarity, DIGITS))
        self._right.append(right)
        enough = len(self._right) >= MIN_LABELS
        self._fit = fitted(self._similarities, self._right, self._variance) if enough else None

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


def _logistic(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(x / 2))


def _information(s: Floats, p: Floats) -> tuple[float, float, float]:
    weight = p * (1 - p)
    return float(weight.sum()), float(weight @ s), float(weight @ (s * s))


def _maximum_likelihood(s: Floats, c: Floats) -> tuple[float, float] | None:
    """Intercept and slope, by Newton's method with steps halved until they help. None: no maximum in reach."""

    def log_likelihood(intercept: float, slope: float) -> float:
        x = np.where(c > 0, 1.0, -1.0) * (intercept + slope * s)
        return -float(np.logaddexp(0.0, -x).sum())

    intercept = slope = 0.0
    likelihood = log_likelihood(intercept, slope)
    for _ in range(100):
        p = _logistic(intercept + slope * s)
        g0, g1 = float((c - p).sum()), float((c - p) @ s)
        w00, w01, w11 = _information(s, p)
        determinant = w00 * w11 - w01 * w01
        if determinant <= 1e-300:
            return None
        step0, step1 = (w11 * g0 - w01 * g1) / determinant, (w00 * g1 - w01 * g0) / determinant
        if step0 * g0 + step1 * g1 < 1e-12:  # twice what the likelihood could still gain
            return intercept, slope
        scale = 1.0
        while (better := log_likelihood(intercept + scale * step0, slope + scale * step1)) < likelihood:
            scale /= 2
            if scale < 1e-12:
                return intercept, slope
        intercept, slope, likelihood = intercept + scale * step0, slope + scale * step1, better
    return None
