from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anaphora.routing.comparison import Comparison, Share, compare, figures, resampled, spreads
from anaphora.routing.expected import Expected
from anaphora.routing.round_robin import RoundRobin
from anaphora.routing.simulation import Outcome, Speed
from anaphora.routing.traces import generated, sessions

SPEED = Speed(step_s=0.01, token_s=1e-4, position_s=0.0, context_s=0.0, chunk_tokens=1000, capacity_tokens=100_000)


def outcomes(first_s: list[float]) -> list[Outcome]:
    return [Outcome("a", 10, 0, seconds, seconds) for seconds in first_s]


def draw(shares: list[tuple[float, str, float]]) -> Comparison:
    rows = [figures(name, load, 1.0, outcomes([1.0]), 1, Share(share, share, share)) for load, name, share in shares]
    return Comparison("generated", 1, 1, 1.0, SPEED, rows)


MINE = figures("expected", 0.5, 1.0, outcomes([1.0]), 1)

seconds = st.floats(0.001, 1000.0)


@given(st.lists(seconds, min_size=1, max_size=200))
@settings(max_examples=20)
def test_a_strategy_beside_itself_is_no_different_in_any_draw(first_s: list[float]) -> None:
    assert resampled(outcomes(first_s), outcomes(first_s)) == Share(1.0, 1.0, 1.0)


@given(st.lists(seconds, min_size=1, max_size=200), st.floats(0.1, 10.0))
@settings(max_examples=20)
def test_what_is_slower_by_the_same_factor_everywhere_is_slower_by_it_in_every_draw(first_s: list[float], times: float) -> None:
    share = resampled(outcomes([times * one for one in first_s]), outcomes(first_s))
    assert (share.share, share.low, share.high) == pytest.approx((times, times, times), abs=1e-4)


def test_a_difference_that_a_few_requests_make_is_within_what_draws_differ_by() -> None:
    even = [1.0] * 890 + [2.0] * 110
    few = [1.0] * 850 + [2.0] * 45 + [3.0] * 105  # the slowest tenth begins beside the other's
    share = resampled(outcomes(few), outcomes(even))
    assert share.low <= 1.0 <= share.share <= share.high
    assert share.high > 1.2


def test_several_draws_have_a_mean_with_an_interval_and_few_have_none() -> None:
    draws = [draw([(0.5, "prefix", share), (0.5, "usage", 0.5)]) for share in (0.8, 1.25, 1.0, 1.0)]
    own, about_prefix, about_usage = spreads([msgspec.structs.replace(one, rows=[MINE, *one.rows]) for one in draws])
    assert (own.strategy, own.num_draws, own.first_p50_s, own.mean) == ("expected", 4, 1.0, None)
    assert about_prefix.mean is not None
    assert (about_prefix.strategy, about_prefix.num_draws, about_prefix.num_above) == ("prefix", 4, 1)
    assert about_prefix.mean.share == pytest.approx(1.0)
    assert about_prefix.mean.low < 0.85
    assert about_prefix.mean.high > 1.15
    assert about_usage.mean == Share(0.5, 0.5, 0.5)
    assert spreads(draws[:2]) == []


def test_the_first_strategy_is_compared_with_every_other_one_at_every_load() -> None:
    strategies = {"expected": Expected, "round-robin": RoundRobin}
    done = compare(
        "generated",
        generated(10),
        strategies,
        loads=(0.5, 0.9),
        num_replicas=2,
        speed=Speed(),
        progress=lambda step: None,
        seed=7,
    )
    assert done.seed == 7
    assert [(row.strategy, row.first_share is None) for row in done.rows] == [("expected", True), ("round-robin", False)] * 2
    for mine, its in (done.rows[:2], done.rows[2:]):
        assert its.first_share is not None
        assert its.first_share.share == pytest.approx(mine.first_p90_s / its.first_p90_s, rel=0.01)
        assert its.first_share.low <= its.first_share.high


def test_sessions_have_no_rate_and_are_replayed_as_they_are() -> None:
    strategies = {"expected": Expected, "round-robin": RoundRobin}
    done = compare(
        "sessions", sessions(4), strategies, loads=(0.5, 0.9), num_replicas=2, speed=Speed(), progress=lambda step: None
    )
    assert done.saturation_per_s is None
    assert [(row.strategy, row.load) for row in done.rows] == [("expected", None), ("round-robin", None)]
