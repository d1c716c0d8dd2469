"""Thresholds from the strictest to the loosest, and which of them counts of labels allow. The reasons are in `risk`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from anaphora.levels.semantic.bounds import EXCESS, right_needed

LARGEST_BUDGET = 0.5
SLICE = 3
"""Steps of the grid that may be taken together, where each has few labels, to show that those just above a threshold do."""


class Counts:
    """Labels by the strictest threshold that they reach: those of the uniform sample, and all."""

    __slots__ = ("all_right", "all_wrong", "right", "size", "wrong")

    def __init__(self, num_rungs: int) -> None:
        self.right = [0] * num_rungs
        self.wrong = [0] * num_rungs
        self.all_right = [0] * num_rungs
        self.all_wrong = [0] * num_rungs
        self.size = 0
        """Of the uniform sample."""

    def add(self, rung: int, *, wrong: bool, drawn: bool) -> None:
        (self.all_wrong if wrong else self.all_right)[rung] += 1
        if drawn:
            (self.wrong if wrong else self.right)[rung] += 1
            self.size += 1

    def subtract(self, other: Counts) -> None:
        for mine, its in zip(self._lists(), other._lists(), strict=True):
            mine[:] = [one - another for one, another in zip(mine, its, strict=True)]
        self.size -= other.size

    def reaching(self) -> Counts:
        """The same, each threshold with all that reach it."""
        sums = Counts(0)
        sums.right, sums.wrong, sums.all_right, sums.all_wrong = (list(accumulate(counts)) for counts in self._lists())
        return sums

    def _lists(self) -> tuple[list[int], list[int], list[int], list[int]]:
        return self.right, self.wrong, self.all_right, self.all_wrong


def shares(num_rungs: int, reserve: float) -> list[float]:
    """Of α: what each threshold has of its own."""
    rest = reserve / (num_rungs - 1) if num_rungs > 1 else 0.0
    return [1 - rest * (num_rungs - 1), *[rest] * (num_rungs - 1)]


def fallback(own: Sequence[float], alpha: float, shown: Callable[[int, float], bool]) -> list[tuple[bool, float]]:
    """The fallback procedure: whether each threshold is shown, and at which part of `alpha` it was tested."""
    tested: list[tuple[bool, float]] = []
    passed_on = 0.0
    for rung, share in enumerate(own):
        level = (share + passed_on) * alpha
        passes = level > 0 and shown(rung, level)
        passed_on = share + passed_on if passes else 0.0
        tested.append((passes, level))
    return tested


class Ladder:
    """What one budget allows. `sums`: by `Counts.reaching`; `bursts`: by threshold, right labels until its burst is over."""

    def __init__(self, sums: Counts, bursts: Sequence[int], *, own: Sequence[float], alpha: float, budget: float) -> None:
        self._sums = sums
        self._bursts = bursts
        self._alpha = alpha
        self._budget = budget
        self._excess = min(EXCESS * budget, LARGEST_BUDGET)
        self._tested = fallback(own, alpha, lambda rung, level: self._missing_average(rung, level) <= 0)
        self.served: int | None = None
        """The loosest threshold that may be served."""
        for rung, (shown, _) in enumerate(self._tested):
            if shown and not bursts[rung] and self._missing_slice(rung, rung) <= 0:
                self.served = rung

    def missing(self, rung: int) -> tuple[int, int] | None:
        """How many right labels that reach this threshold, and no stricter one, would serve them; and by which threshold."""
        ways: list[tuple[int, int]] = []
        for other in range(rung, len(self._tested)):
            level = self._tested[other][1]
            missing_slice = self._missing_slice(other, rung)
            if level > 0 and missing_slice < math.inf:
                ways.append((int(max(self._missing_average(other, level), self._bursts[other], missing_slice)), other))
        return min(ways, default=None)

    def _missing_average(self, rung: int, level: float) -> int:
        return right_needed(self._sums.wrong[rung], self._budget, level) - self._sums.right[rung]

    def _missing_slice(self, rung: int, at: int) -> float:
        """For one of the slices of at most `SLICE` steps above `rung`, by labels that reach `at` and no stricter threshold."""
        best = math.inf
        for top in range(max(0, rung + 1 - SLICE), rung + 1):
            right, wrong = self._sums.all_right[rung], self._sums.all_wrong[rung]
            if top:
                right -= self._sums.all_right[top - 1]
                wrong -= self._sums.all_wrong[top - 1]
            missing = right_needed(wrong, self._excess, self._alpha) - right
            if missing <= 0 or top <= at:
                best = min(best, missing)
        return best
