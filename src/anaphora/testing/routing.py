"""What every strategy of routing owes its callers, as tests to inherit.

class TestMyStrategy(StrategyContract):
    def make(self) -> Strategy:
        return MyStrategy()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import hypothesis.strategies as st
import msgspec
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from anaphora.routing.base import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    CacheEvent,
    Load,
    Question,
    Replica,
    Strategy,
    question,
)
from anaphora.routing.router import Route, Router
from anaphora.types import BlockHash

BLOCK = 64


def chain(name: str, num_blocks: int, *, shared: int = 0, tokens: int | None = None) -> Question:
    """A prompt of `num_blocks` blocks; the first `shared` of them are those of every prompt that shares as many."""
    names = [f"shared/{index}" if index < shared else f"{name} after {shared}/{index}" for index in range(num_blocks)]
    return question([BlockHash(text.encode()) for text in names], BLOCK, tokens or num_blocks * BLOCK + 10)


def fleet(*names: str, capacity_tokens: int | None = 10_000) -> list[Replica]:
    return [Replica(name, capacity_tokens=capacity_tokens) for name in names]


class StrategyContract:
    """Inherit, and say how a strategy that knows nothing yet is made."""

    def make(self) -> Strategy:
        raise NotImplementedError

    def test_somebody_is_picked_where_anybody_is_open(self) -> None:
        choice = self.make().pick(chain("a", 3), fleet("one", "two"), 0.0)
        assert choice is not None
        assert choice.replica in ("one", "two")

    def test_nobody_is_picked_where_nobody_is_open(self) -> None:
        strategy = self.make()
        one, two = fleet("one", "two")
        closed = [msgspec.structs.replace(one, healthy=False), msgspec.structs.replace(two, draining=True)]
        assert strategy.pick(chain("a", 3), closed, 0.0) is None
        assert strategy.pick(chain("a", 3), [], 0.0) is None

    def test_picking_changes_nothing(self) -> None:
        strategy = self.make()
        replicas = fleet("one", "two", "three")
        assert len({str(strategy.pick(chain("a", 3), replicas, 0.0)) for _ in range(5)}) == 1

    def test_requests_that_never_overlap_and_share_nothing_are_spread(self) -> None:
        """The number of requests on their way is always zero then, and must not be all that counts."""
        strategy = self.make()
        replicas = fleet("one", "two", "three")
        counts: dict[str, int] = {}
        for number in range(60):
            now_s = 10.0 * number
            asked = chain(f"stranger {number}", 4)
            choice = strategy.pick(asked, replicas, now_s)
            assert choice is not None
            strategy.began(number, asked, choice, now_s)
            strategy.first_token(number, now_s + 0.1)
            strategy.ended(number, now_s + 1.0, output_tokens=50, cached_tokens=0)
            counts[choice.replica] = counts.get(choice.replica, 0) + 1
        assert set(counts) == {"one", "two", "three"}
        assert max(counts.values()) <= 40

    def test_whatever_happens_the_books_balance(self) -> None:
        make: Callable[[], Strategy] = self.make

        class Machine(_Machine):
            @initialize()
            def begin(self) -> None:
                self.strategy = make()
                self.router = Router(self.strategy, fleet("r0", "r1"))

        run_state_machine_as_test(
            Machine,
            settings=settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)),
        )


class _Machine(RuleBasedStateMachine):
    """Random histories of a fleet; the router is the only way in."""

    strategy: Strategy
    router: Router

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.routes: list[Route] = []
        self.number = 0

    @rule(
        name=st.sampled_from("abcdef"),
        num_blocks=st.integers(0, 40),
        shared=st.integers(0, 8),
        output_tokens=st.integers(0, 500),
        session=st.none() | st.sampled_from(("s-1", "s-12")),
        priority=st.integers(-1, 1),
    )
    def ask(self, name: str, num_blocks: int, shared: int, output_tokens: int, session: str | None, priority: int) -> None:
        asked = msgspec.structs.replace(
            chain(name, num_blocks, shared=shared), output_tokens=output_tokens, session=session, priority=priority
        )
        route = self.router.route(asked, self.now_s)
        open_names = {replica.name for replica in self.router.replicas if replica.open}
        if route is None:
            assert not open_names
            return
        assert route.replica in open_names
        assert 0 <= route.choice.cached_tokens <= asked.num_tokens
        self.routes.append(route)

    @precondition(lambda self: bool(self.routes))
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.routes)).first_token(self.now_s)

    @precondition(lambda self: bool(self.routes))
    @rule(data=st.data(), output_tokens=st.integers(0, 1000), cached=st.none() | st.integers(0, 5000), again=st.booleans())
    def end(self, data: st.DataObject, output_tokens: int, cached: int | None, again: bool) -> None:
        route = data.draw(st.sampled_from(self.routes))
        route.ended(self.now_s, output_tokens=output_tokens, cached_tokens=cached)
        if again:
            route.failed(self.now_s)
        self.routes.remove(route)

    @precondition(lambda self: bool(self.routes))
    @rule(data=st.data(), fault=st.booleans())
    def fail(self, data: st.DataObject, fault: bool) -> None:
        route = data.draw(st.sampled_from(self.routes))
        route.failed(self.now_s, fault=fault)
        route.first_token(self.now_s)
        self.routes.remove(route)

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(capacity=st.none() | st.integers(0, 5000))
    def add(self, capacity: int | None) -> None:
        self.number += 1
        name = f"r{self.number % 4}"
        self.router.add(Replica(name, capacity_tokens=capacity, started_s=self.now_s))

    @precondition(lambda self: bool(self.router.replicas))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.router.remove(data.draw(st.sampled_from([replica.name for replica in self.router.replicas])))

    @precondition(lambda self: bool(self.router.replicas))
    @rule(data=st.data(), healthy=st.booleans(), draining=st.booleans())
    def change(self, data: st.DataObject, healthy: bool, draining: bool) -> None:
        name = data.draw(st.sampled_from([replica.name for replica in self.router.replicas]))
        self.router.change(name, healthy=healthy, draining=draining)

    @rule(name=st.sampled_from(("r0", "r1", "r2", "gone")), running=st.integers(0, 50), waiting=st.integers(0, 50))
    def report(self, name: str, running: int, waiting: int) -> None:
        self.router.load(name, Load(running, waiting), self.now_s)

    @rule(name=st.sampled_from(("r0", "r1", "gone")), which=st.integers(0, 3), medium=st.sampled_from(("", "cpu")))
    def tell(self, name: str, which: int, medium: str) -> None:
        blocks = chain("a", 6).blocks
        events: Sequence[Sequence[CacheEvent]] = (
            [BlocksStored(blocks, (BLOCK,) * 6, medium)],
            [BlocksRemoved(blocks[3:], medium)],
            [BlocksCleared()],
            [],
        )
        self.router.events(name, events[which], self.now_s)

    @invariant()
    def every_request_is_on_its_way_once(self) -> None:
        if not hasattr(self, "router"):
            return
        counts: dict[str, int] = {}
        for route in self.routes:
            counts[route.replica] = counts.get(route.replica, 0) + 1
        assert {name: self.router.in_flight(name) for name in counts} == counts
        in_flight = getattr(self.strategy, "in_flight", None)
        if in_flight is not None:
            assert len(in_flight) == len(self.routes)
