"""All strategies over the same arrivals, at several loads.

One trace is one draw: who happens to begin beside whom moves the tail by more than strategies differ at times. So the first
strategy is compared with each other one in two ways: over the same trace resampled in stretches, and over other draws.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random
from statistics import NormalDist, fmean, stdev

import msgspec

from anaphora.routing.base import Replica, Strategy
from anaphora.routing.round_robin import RoundRobin
from anaphora.routing.simulation import Arrival, Outcome, Speed, replay
from anaphora.routing.traces import scaled

_NUM_STRETCHES = 50
"""Requests that come close to one another wait for one another: they are drawn together."""
_NUM_RESAMPLES = 400
_TAIL = 0.9
_SURE = 0.95


class Share(msgspec.Struct, frozen=True):
    """The first strategy's time to the first token, 90 of 100 within, as a share of another one's."""

    share: float
    low: float
    high: float
    """Between `low` and `high` in 95 of 100 draws."""


class Figures(msgspec.Struct, frozen=True):
    strategy: str
    load: float | None
    """Share of the saturation rate. None: requests come when those before them are answered."""
    requests_per_s: float | None
    hit_rate: float
    """Prompt tokens that were found in a replica's cache."""
    first_p50_s: float
    first_p90_s: float
    first_p99_s: float
    whole_mean_s: float
    imbalance: float
    """Requests of the replica that got the most, in shares of the mean."""
    first_share: Share | None = None
    """None: it is the first strategy itself."""


class Comparison(msgspec.Struct, frozen=True):
    trace: str
    num_requests: int
    num_replicas: int
    saturation_per_s: float | None
    """The rate at which prefills alone fill the replicas' time if they are sent round robin. None: no rate is given."""
    speed: Speed
    rows: list[Figures]
    seed: int | None = None
    """Of a draw; None: as recorded."""


class Spread(msgspec.Struct, frozen=True):
    """What several draws of one trace say together."""

    trace: str
    load: float | None
    strategy: str
    num_draws: int
    hit_rate: float
    first_p50_s: float
    first_p90_s: float
    """The mean of each over the draws."""
    num_above: int
    """Of the draws, with a share above 1."""
    mean: Share | None
    """None: it is the first strategy itself."""


def compare(
    trace: str,
    arrivals: Sequence[Arrival],
    strategies: Mapping[str, Callable[[], Strategy]],
    *,
    loads: Sequence[float],
    num_replicas: int,
    speed: Speed,
    progress: Callable[[str], None],
    seed: int | None = None,
) -> Comparison:
    replicas = [Replica(f"replica-{number}", capacity_tokens=speed.capacity_tokens) for number in range(num_replicas)]
    speeds = {replica.name: speed for replica in replicas}
    saturation_per_s = None
    paces: list[tuple[float | None, float | None, Sequence[Arrival]]] = [(None, None, arrivals)]
    if all(arrival.after is None for arrival in arrivals):
        progress(f"{trace}: {len(arrivals)} requests, finding the saturation rate")
        recorded_per_s = len(arrivals) / max(arrivals[-1].at_s - arrivals[0].at_s, 1e-9)
        saturation_per_s = num_replicas * len(arrivals) / replay(arrivals, speeds, RoundRobin(), replicas).prefill_s
        rates = [(load, load * saturation_per_s) for load in loads]
        paces = [(load, per_s, scaled(arrivals, per_s / recorded_per_s)) for load, per_s in rates]
    rows = []
    for load, per_s, paced in paces:
        first: Sequence[Outcome] | None = None
        for name, strategy in strategies.items():
            progress(f"{trace}: {name}" if load is None else f"{trace}: load {load:.0%}, {name}")
            outcomes = replay(paced, speeds, strategy(), replicas).outcomes
            share = None if first is None else resampled(first, outcomes)
            first = first or outcomes
            rows.append(figures(name, load, per_s, outcomes, num_replicas, share))
    return Comparison(trace, len(arrivals), num_replicas, saturation_per_s, speed, rows, seed)


def resampled(first: Sequence[Outcome], other: Sequence[Outcome]) -> Share:
    """Of the same arrivals: stretches of them are drawn again and again, the same ones for both."""
    length = max(1, len(first) // _NUM_STRETCHES)
    stretches = [
        tuple(sorted(outcome.first_s for outcome in outcomes[begin : begin + length]) for outcomes in (first, other))
        for begin in range(0, len(first), length)
    ]
    rng = Random(1)
    shares = []
    for _ in range(_NUM_RESAMPLES):
        drawn = rng.choices(stretches, k=len(stretches))
        mine, its = ([first_s for stretch in drawn for first_s in stretch[which]] for which in (0, 1))
        shares.append(_tail(mine) / _tail(its))
    shares.sort()
    whole = _tail([outcome.first_s for outcome in first]) / _tail([outcome.first_s for outcome in other])
    margin = (1 - _SURE) / 2
    return Share(*(round(share, 4) for share in (whole, _quantile(shares, margin), _quantile(shares, 1 - margin))))


def spreads(draws: Sequence[Comparison]) -> list[Spread]:
    """Over draws of one trace: the geometric mean of the shares, and where it lies with 95 %. Empty for fewer than three."""
    if len(draws) < 3:
        return []
    found: dict[tuple[float | None, str], list[Figures]] = {}
    for row in (row for draw in draws for row in draw.rows):
        found.setdefault((row.load, row.strategy), []).append(row)
    told = []
    for (load, strategy), rows in found.items():
        shares = [row.first_share.share for row in rows if row.first_share is not None]
        told.append(
            Spread(
                draws[0].trace,
                load,
                strategy,
                len(rows),
                round(fmean(row.hit_rate for row in rows), 4),
                round(fmean(row.first_p50_s for row in rows), 4),
                round(fmean(row.first_p90_s for row in rows), 4),
                sum(share > 1 for share in shares),
                _mean(shares),
            )
        )
    return told


def _mean(shares: Sequence[float]) -> Share | None:
    if not shares:
        return None
    logarithms = [math.log(share) for share in shares]
    mean = fmean(logarithms)
    # Draws are few: the normal quantile, widened as Student's is to its first order.
    sure = NormalDist().inv_cdf((1 + _SURE) / 2)
    sure += (sure**3 + sure) / (4 * (len(shares) - 1))
    margin = sure * stdev(logarithms) / math.sqrt(len(shares))
    return Share(*(round(math.exp(value), 4) for value in (mean, mean - margin, mean + margin)))


def _tail(first_s: Sequence[float]) -> float:
    return _quantile(sorted(first_s), _TAIL)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[int((len(ordered) - 1) * share)]


def figures(
    strategy: str,
    load: float | None,
    requests_per_s: float | None,
    outcomes: Sequence[Outcome],
    num_replicas: int,
    first_share: Share | None = None,
) -> Figures:
    first = sorted(outcome.first_s for outcome in outcomes)
    counts = Counter(outcome.replica for outcome in outcomes)
    p50, p90, p99 = (round(_quantile(first, share), 4) for share in (0.5, _TAIL, 0.99))
    return Figures(
        strategy,
        load,
        None if requests_per_s is None else round(requests_per_s, 4),
        round(sum(outcome.cached_tokens for outcome in outcomes) / sum(outcome.num_tokens for outcome in outcomes), 4),
        p50,
        p90,
        p99,
        round(sum(outcome.whole_s for outcome in outcomes) / len(outcomes), 4),
        round(max(counts.values()) * num_replicas / len(outcomes), 3),
        first_share,
    )
