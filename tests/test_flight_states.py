"""Flights under any order of joining, leaving, saying, failing, ending and learning.

Mutants of `flight.py` that this machine kills (tried by hand, one at a time):
- `unsubscribe` does not count (`_subscribers == 0` becomes `_subscribers <= 1`): a follower loses its answer
- the last one leaving does not cancel
- the last one leaving cancels also after the end: the answer is not learned
- `unsubscribe` does not forget: who asks next joins a dying flight
- `_landed` does not forget: a landed flight is joined for ever
- a failure is not kept as `error`: subscribers see a cut answer as a whole one
- an answer that was cut before its End is no error
- a burst moves its reader on by one delta only
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from anaphora.errors import BackendFailed
from anaphora.flight import Flights, Subscription
from anaphora.types import Begin, Completion, Delta, End, Finish, TextDelta, Usage

ANSWER: list[Delta] = [Begin("m", Usage()), TextDelta(0, "a"), TextDelta(0, "b"), Finish(0, "end_turn"), End(Usage())]


class Computation:
    """One run of the backend, as the test drives it, and what the model says of it."""

    def __init__(self) -> None:
        self.go: asyncio.Queue[str] = asyncio.Queue()
        self.may_learn = asyncio.Event()
        self.num_learned = 0
        self.began = self.closed = False
        self.num_said = 0
        self.end = ""
        """How it ended: "whole", "failed", "cut" or "abandoned"; empty while it runs."""
        self.learned = False

    async def run(self) -> AsyncIterator[Delta]:
        self.began = True
        try:
            for delta in ANSWER:
                word = await self.go.get()
                if word == "fail":
                    raise BackendFailed("told to")
                if word == "cut":
                    return
                yield delta
        finally:
            self.closed = True

    async def landed(self, completion: Completion) -> None:
        await self.may_learn.wait()
        self.num_learned += 1


class Client:
    def __init__(self, subscription: Subscription, computation: Computation) -> None:
        self.subscription = subscription
        self.computation = computation
        self.read: list[Delta] = []
        self.error: BackendFailed | None = None
        self.over = False
        self.left = False


class Sky(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.flights = Flights()
        self.computations: list[Computation] = []
        self.clients: list[Client] = []

    def teardown(self) -> None:
        for computation in self.computations:
            computation.may_learn.set()
        self.loop.run_until_complete(self.flights.aclose())
        assert len(self.flights) == 0
        assert all(computation.closed == computation.began for computation in self.computations)
        self.loop.close()

    def settle(self) -> None:
        async def settle() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(settle())

    @property
    def joinable(self) -> Computation | None:
        """What the next one to ask must join."""
        if not self.computations:
            return None
        last = self.computations[-1]
        return last if not last.end or (last.end == "whole" and not last.learned) else None

    @rule()
    def join(self) -> None:
        async def join() -> None:
            self.join_now()

        self.loop.run_until_complete(join())

    def join_now(self) -> None:
        expected = self.joinable
        computation = expected or Computation()
        subscription = self.flights.join("key", computation.run, computation.landed)
        assert subscription.collapsed == (expected is not None)
        if expected is None:
            self.computations.append(computation)
        self.clients.append(Client(subscription, computation))

    @precondition(lambda self: any(not client.left for client in self.clients))
    @rule(data=st.data(), then_join=st.booleans())
    def leave(self, data: st.DataObject, then_join: bool) -> None:
        client = data.draw(st.sampled_from([client for client in self.clients if not client.left]))
        client.left = True
        computation = client.computation
        waiting = [other for other in self.clients if other.computation is computation and not (other.left or other.over)]
        if not computation.end and not waiting and not client.over:
            computation.end = "abandoned"

        async def leave() -> None:
            client.subscription.leave()
            if then_join:  # before the loop has run: what was cancelled is still unwinding
                self.join_now()

        self.loop.run_until_complete(leave())

    @precondition(lambda self: self.computations and not self.computations[-1].end)
    @rule(word=st.sampled_from(["say", "say", "say", "say", "fail", "cut"]))
    def speak(self, word: str) -> None:
        computation = self.computations[-1]
        computation.go.put_nowait(word)
        if word == "say":
            computation.num_said += 1
            computation.end = "whole" if computation.num_said == len(ANSWER) else ""
        else:
            computation.end = "failed" if word == "fail" else "cut"
        self.settle()

    @precondition(lambda self: self.computations and not self.computations[-1].end)
    @rule()
    def speak_to_the_end(self) -> None:
        while not self.computations[-1].end:
            self.speak("say")

    @precondition(lambda self: any(c.end == "whole" and not c.learned for c in self.computations))
    @rule()
    def learn(self) -> None:
        for computation in self.computations:
            if computation.end == "whole":
                computation.may_learn.set()
                computation.learned = True
        self.settle()

    @precondition(lambda self: any(not (client.left or client.over) for client in self.clients))
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from([client for client in self.clients if not (client.left or client.over)]))
        computation = client.computation
        if len(client.read) == computation.num_said and not computation.end:
            return  # it would wait

        async def read() -> list[Delta]:
            return await asyncio.wait_for(client.subscription.burst(), 5)

        try:
            burst = self.loop.run_until_complete(read())
        except BackendFailed as error:
            client.error = error
            client.over = True
        else:
            client.read += burst
            client.over = not burst
        assert (client.error is not None) == (client.over and computation.end in ("failed", "cut"))
        if client.over and client.error is None:
            assert client.read == ANSWER

    @invariant()
    def everyone_reads_the_answer_from_its_start(self) -> None:
        for client in self.clients:
            assert client.read == ANSWER[: len(client.read)]
            assert len(client.read) <= client.computation.num_said

    @invariant()
    def learned_once_if_whole_else_never(self) -> None:
        for computation in self.computations:
            assert computation.num_learned == int(computation.end == "whole" and computation.learned)

    @invariant()
    def runs_while_somebody_waits_and_not_longer(self) -> None:
        self.settle()
        for computation in self.computations:
            assert computation.closed == (computation.began and bool(computation.end))


TestSky = Sky.TestCase
TestSky.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
