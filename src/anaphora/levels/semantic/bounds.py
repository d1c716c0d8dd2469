"""An upper confidence bound on an error rate that holds however often one looks, and an alarm for bursts of errors.

Of n audits x were wrong. For 0 <= c < 1 the product over audits of c (a wrong one) or (1 - c·m) / (1 - m) (a right one) is a
nonnegative supermartingale wherever the error rate is m or more, since each factor's mean is then at most 1. So is the
mixture E(m) of such products over the constants in `BETS`, and by Ville's inequality it ever reaches 1/α with probability at
most α. "Less than m" is shown while E(m) >= 1/α: one may look after every audit and stop at will. E depends on counts alone,
not on order; it grows with m and with each right audit and shrinks with each wrong one. Hence the smallest m that is shown
is an upper confidence bound that no right audit raises and no wrong one lowers.

Ville 1939; the bets: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86 (2024);
mixtures: Robbins, Ann. Math. Statist. 41 (1970); the alarm: Page, Biometrika 41 (1954).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

BETS = ((0.0, 0.4), (0.06, 0.12), (0.15, 0.12), (0.3, 0.14), (0.5, 0.12), (0.72, 0.1))
"""Error rates that evidence is weighed for, as shares of the budget, with weights that sum to 1. The first wants no error at
all and gets there soonest; the others forgive errors."""

EXCESS = 5.0
"""An error rate of so many budgets is too much in any part: in a stretch of time (a burst), or in a slice of scores."""


def log_evidence(num_right: int, num_wrong: int, budget: float) -> float:
    """log E: what the audits say against "at least `budget` of them are wrong"."""
    logs = [log_weight + num_wrong * loss + num_right * gain for log_weight, loss, gain in _bets(budget, num_wrong > 0)]
    largest = max(logs)
    return largest + math.log(sum([math.exp(log - largest) for log in logs]))


@lru_cache(maxsize=1 << 10)
def _bets(budget: float, wrong: bool) -> tuple[tuple[float, float, float], ...]:
    """Logs of weight, factor of a wrong one, factor of a right one; of the bets that survive a wrong one, if there is one."""
    return tuple(
        (math.log(weight), math.log(c) if wrong else 0.0, math.log1p(-c * budget) - math.log1p(-budget))
        for c, weight in BETS
        if c > 0 or not wrong
    )


@lru_cache(maxsize=1 << 14)
def right_needed(num_wrong: int, budget: float, alpha: float) -> int:
    """Right audits beside `num_wrong` wrong ones after which an error rate below `budget` is shown."""
    enough = -math.log(alpha)
    # The mixture is at most its best part unweighted, and at least its best part weighted.
    bets = _bets(budget, num_wrong > 0)
    low = math.floor(min((enough - num_wrong * loss) / gain for _, loss, gain in bets)) - 1
    high = math.ceil(min((enough - num_wrong * loss - log_weight) / gain for log_weight, loss, gain in bets)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if log_evidence(middle, num_wrong, budget) < enough else (low, middle)
    return high


def upper_bound(num_right: int, num_wrong: int, confidence: float) -> float:
    """Of the error rate, valid at any time, for a single threshold that was chosen beforehand."""
    enough = -math.log(1 - confidence)
    return smallest(lambda budget: log_evidence(num_right, num_wrong, budget) >= enough)


def smallest(shown: Callable[[float], bool]) -> float:
    """The smallest budget that is shown, rounded up; 1 if none is. `shown` must be monotone."""
    low, high = 0.0, 1.0
    for _ in range(22):
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


class Burst:
    """Page's CUSUM for an error rate of `EXCESS` budgets. On at log(1/α); off when right labels have brought it back to 0."""

    __slots__ = ("_alarm", "_down", "_sum", "_up", "on")

    def __init__(self, budget: float, confidence: float) -> None:
        rate = min(EXCESS * budget, (1 + budget) / 2)
        self._up = math.log(rate / budget)
        self._down = -math.log((1 - rate) / (1 - budget))
        self._alarm = -math.log(1 - confidence)
        self._sum = 0.0
        self.on = False

    @property
    def missing(self) -> int:
        """Right labels until it is off."""
        return math.ceil(self._sum / self._down) if self.on else 0

    def add(self, wrong: bool) -> None:
        if wrong:
            self._sum = min(self._sum + self._up, 2 * self._alarm)
            self.on = self.on or self._sum >= self._alarm
        else:
            self._sum = max(0.0, self._sum - self._down)
            self.on = self.on and self._sum > 0
