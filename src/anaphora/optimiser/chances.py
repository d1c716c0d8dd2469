"""How likely something comes back, and how soon, from what was seen so far: survival by steps of time.

A prefix that was not asked for again yet says little after ten seconds and much after an hour. So what is counted is, for each
step of time, how often something was still awaited when the step began and how often it came within it. The product over the
steps is the chance of coming within a lifetime, and what is still awaited counts for the steps it has lived through.
"""

from __future__ import annotations

from collections.abc import Iterable

EDGES_S = (15.0, 60.0, 300.0, 1800.0, 3600.0, 43200.0)
"""Ends of the steps: every lifetime of `prompt.TTL_S` is one of them."""
STEPS = len(EDGES_S)
REMEMBERED = 256.0
"""Observations of one step, at most: older ones fade, so that a tenant may change its ways."""

Hazards = tuple[float, ...]
"""For each step: the chance of coming in it, for what has not come before."""
NEVER: Hazards = (0.0,) * STEPS


class Chance:
    """What was counted of one kind of thing."""

    __slots__ = ("awaited", "came")

    def __init__(self) -> None:
        self.awaited = [0.0] * STEPS
        self.came = [0.0] * STEPS

    def count(self, step: int, *, came: bool) -> None:
        if self.awaited[step] >= REMEMBERED:
            self.awaited[step] /= 2
            self.came[step] /= 2
        self.awaited[step] += 1
        self.came[step] += came


def expected(soon: float, later: float = 0.02) -> Hazards:
    """Before anything was seen: `soon` is the chance of coming within five minutes, `later` that of each later step."""
    each = 1.0 - (1.0 - soon) ** (1 / 3)
    return (each, each, each, later, later, later)


def shrunk(prior: Hazards, levels: Iterable[Chance | None], strength: float) -> Hazards:
    """From the general to the specific: each level has as much say as it has observations, against `strength` of the last."""
    hazards = prior
    for level in levels:
        if level is not None:
            pairs = zip(hazards, level.came, level.awaited, strict=True)
            hazards = tuple((strength * hazard + came) / (strength + awaited) for hazard, came, awaited in pairs)
    return hazards


def within(hazards: Hazards, seconds: float, since_s: float = 0.0) -> float:
    """The chance of coming before `seconds` have passed, for what has not come in the first `since_s`."""
    stays, start = 1.0, 0.0
    for hazard, end in zip(hazards, EDGES_S, strict=True):
        if start >= seconds:
            break
        if end > since_s:
            share = (min(end, seconds) - max(start, since_s)) / (end - start)
            stays *= (1.0 - hazard) ** share
        start = end
    return 1.0 - stays
