"""One computation per question, every client a live subscriber. Interleavings are forced with gates, never with time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from anaphora.errors import BackendFailed, EngineDied
from anaphora.flight import AHEAD, Flights, Subscription
from anaphora.transcript import collect
from anaphora.types import Begin, Completion, Delta, End, Finish, TextDelta, Usage

ANSWER: list[Delta] = [
    Begin("m", Usage(input_tokens=1)),
    TextDelta(0, "one "),
    TextDelta(0, "two"),
    Finish(0, "end_turn"),
    End(Usage(input_tokens=1, output_tokens=2)),
]


class Script:
    """A computation that says its next delta only when told to."""

    def __init__(self, deltas: list[Delta] = ANSWER) -> None:
        self.deltas = deltas
        self.runs = 0
        self.closed = asyncio.Event()
        self.learned: list[Completion] = []
        self.learning = asyncio.Event()
        self.may_learn = asyncio.Event()
        self.may_learn.set()
        self._go: asyncio.Queue[BaseException | None] = asyncio.Queue()

    def say(self, count: int = 1) -> None:
        for _ in range(count):
            self._go.put_nowait(None)

    def fail(self, error: BaseException) -> None:
        self._go.put_nowait(error)

    async def start(self) -> AsyncIterator[Delta]:
        self.runs += 1
        try:
            for delta in self.deltas:
                error = await self._go.get()
                if error is not None:
                    raise error
                yield delta
        finally:
            await asyncio.sleep(0)  # a backend that needs the loop to tidy up
            self.closed.set()

    async def landed(self, completion: Completion) -> None:
        self.learning.set()
        await self.may_learn.wait()
        self.learned.append(completion)

    def join(self, flights: Flights, key: str | None = "k") -> Subscription:
        return flights.join(key, self.start, self.landed)


async def rest(subscription: Subscription) -> list[Delta]:
    return [delta async for delta in subscription]


def test_fifty_subscribers_share_one_computation_and_each_gets_all_of_it() -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        subscriptions = [script.join(flights) for _ in range(50)]
        assert [subscription.collapsed for subscription in subscriptions] == [False] + [True] * 49
        script.say(5)
        assert await asyncio.gather(*map(rest, subscriptions)) == [ANSWER] * 50
        await flights.drain()
        assert script.runs == 1
        assert script.learned == [collect(ANSWER)]

    asyncio.run(run())


def test_what_a_computation_says_at_once_is_heard_at_once() -> None:
    async def bursts() -> AsyncIterator[list[Delta]]:
        for burst in (ANSWER[:2], ANSWER[2:]):
            await asyncio.sleep(0)
            yield burst

    async def run() -> None:
        flights, script = Flights(), Script()
        subscription = flights.join("k", bursts, script.landed)
        assert [await subscription.burst() for _ in range(3)] == [ANSWER[:2], ANSWER[2:], []]
        await flights.drain()
        assert script.learned == [collect(ANSWER)]

    asyncio.run(run())


def test_who_joins_later_gets_what_was_said_and_then_the_live_rest() -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        first = script.join(flights)
        script.say(3)
        head = [await anext(first) for _ in range(3)]
        late = script.join(flights)
        assert [await anext(late) for _ in range(3)] == head == ANSWER[:3]
        live = asyncio.create_task(rest(late))
        await asyncio.sleep(0)
        assert not live.done()
        script.say(2)
        assert await live == ANSWER[3:]
        assert await rest(first) == ANSWER[3:]

    asyncio.run(run())


def test_who_joins_after_the_end_while_it_is_being_learned_gets_everything() -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        script.may_learn.clear()
        first = script.join(flights)
        script.say(5)
        assert await rest(first) == ANSWER, "nobody waits for the learning"
        await script.learning.wait()
        late = script.join(flights)
        assert late.collapsed
        assert await rest(late) == ANSWER
        script.may_learn.set()
        await flights.drain()
        assert script.runs == 1
        assert len(script.learned) == 1
        assert not script.join(flights).collapsed
        await flights.aclose()

    asyncio.run(run())


def test_the_leader_going_away_harms_nobody() -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        leader, follower = script.join(flights), script.join(flights)
        script.say(2)
        assert [await anext(follower) for _ in range(2)] == ANSWER[:2]
        leader.leave()
        script.say(3)
        assert await rest(follower) == ANSWER[2:]
        await flights.drain()
        assert len(script.learned) == 1

    asyncio.run(run())


def test_the_last_one_leaving_cancels_the_computation_and_nothing_is_learned() -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        first, second = script.join(flights), script.join(flights)
        script.say(4)  # everything but End
        assert [await anext(first) for _ in range(4)] == ANSWER[:4]
        first.leave()
        first.leave()
        await asyncio.sleep(0)
        assert not script.closed.is_set(), "leaving twice counts once"
        second.leave()
        await script.closed.wait()
        await flights.drain()
        assert script.learned == []

    asyncio.run(run())


def test_who_asks_after_the_last_one_left_gets_a_new_computation() -> None:
    async def run() -> None:
        flights, dying, fresh = Flights(), Script(), Script()
        first = dying.join(flights)
        dying.say()
        await anext(first)
        first.leave()
        assert not dying.closed.is_set(), "the old computation is still unwinding"
        second = fresh.join(flights)
        assert not second.collapsed
        fresh.say(5)
        assert await rest(second) == ANSWER
        await flights.drain()
        assert fresh.learned == [collect(ANSWER)]
        assert dying.learned == []

    asyncio.run(run())


def test_leaving_ends_a_wait_at_once() -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        leaver, other = script.join(flights), script.join(flights)
        waiting = asyncio.create_task(rest(leaver))
        await asyncio.sleep(0)
        leaver.leave()
        assert await waiting == []
        script.say(5)
        assert await rest(other) == ANSWER

    asyncio.run(run())


def test_a_burst_is_everything_that_was_not_read_yet() -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        reader, pace = script.join(flights), script.join(flights)
        script.say(3)
        assert [await anext(pace) for _ in range(3)] == ANSWER[:3]
        assert await reader.burst() == ANSWER[:3]
        script.say(2)
        assert await rest(pace) == ANSWER[3:]
        assert await reader.burst() == ANSWER[3:]
        assert await reader.burst() == []

    asyncio.run(run())


def test_leaving_before_the_computation_began_never_begins_it() -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        script.join(flights).leave()
        await flights.drain()
        assert script.runs == 0

    asyncio.run(run())


def test_leaving_after_the_end_does_not_stop_the_learning() -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        script.may_learn.clear()
        only = script.join(flights)
        script.say(5)
        await script.learning.wait()
        only.leave()  # without having read a single delta
        script.may_learn.set()
        await flights.drain()
        assert len(script.learned) == 1

    asyncio.run(run())


def test_a_failure_reaches_every_subscriber_after_what_was_said_before_it() -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        subscriptions = [script.join(flights) for _ in range(3)]
        script.say(2)
        script.fail(EngineDied("gone"))
        for subscription in subscriptions:
            assert [await anext(subscription) for _ in range(2)] == ANSWER[:2]
            with pytest.raises(EngineDied, match="gone"):
                await anext(subscription)
        await flights.drain()
        assert script.learned == []
        assert not script.join(flights).collapsed, "a failed flight is not joined"
        await flights.aclose()

    asyncio.run(run())


def test_an_answer_that_ends_without_end_is_an_error_and_is_not_learned() -> None:
    async def run() -> None:
        flights, script = Flights(), Script(ANSWER[:-1])
        only = script.join(flights)
        script.say(4)
        with pytest.raises(BackendFailed, match="cut off"):
            await rest(only)
        await flights.drain()
        assert script.learned == []

    asyncio.run(run())


def test_a_bug_in_a_backend_wakes_its_subscribers_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        only = script.join(flights)
        script.fail(ZeroDivisionError("bug"))
        with pytest.raises(ZeroDivisionError):
            await rest(only)

    asyncio.run(run())
    assert "unexpectedly" in caplog.text


def test_a_slow_subscriber_stalls_neither_the_others_nor_the_computation() -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        slow, quick = script.join(flights), script.join(flights)
        script.say(5)
        assert await rest(quick) == ANSWER
        await flights.drain()
        assert await rest(slow) == ANSWER, "it still gets all of it, long after the landing"

    asyncio.run(run())


def test_a_cancelled_subscriber_wakes_nobody_wrongly() -> None:
    async def run() -> None:
        flights, script = Flights(), Script()
        first, second = script.join(flights), script.join(flights)
        waiting = asyncio.create_task(rest(first))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        first.leave()
        script.say(5)
        assert await rest(second) == ANSWER

    asyncio.run(run())


def test_without_a_key_nothing_is_shared() -> None:
    async def run() -> None:
        flights, one, two = Flights(), Script(), Script()
        subscriptions = [one.join(flights, None), two.join(flights, None)]
        one.say(5)
        two.say(5)
        assert await asyncio.gather(*map(rest, subscriptions)) == [ANSWER] * 2
        assert (one.runs, two.runs) == (1, 1)

    asyncio.run(run())


def test_closing_cancels_what_flies_and_lets_what_ended_be_learned() -> None:
    async def run() -> None:
        flights, flying, ended = Flights(), Script(), Script()
        ended.may_learn.clear()
        flying_subscription = flying.join(flights, "a")
        ended.join(flights, "b")
        flying.say()
        ended.say(5)
        await anext(flying_subscription)
        await ended.learning.wait()
        closing = asyncio.create_task(flights.aclose())
        await flying.closed.wait()
        ended.may_learn.set()
        await closing
        assert len(flights) == 0
        assert len(ended.learned) == 1
        with pytest.raises(BackendFailed):
            await anext(flying_subscription)

    asyncio.run(run())


def test_a_computation_waits_where_nobody_takes_what_it_says() -> None:
    async def run() -> None:
        long: list[Delta] = [ANSWER[0], *[TextDelta(0, "word ")] * (3 * AHEAD), *ANSWER[3:]]
        said = 0

        async def start() -> AsyncIterator[Delta]:
            nonlocal said
            for delta in long:
                said += 1
                yield delta

        async def landed(completion: Completion) -> None:
            pass

        flights = Flights()
        slow, fast = flights.join("k", start, landed), flights.join("k", start, landed)
        for _ in range(10):
            await asyncio.sleep(0)
        assert said == AHEAD
        assert len(await fast.burst()) == AHEAD
        for _ in range(10):
            await asyncio.sleep(0)
        assert said == 2 * AHEAD  # as far ahead of the fastest one; the other one holds nobody up
        assert list(await asyncio.gather(rest(fast), rest(slow))) == [long[AHEAD:], long]
        await flights.drain()

    asyncio.run(run())


def test_a_computation_that_waits_ends_with_its_last_client() -> None:
    async def run() -> None:
        closed = asyncio.Event()

        async def start() -> AsyncIterator[Delta]:
            try:
                yield ANSWER[0]
                while True:
                    yield ANSWER[1]
            finally:
                closed.set()

        async def landed(completion: Completion) -> None:
            raise AssertionError("it never ends")

        flights = Flights()
        subscription = flights.join("k", start, landed)
        await subscription.burst()
        for _ in range(10):
            await asyncio.sleep(0)
        subscription.leave()
        await closed.wait()
        await flights.drain()

    asyncio.run(run())
