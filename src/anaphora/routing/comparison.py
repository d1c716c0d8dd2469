"""All strategies over the same arrivals, at several loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec

from anaphora.routing.base import Replica, Strategy
from anaphora.routing.round_robin import RoundRobin
from anaphora.routing.simulation import Arrival, Outcome, Speed, replay
from anaphora.routing.traces import scaled


class Figures(msgspec.Struct, frozen=True):
    strategy: str
    load: float
    """Share of the saturation rate."""
    requests_per_s: float
    hit_rate: float
    """Prompt tokens that were found in a replica's cache."""
    first_p50_s: float
    first_p90_s: float
    first_p99_s: float
    whole_mean_s: float
    imbalance: float
    """Requests of the replica that got the most, in shares of the mean."""


class Comparison(msgspec.Struct, frozen=True):
    trace: str
    num_requests: int
    num_replicas: int
    saturation_per_s: float
    """The rate at which prefills alone fill the replicas' time if they are sent round robin."""
    speed: Speed
    rows: list[Figures]


def compare(
    trace: str,
    arrivals: Sequence[Arrival],
    strategies: Mapping[str, Callable[[], Strategy]],
    *,
    loads: Sequence[float],
    num_replicas: int,
    speed: Speed,
    progress: Callable[[str], None],
) -> Comparison:
    replicas = [Replica(f"replica-{number}", capacity_tokens=speed.capacity_tokens) for number in range(num_replicas)]
    speeds = {replica.name: speed for replica in replicas}
    progress(f"{trace}: {len(arrivals)} requests, finding the saturation rate")
    recorded_per_s = len(arrivals) / max(arrivals[-1].at_s - arrivals[0].at_s, 1e-9)
    saturation_per_s = num_replicas * len(arrivals) / replay(arrivals, speeds, RoundRobin(), replicas).prefill_s
    rows = []
    for load in loads:
        paced = scaled(arrivals, load * saturation_per_s / recorded_per_s)
        for name, strategy in strategies.items():
            progress(f"{trace}: load {load:.0%}, {name}")
            outcomes = replay(paced, speeds, strategy(), replicas).outcomes
            rows.append(figures(name, load, load * saturation_per_s, outcomes, num_replicas))
    return Comparison(trace, len(arrivals), num_replicas, saturation_per_s, speed, rows)


def figures(strategy: str, load: float, requests_per_s: float, outcomes: Sequence[Outcome], num_replicas: int) -> Figures:
    first = sorted(outcome.first_s for outcome in outcomes)
    counts = Counter(outcome.replica for outcome in outcomes)
    p50, p90, p99 = (round(first[int((len(first) - 1) * share)], 4) for share in (0.5, 0.9, 0.99))
    return Figures(
        strategy,
        load,
        round(requests_per_s, 4),
        round(sum(outcome.cached_tokens for outcome in outcomes) / sum(outcome.num_tokens for outcome in outcomes), 4),
        p50,
        p90,
        p99,
        round(sum(outcome.whole_s for outcome in outcomes) / len(outcomes), 4),
        round(max(counts.values()) * num_replicas / len(outcomes), 3),
    )
