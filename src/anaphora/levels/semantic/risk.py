"""May this answer, found under other words, be served? Only while the evidence says so (docs/semantic-risk.md has the proofs).

**The question.** A would-be hit has a score in [0, 1]: 1.0 is the same content after normalisation, anything else is the
verifier's probability of being right. Let R(t) be the share of wrong ones among the would-be hits of one pool that score t
or more. Serving "t or more" is allowed under a budget m while it is shown (`bounds`), with confidence 1 - α, that R(t) < m.

**Several thresholds.** A grid, tested from the strictest on: a threshold that is shown passes its α on to the next. A small
`reserve` of α is shared by the thresholds below the strictest, so that a strictest one that few questions reach does not bar
all others for ever (the fallback procedure, fixed-sequence testing but for the reserve). The chance that any threshold is
ever served whose R(t) >= m is at most α. What is served is what scores at least the lowest threshold that is shown.

**Two ways.** Below the strictest, a threshold is shown either by all that reach it or, if the one above is shown, by its own
step alone: what lies between the two. If both parts err less than m, so does the whole. The second way has a share of the α,
`STEP_SHARE`.

**Uniform samples.** What is not served is computed anyway, hence labelled; what is served is audited if its u, uniform in
[0, 1), is below `audit_share`. As soon as something is served, a label counts for "all that reach it" only if its u is below
`audit_share`, whatever its score: so every threshold sees each would-be hit above it with one and the same probability
(`inclusion`). Within one step all have the same chance anyway, so all labels count there.

**Slices.** An average hides a few poor hits among many that are near-certain. So the scores just above a threshold must also be
shown, by labels of their own, to err less than `EXCESS` budgets. This only ever takes serving away.

**Feedback.** "That was wrong" adds an error without a draw: E only gets smaller, so the bound stays sound. "That was right"
adds nothing: whoever says so chose to, and a bound made of volunteers would be too low. Imported labels count if
`trust_imported` says that they look like the traffic.

**Fading.** Labels lie in panes of time; the oldest leave with age, and when the others are `window` labels. Each start of
the window is a fixed time, and the promise holds from each. A burst of errors stops a threshold at once, by a CUSUM that can
only take serving away. Other versions of guards, encoder or verifier are other evidence.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import cache
from typing import Literal

import msgspec

from anaphora.errors import ConfigError
from anaphora.levels.semantic.bounds import Burst, log_evidence, smallest
from anaphora.levels.semantic.ladder import LARGEST_BUDGET, Counts, Enough, Ladder, shares, tested

GRID = (1.0, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Thresholds, strictest first. Nothing below the last is ever served."""

SMALLEST_BUDGET = 1e-6
"""Below it nothing is served. Above `LARGEST_BUDGET` is taken for that."""


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the user promises, and what it may cost."""

    budget: float = 0.01
    """Share of served hits that may be wrong."""
    confidence: float = 0.95
    audit_share: float = 0.05
    """Of what could be served, computed all the same."""
    reserve: float = 0.2
    """Of 1 - confidence, kept for thresholds below the strictest until that one is shown."""
    window: int = 20_000
    """Labels that are remembered."""
    max_age_s: float = 30 * 86_400.0
    pane_s: float = 6 * 3_600.0
    """Labels grow old together, so many seconds of them at a time."""
    trust_imported: bool = False

    def __post_init__(self) -> None:
        for name, ok, want in (
            ("risk", SMALLEST_BUDGET <= self.budget <= LARGEST_BUDGET, f"at least {SMALLEST_BUDGET}, at most {LARGEST_BUDGET}"),
            ("confidence", 0.5 <= self.confidence < 1, "at least 0.5, below 1"),
            ("audit_share", 0 < self.audit_share <= 1, "above 0 (hits that nobody checks cannot be promised), at most 1"),
            ("reserve", 0 < self.reserve < 1, "between 0 and 1"),
            ("window", self.window >= 1, "at least 1"),
            ("max_age_s", self.max_age_s >= self.pane_s > 0, "at least pane_s, which must be above 0"),
        ):
            if not ok:
                raise ConfigError(f"semantic: {name} must be {want}")


class Label(msgspec.Struct, frozen=True):
    """A would-be hit of which it is known whether it would have been wrong."""

    score: float
    wrong: bool
    u: float = 0.0
    """As drawn for `decide`. Feedback and imports need none."""
    inclusion: float = 1.0
    """As `decide` said."""
    source: Literal["audit", "feedback", "imported"] = "audit"
    """An audit is any comparison with an answer that was computed, served or not."""
    at: float = 0.0
    version: str = ""
    """Fingerprint of everything that made the score."""


class Serve(msgspec.Struct, frozen=True):
    threshold: float


class Audit(msgspec.Struct, frozen=True):
    """Could be served, and was drawn to be computed and compared. The label keeps `inclusion`."""

    threshold: float
    inclusion: float


class Shadow(msgspec.Struct, frozen=True):
    """Not to be served. It is computed anyway, so it can be labelled; the label keeps `inclusion`."""

    inclusion: float
    missing: int | None = None
    """Audits without an error, of hits like this one, after which it would be served. None: never; its score is too low, or the
    budget."""
    threshold: float = GRID[-1]
    """What `missing`, `num_audits` and `num_wrong` are about: hits that score at least so much."""
    num_audits: int = 0
    num_wrong: int = 0
    burst: bool = False
    """Errors came so fast that serving stopped."""

    def __str__(self) -> str:
        if self.missing is None:
            return f"never: its score is below {self.threshold:g}, or there is no budget"
        audits = "1 more audit" if self.missing == 1 else f"about {self.missing:,} more audits"
        known = f"{self.num_wrong:,} of {self.num_audits:,} were wrong{' in a burst' if self.burst else ''}"
        return f"{audits} without an error, of hits scored {self.threshold:g} or more (so far {known})"


Outcome = Serve | Audit | Shadow


class Rung(msgspec.Struct, frozen=True):
    """What is known of one threshold, for reports."""

    threshold: float
    num_audits: int
    num_wrong: int
    bound: float
    """With the policy's confidence, of hits scored `threshold` or more at most this share is wrong."""
    served: bool
    missing: int
    burst: bool


class Evidence:
    """Labels of one pool (tenant and model), and what they allow. Time is handed in, in seconds."""

    def __init__(self, policy: Policy, *, version: str = "", grid: tuple[float, ...] = GRID) -> None:
        self.policy = policy
        self.version = version
        self._alpha = 1 - policy.confidence
        self._grid = grid
        self._ascending = grid[::-1]
        self._own = shares(len(grid), policy.reserve)
        self._counts = Counts(len(grid))
        self._panes: dict[int, Counts] = {}
        self._bursts = [Burst(policy.budget, policy.confidence) for _ in grid]
        self._tables: dict[float, _Table] = {}
        self._pane = 0

    @classmethod
    def rebuild(cls, policy: Policy, labels: Iterable[Label], *, version: str = "") -> Evidence:
        """From labels that were kept. Their order matters to bursts only."""
        evidence = cls(policy, version=version)
        for label in sorted(labels, key=lambda label: label.at):
            evidence.add(label)
        return evidence

    def add(self, label: Label) -> bool:
        """Whether it counts in the uniform sample."""
        rung = self._rung(label.score)
        if rung is None or label.version != self.version or not self._heeded(label):
            return False
        drawn = label.source != "audit" or label.u < label.inclusion
        pane = int(label.at // self.policy.pane_s)
        for counts in (self._counts, self._panes.setdefault(pane, Counts(len(self._grid)))):
            counts.add(rung, wrong=label.wrong, drawn=drawn)
        if drawn:
            for burst in self._bursts[rung:]:
                burst.add(label.wrong)
        self._tables.clear()
        return drawn

    def decide(self, score: float, u: float, now: float, budget: float | None = None) -> Outcome:
        """`u`: drawn from [0, 1) for this request, by nothing that knows of it. `budget`: the request's own.

        A caller that serves nothing, whatever this says, labels everything with inclusion 1.
        """
        table = self._table(self.policy.budget if budget is None else min(budget, LARGEST_BUDGET), now)
        if table.threshold <= score <= 1:
            return table.audit if u < self.policy.audit_share else table.serve
        rung = self._rung(score)
        shadow = table.shadows.get(rung)
        if shadow is None:
            shadow = table.shadows[rung] = self._shadow(table, rung)
        return shadow

    def rungs(self, now: float) -> list[Rung]:
        """What is known of each threshold, strictest first."""
        table = self._table(self.policy.budget, now)
        sums = self._counts.reaching()

        def enough_for(budget: float) -> Enough:
            return lambda right, wrong, alpha: log_evidence(right, wrong, budget) >= -math.log(alpha)

        @cache
        def at(budget: float) -> list[tuple[bool, float]]:
            return tested(sums, self._own, self._alpha, enough_for(budget))

        def shown(rung: int) -> Callable[[float], bool]:
            return lambda budget: at(budget)[rung][0]

        rungs = []
        for rung, threshold in enumerate(self._grid):
            right, wrong = sums.right[rung], sums.wrong[rung]
            served = threshold >= table.threshold
            missing = 0 if served else self._shadow(table, rung).missing or 0
            rungs.append(Rung(threshold, right + wrong, wrong, smallest(shown(rung)), served, missing, self._bursts[rung].on))
        return rungs

    # -- how --------------------------------------------------------------------------------------------------------------

    def _heeded(self, label: Label) -> bool:
        if label.source == "feedback":
            return label.wrong
        return label.source != "imported" or self.policy.trust_imported

    def _rung(self, score: float) -> int | None:
        """The strictest threshold that the score reaches. A score that is none (NaN) reaches none."""
        if not self._grid[-1] <= score <= 1:
            return None
        return len(self._grid) - bisect_right(self._ascending, score)

    def _table(self, budget: float, now: float) -> _Table:
        pane = int(now // self.policy.pane_s)
        if pane != self._pane:
            self._pane = pane
            self._tables.clear()
        table = self._tables.get(budget)
        if table is None:
            self._fade(now)
            if len(self._tables) >= 64:  # every request may bring a budget of its own
                self._tables.clear()
            table = self._tables[budget] = self._tabulate(budget)
        return table

    def _fade(self, now: float) -> None:
        while self._panes:
            oldest = min(self._panes)
            old = (oldest + 1) * self.policy.pane_s <= now - self.policy.max_age_s
            if not old and self._counts.size - self._panes[oldest].size < self.policy.window:
                return
            self._counts.subtract(self._panes.pop(oldest))

    def _tabulate(self, budget: float) -> _Table:
        threshold, ladder = math.inf, None
        if budget >= SMALLEST_BUDGET:
            bursts = [burst.missing for burst in self._bursts]
            ladder = Ladder(self._counts.reaching(), bursts, own=self._own, alpha=self._alpha, budget=budget)
            if ladder.served is not None:
                threshold = self._grid[ladder.served]
        return _Table(ladder, threshold, self.policy.audit_share)

    def _shadow(self, table: _Table, rung: int | None) -> Shadow:
        if table.ladder is None or rung is None:
            return Shadow(table.inclusion, threshold=self._grid[-1])
        missing, by = table.ladder.missing(rung)
        right, wrong = sum(self._counts.right[: by + 1]), sum(self._counts.wrong[: by + 1])
        return Shadow(table.inclusion, missing, self._grid[by], right + wrong, wrong, self._bursts[by].on)


class _Table:
    """What one budget allows, until the next label."""

    __slots__ = ("audit", "inclusion", "ladder", "serve", "shadows", "threshold")

    def __init__(self, ladder: Ladder | None, threshold: float, audit_share: float) -> None:
        self.ladder = ladder
        self.threshold = threshold
        self.inclusion = 1.0 if threshold == math.inf else audit_share
        self.serve = Serve(threshold)
        self.audit = Audit(threshold, audit_share)
        self.shadows: dict[int | None, Shadow] = {}
