"""How long things take, learned from how long they took. Pure: times are handed in."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

_MOST_TIMES = 1e6
"""Nothing is a million times slower or faster than was thought."""


class Rates:
    """y ≈ Σ rate · feature by weighted least squares; no rate is ever negative, and older observations count less.

    Errors count relative to what was expected, so that short and long times teach alike. `prior` is what is answered before
    anything is known. Of it only the proportions are believed in, worth `trust` observations at `typical` features: the first
    observation says how fast everything is, and a rate that nothing speaks of stays in proportion to the others. Those that
    are numbered in `fixed` do not depend on how fast anything is, and stay in place.
    """

    def __init__(
        self,
        prior: Sequence[float],
        typical: Sequence[float],
        *,
        fixed: Collection[int] = (),
        keep: float = 0.995,
        trust: float = 0.1,
    ) -> None:
        """`keep`: what is left of an observation's weight when the next one comes."""
        size = len(prior)
        self._keep = keep
        self._prior = tuple(prior)
        self._fixed = tuple(number for number in range(size) if number in fixed)
        self._scaled = tuple(number for number in range(size) if number not in fixed)
        whole = sum(rate * feature for rate, feature in zip(prior, typical, strict=True))
        # Each rate's prior is an observation of its own: a feature alone.
        self._anchor = [trust * (feature / whole) ** 2 for feature in typical]
        self._xx = [[0.0] * size for _ in range(size)]
        self._xy = [0.0] * size
        self.rates = list(prior)
        self._scale_before = 1.0
        self.num_observations = 0

    def __call__(self, features: Sequence[float]) -> float:
        return sum(map(float.__mul__, self.rates, features))

    def add(self, features: Sequence[float], y: float) -> None:
        """`features` together took `y`. All are finite and not negative."""
        # A surprise of more than ten times counts as one of ten times, and the first is none: nothing was expected yet.
        expected = max(self(features), y / 10) if self.num_observations else y
        weight = 1.0 / max(expected, 1e-9) ** 2
        size, keep = len(self.rates), self._keep
        for i in range(size):
            row, weighted = self._xx[i], weight * features[i]
            for j in range(size):
                row[j] = keep * row[j] + weighted * features[j]
            self._xy[i] = keep * self._xy[i] + weighted * y
        self.num_observations += 1
        self._solve()

    def _solve(self) -> None:
        """Each rate in turn at its best, the others given: converges, and begins where the last solution was, as much faster or
        slower as all has become since."""
        rates, before = self.rates, self._scale_before
        scale = self._scale_before = self._scale()
        for i in self._scaled:
            rates[i] *= scale / before
        for _ in range(8):
            for i, row in enumerate(self._xx):
                others = sum(map(float.__mul__, row, rates)) - row[i] * rates[i]
                times = 1.0 if i in self._fixed else scale
                anchor = self._anchor[i] / scale**2
                best = (self._xy[i] + anchor * times * self._prior[i] - others) / (row[i] + anchor)
                rates[i] = max(0.0, best)

    def _scale(self) -> float:
        """How many times longer than by the prior things take, if its proportions are right."""
        prior, scaled = self._prior, self._scaled
        took = sum(prior[i] * (self._xy[i] - sum(self._xx[i][j] * self.rates[j] for j in self._fixed)) for i in scaled)
        thought = sum(prior[i] * prior[j] * self._xx[i][j] for i in scaled for j in scaled)
        return min(max(took / thought, 1 / _MOST_TIMES), _MOST_TIMES) if thought > 0 else 1.0


class Decaying:
    """A sum whose parts fade: after `time_s`, what was added counts for a third (1/e)."""

    def __init__(self, time_s: float) -> None:
        self._time_s = time_s
        self._value = 0.0
        self._at_s = -math.inf

    def add(self, amount: float, now_s: float) -> None:
        self._value = self(now_s) + amount
        self._at_s = max(self._at_s, now_s)

    def __call__(self, now_s: float) -> float:
        if not self._value:
            return 0.0
        return self._value * math.exp(-max(0.0, now_s - self._at_s) / self._time_s)


def gathered_s(time_s: float, watched_s: float) -> float:
    """Seconds' worth of even traffic that a `Decaying` sum holds after `watched_s`: as many at first, `time_s` in the end."""
    return -time_s * math.expm1(-watched_s / time_s)


class Factor:
    """How many times longer things take here than in the whole pool, as far as it is more than chance.

    The mean of the logarithms of observed to expected times, less its standard error: replicas that are alike stay alike, and
    one that is slower is known to be after a few answers.
    """

    def __init__(self, keep: float = 0.97) -> None:
        self._keep = keep
        self._weight = self._sum = self._squares = 0.0

    def add(self, expected: float, took: float) -> None:
        if expected <= 0 or took <= 0:
            return
        ratio = min(max(math.log(took / expected), -3.0), 3.0)
        self._weight = self._keep * self._weight + 1
        self._sum = self._keep * self._sum + ratio
        self._squares = self._keep * self._squares + ratio * ratio

    @property
    def mean(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    def beside(self, pool: Factor) -> float:
        """1 where nothing tells it from its `pool`."""
        if self._weight < 1:
            return 1.0
        difference = self.mean - pool.mean
        variance = max(0.0, self._squares / self._weight - self.mean**2) + 0.25 / self._weight
        certain = max(0.0, abs(difference) - 2 * math.sqrt(variance / self._weight))
        return math.exp(math.copysign(certain, difference))
