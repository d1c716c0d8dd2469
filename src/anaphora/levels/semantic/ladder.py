"""Thresholds from the strictest to the loosest, and which of them counts of labels allow. The reasons are in `risk`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from anaphora.levels.semantic.bounds import EXCESS, right_needed

LARGEST_BUDGET = 0.5
STEP_SHARE = 0.2
"""Of a threshold's α: for its own step. Labels of that are cheap while it is not served."""
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


Enough = Callable[[int, int, float], bool]
"""Whether so many right and so many wrong labels show an error rate below the budget, at this α."""


def tested(sums: Counts, own: Sequence[float], alpha: float, enough: Enough) -> list[tuple[bool, float]]:
    """The fallback procedure: whether each threshold is shown, and the α at which it was tested.

    It is shown by all that reach it, sampled uniformly, or, where the threshold above is shown, by its own step, all labels.
    """
    found: list[tuple[bool, float]] = []
    passed_on = 0.0
    for rung, share in enumerate(own):
        level = (share + passed_on) * alpha
        shown = enough(sums.right[rung], sums.wrong[rung], level * (1 - STEP_SHARE if rung else 1))
        if not shown and rung and found[-1][0]:
            shown = enough(*own_step(sums, rung), level * STEP_SHARE)
        passed_on = share + passed_on if shown else 0.0
        found.append((shown, level))
    return found


def own_step(sums: Counts, rung: int, steps: int = 1) -> tuple[int, int]:
    """Right and wrong ones, of all labels, that reach a threshold but not the one so many steps above."""
    right, wrong = sums.all_right[rung], sums.all_wrong[rung]
    if steps <= rung:
        right -= sums.all_right[rung - steps]
        wrong -= sums.all_wrong[rung - steps]
    return right, wrong


class Ladder:
    """What one budget allows. `sums`: by `Counts.reaching`; `bursts`: by threshold, right labels until its burst is over."""

    def __init__(self, sums: Counts, bursts: Sequence[int], *, own: Sequence[float], alpha: float, budget: float) -> None:
        self._sums = sums
        self._bursts = bursts
        self._alpha = alpha
        self._budget = budget
        self._excess = min(EXCESS * budget, LARGEST_BUDGET)
        self._tested = tested(sums, own, alpha, lambda right, wrong, level: right >= right_needed(wrong, budget, level))
        self.served: int | None = None
        """The loosest threshold that may be served."""
        for rung, (shown, _) in enumerate(self._tested):
            if shown and not bursts[rung] and self._missing_slice(rung, rung) <= 0:
                self.served = rung

    def missing(self, rung: int) -> tuple[int, int]:
        """How many right labels that reach this threshold, and no stricter one, would serve them; and by which threshold."""
        ways: list[tuple[int, int]] = []
        for other in range(rung, len(self._tested)):
            level = self._tested[other][1]
            missing_slice = self._missing_slice(other, rung)
            if missing_slice < math.inf:
                whole = level * (1 - STEP_SHARE if other else 1)
                missing = self._missing(self._sums.right[other], self._sums.wrong[other], whole)
                if other == rung > 0 and self._tested[rung - 1][0]:
                    missing = min(missing, self._missing(*own_step(self._sums, rung), level * STEP_SHARE))
                ways.append((int(max(missing, self._bursts[other], missing_slice)), other))
        return min(ways)

    def _missing(self, right: int, wrong: int, level: float) -> int:
        return right_needed(wrong, self._budget, level) - right

    def _missing_slice(self, rung: int, at: int) -> float:
        """For one of the slices of at most `SLICE` steps above `rung`, by labels that reach `at` and no stricter threshold."""
        best = math.inf
        for steps in range(1, min(SLICE, rung + 1) + 1):
            right, wrong = own_step(self._sums, rung, steps)
            missing = right_needed(wrong, self._excess, self._alpha) - right
            if missing <= 0 or at > rung - steps:
                best = min(best, missing)
        return best
