"""Every strategy keeps the contract; and the rules of the simple ones."""

from __future__ import annotations

import pytest

from anaphora.registry import ROUTING
from anaphora.routing.base import Replica, Strategy
from anaphora.routing.expected import Expected
from anaphora.routing.latency import Latency
from anaphora.routing.least_busy import LeastBusy
from anaphora.routing.prefix import MAX_GAP, Prefix
from anaphora.routing.round_robin import RoundRobin
from anaphora.routing.usage import WINDOW_S, Usage
from anaphora.testing.routing import StrategyContract, chain, fleet


class TestExpected(StrategyContract):
    def make(self) -> Strategy:
        return Expected()


class TestRoundRobin(StrategyContract):
    def make(self) -> Strategy:
        return RoundRobin()


class TestLeastBusy(StrategyContract):
    def make(self) -> Strategy:
        return LeastBusy()


class TestUsage(StrategyContract):
    def make(self) -> Strategy:
        return Usage()


class TestLatency(StrategyContract):
    def make(self) -> Strategy:
        return Latency()

    def test_requests_that_never_overlap_and_share_nothing_are_spread(self) -> None:
        pytest.skip("whoever is fastest gets everything, even by chance: what this strategy is known for")


class TestPrefix(StrategyContract):
    def make(self) -> Strategy:
        return Prefix()


def send(strategy: Strategy, replicas: list[Replica], number: int, name: str, now_s: float = 0.0) -> str:
    asked = chain(name, 10)
    choice = strategy.pick(asked, replicas, now_s)
    assert choice is not None
    strategy.began(number, asked, choice, now_s)
    return choice.replica


def test_every_registered_strategy_can_be_made() -> None:
    for name in ROUTING.builtin:
        assert ROUTING.load(name)().pick(chain("a", 1), fleet("one"), 0.0).replica == "one"


def test_round_robin_takes_turns_even_while_replicas_come_and_go() -> None:
    strategy, replicas = RoundRobin(), fleet("one", "two", "three")
    assert [send(strategy, replicas, number, "a") for number in range(4)] == ["one", "two", "three", "one"]
    assert [send(strategy, replicas[:2], number, "a") for number in range(4, 7)] == ["two", "one", "two"]


def test_the_least_busy_is_whoever_has_the_fewest_requests_on_their_way() -> None:
    strategy, replicas = LeastBusy(), fleet("one", "two")
    first, second = send(strategy, replicas, 1, "a"), send(strategy, replicas, 2, "b")
    assert {first, second} == {"one", "two"}
    strategy.ended(2, 1.0, output_tokens=5)
    assert send(strategy, replicas, 3, "c") == second


def test_usage_forgets_tokens_after_a_minute() -> None:
    strategy, replicas = Usage(), fleet("one", "two")
    assert send(strategy, replicas, 1, "a", 0.0) == "one"
    assert send(strategy, replicas, 2, "b", 1.0) == "two"
    strategy.ended(1, 2.0, output_tokens=5)
    assert send(strategy, replicas, 3, "c", 3.0) == "two"
    assert send(strategy, replicas, 4, "d", 3.0 + WINDOW_S) == "one"


def test_latency_takes_the_fastest_after_trying_everybody_and_flees_from_failures() -> None:
    strategy, replicas = Latency(), fleet("one", "two")
    assert send(strategy, replicas, 1, "a") == "one"
    strategy.ended(1, 1.0, output_tokens=10)
    assert send(strategy, replicas, 2, "b") == "two"
    strategy.ended(2, 5.0, output_tokens=10)
    assert send(strategy, replicas, 3, "c") == "one"
    strategy.failed(3, 6.0)
    assert send(strategy, replicas, 4, "d") == "two"


def test_prefix_stays_with_the_longest_match_until_the_fleet_is_out_of_balance() -> None:
    strategy, replicas = Prefix(), fleet("one", "two")
    places = [send(strategy, replicas, number, "a") for number in range(MAX_GAP + 3)]
    assert set(places[: MAX_GAP + 1]) == {places[0]}
    assert places[MAX_GAP + 1] != places[0]


def test_prefix_does_not_follow_a_short_beginning_that_everybody_shares() -> None:
    strategy, replicas = Prefix(), fleet("one", "two")
    first, second = chain("a", 10, shared=1), chain("b", 10, shared=1)
    choice = strategy.pick(first, replicas, 0.0)
    assert choice is not None
    strategy.began(1, first, choice, 0.0)
    other = strategy.pick(second, replicas, 0.0)
    assert other is not None
    assert other.replica != choice.replica
