from __future__ import annotations

from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anaphora.routing.rates import Decaying, Factor, Rates, gathered_s


def test_rates_are_found_whatever_was_thought_before() -> None:
    rng = Random(1)
    rates = Rates((1.0, 1.0), (1.0, 1.0))
    for _ in range(300):
        n = rng.uniform(0.1, 10)
        rates.add((1.0, n), (0.02 + 0.005 * n) * rng.uniform(0.9, 1.1))
    assert rates((1.0, 5.0)) == pytest.approx(0.045, rel=0.1)
    assert rates((1.0, 0.5)) == pytest.approx(0.0225, rel=0.1)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(0, 1000)), max_size=30))
@example([(0.0, 2e-157, 1.0)])
def test_no_rate_is_ever_negative(observations: list[tuple[float, float, float]]) -> None:
    rates = Rates((0.1, 0.1), (1.0, 1.0))
    for one, other, y in observations:
        rates.add((one, other), y)
        assert min(rates.rates) >= 0


@given(st.floats(1e-3, 1e3), st.floats(0, 10), st.floats(0.1, 10))
def test_one_observation_says_how_fast_everything_is(times: float, one: float, other: float) -> None:
    rates = Rates((0.01, 0.05, 0.002), (1.0, 2.0, 2.0))
    rates.add((one, other, 0.0), times * (0.01 * one + 0.05 * other))
    for features in ((1.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 5.0)):  # of the last one nothing was said
        prior = 0.01 * features[0] + 0.05 * features[1] + 0.002 * features[2]
        assert rates(features) == pytest.approx(times * prior, rel=1e-3)


def test_a_rate_that_has_nothing_to_do_with_speed_stays_where_it_is() -> None:
    rates = Rates((0.01, 0.5), (1.0, 0.005), fixed=(1,))
    rates.add((1.0, 0.0), 1.0)
    assert rates((0.0, 1.0)) == pytest.approx(0.5)
    assert rates((1.0, 0.0)) == pytest.approx(1.0)


def test_what_was_added_fades() -> None:
    sum_ = Decaying(10.0)
    sum_.add(8.0, 0.0)
    assert sum_(0.0) == 8.0
    assert sum_(10.0) == pytest.approx(8 / 2.718281828)
    sum_.add(1.0, 1000.0)
    assert sum_(1000.0) == pytest.approx(1.0)


@given(st.floats(1, 1000), st.floats(0.1, 5000))
def test_even_traffic_gathers_to_what_it_is_divided_by(time_s: float, watched_s: float) -> None:
    recent, parts = Decaying(time_s), 500
    for part in range(1, parts + 1):
        recent.add(watched_s / parts, watched_s * part / parts)
    assert recent(watched_s) == pytest.approx(gathered_s(time_s, watched_s), rel=0.01 + watched_s / parts / time_s)


def test_replicas_that_are_alike_but_for_chance_stay_alike() -> None:
    rng = Random(2)
    pool, own = Factor(0.998), Factor()
    for number in range(400):
        took = rng.lognormvariate(0, 0.5)
        pool.add(1.0, took)
        if number % 4 == 0:
            own.add(1.0, took)
    assert own.beside(pool) == pytest.approx(1.0, abs=0.1)


def test_one_that_takes_twice_as_long_is_known_after_a_few_answers() -> None:
    pool, own = Factor(0.998), Factor()
    for _ in range(100):
        pool.add(1.0, 1.0)
    for _ in range(12):
        own.add(1.0, 2.0)
    assert 1.5 < own.beside(pool) <= 2.0
