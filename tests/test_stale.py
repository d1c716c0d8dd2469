"""Answers past their lifetime: given where no new one can be computed, or while one is; never silently."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from anaphora.answer import Answer, Live, Recalled
from anaphora.backends.echo import EchoBackend, fail_at
from anaphora.catalogue import Catalogue
from anaphora.clock import ManualClock
from anaphora.errors import BackendFailed, InvalidRequest, NotCached
from anaphora.events import Answered, Event, MissReason
from anaphora.gateway import Gateway, Stale
from anaphora.levels.exact import ExactLevel, ExactOptions
from anaphora.memory import Memory
from anaphora.policies.lru import LRU
from anaphora.server import headers
from anaphora.store import Store, StoreOptions
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.transcript import collect
from anaphora.types import CacheControl, Completion, Key, Message, Request, Sampling, TextPart

TTL_S, KEPT_S = 60.0, 600.0
QUESTION = Request("echo", messages=(Message("user", (TextPart("say this"),)),), sampling=Sampling(temperature=0.0))


async def to_its_end(answer: Live) -> None:
    while await answer.burst():
        pass


class Bench:
    def __init__(self, stale: Stale) -> None:
        self.clock = ManualClock()
        self.events: list[Event] = []
        self.backend = EchoBackend(clock=self.clock)
        policy: LRU[Key] = LRU()
        store = Store(
            [RamTier(RamOptions(), policy=policy, clock=self.clock)],
            clock=self.clock,
            options=StoreOptions(ttl_s=TTL_S + KEPT_S),
        )
        level = ExactLevel(ExactOptions(stale_s=KEPT_S), store=store, clock=self.clock)
        catalogue = Catalogue(self.backend)
        memory = Memory([level], fingerprint=catalogue.fingerprint)
        self.gateway = Gateway(self.backend, memory, catalogue, stale=stale, clock=self.clock, emit=self.events.append)

    async def ask(self, control: CacheControl = CacheControl()) -> tuple[Answer, Completion | None]:  # noqa: B008
        answer = await self.gateway.complete(QUESTION, control)
        if isinstance(answer, Recalled):
            return answer, answer.completion
        try:
            return answer, await answer.whole()
        finally:
            answer.leave()

    async def landed(self) -> None:
        await self.gateway._flights.drain()

    @property
    def sources(self) -> list[str]:
        return [event.source for event in self.events if isinstance(event, Answered)]


def run(test: Callable[[Bench], Awaitable[None]], stale: Stale) -> None:
    async def whole() -> None:
        bench = Bench(stale)
        await bench.gateway.start()
        await bench.ask()
        await bench.landed()
        await test(bench)
        await bench.gateway.aclose()

    asyncio.run(whole())


def test_past_its_lifetime_an_answer_is_computed_anew() -> None:
    async def test(bench: Bench) -> None:
        bench.clock.advance(TTL_S - 1)
        assert isinstance((await bench.ask())[0], Recalled)
        bench.clock.advance(2)
        answer, _ = await bench.ask()
        assert isinstance(answer, Live)
        assert answer.reason is MissReason.EXPIRED
        assert bench.backend.runs == 2

    run(test, Stale())


def test_where_no_new_one_can_be_computed_the_old_one_is_given_and_said_to_be_old() -> None:
    async def test(bench: Bench) -> None:
        bench.clock.advance(TTL_S + 30)
        bench.backend.gate = fail_at(0)
        answer, completion = await bench.ask()
        assert isinstance(answer, Live)
        assert completion is not None
        assert completion.choices[0].content == (TextPart("say this"),)
        status = dict(headers.of_answer(answer, 0))[b"cache-status"]
        assert status.startswith(b"anaphora; hit; ttl=-30; key=")
        assert status.endswith(b"detail=stale-if-error")
        assert bench.sources == ["miss", "hit"]
        bench.backend.gate = None
        assert (await bench.ask())[0].source == "miss"  # what was given in need is not fresh because of that

    run(test, Stale(if_error_s=60))


def test_the_old_one_is_given_whole_to_a_client_that_reads_piece_by_piece() -> None:
    async def test(bench: Bench) -> None:
        bench.clock.advance(TTL_S + 30)
        bench.backend.gate = fail_at(0)
        answer = await bench.gateway.complete(QUESTION)
        assert isinstance(answer, Live)
        completion = collect([delta async for delta in answer])
        assert completion is not None
        assert completion.choices[0].content == (TextPart("say this"),)

    run(test, Stale(if_error_s=60))


@pytest.mark.parametrize(
    ("past_s", "fail_after", "error", "control"),
    [
        (61, 0, BackendFailed("broken"), CacheControl()),  # too old
        (30, 2, BackendFailed("broken"), CacheControl()),  # something was given already
        (30, 0, InvalidRequest("wrong"), CacheControl()),  # the request's own fault
        (30, 0, BackendFailed("broken"), CacheControl(stale_if_error_s=0)),  # not wanted
    ],
)
def test_else_the_error_is_the_clients(past_s: float, fail_after: int, error: Exception, control: CacheControl) -> None:
    async def test(bench: Bench) -> None:
        bench.clock.advance(TTL_S + past_s)
        bench.backend.gate = fail_at(fail_after, error)
        answer = await bench.gateway.complete(QUESTION, control)
        assert isinstance(answer, Live)
        with pytest.raises(type(error)):
            await to_its_end(answer)
        answer.leave()

    run(test, Stale(if_error_s=60))


def test_a_client_may_allow_more_than_the_server() -> None:
    async def test(bench: Bench) -> None:
        bench.clock.advance(TTL_S + 30)
        answer, _ = await bench.ask(CacheControl(stale_s=40))
        assert isinstance(answer, Recalled)
        assert answer.ttl_s == -30
        bench.backend.gate = fail_at(0)
        assert (await bench.ask(CacheControl(stale_if_error_s=40)))[1] is not None
        with pytest.raises(BackendFailed):
            await bench.ask()

    run(test, Stale())


def test_while_a_new_one_is_computed_the_old_one_is_given_at_once() -> None:
    async def test(bench: Bench) -> None:
        bench.clock.advance(TTL_S + 30)
        may_compute = asyncio.Event()

        async def gate(at: int) -> None:
            await may_compute.wait()

        bench.backend.gate = gate
        for _ in range(3):
            answer, _ = await bench.ask()
            assert isinstance(answer, Recalled)
            assert answer.ttl_s == -30
        may_compute.set()
        await bench.landed()
        assert bench.backend.runs == 2  # one new computation for all three
        answer, _ = await bench.ask()
        assert isinstance(answer, Recalled)
        assert answer.ttl_s == TTL_S
        bench.clock.advance(TTL_S + 61)
        assert isinstance((await bench.ask())[0], Live)

    run(test, Stale(while_revalidate_s=60))


def test_a_new_one_that_fails_leaves_the_old_one() -> None:
    async def test(bench: Bench) -> None:
        bench.clock.advance(TTL_S + 30)
        bench.backend.gate = fail_at(0)
        for runs in (2, 3):
            assert isinstance((await bench.ask())[0], Recalled)
            await bench.landed()
            assert bench.backend.runs == runs

    run(test, Stale(while_revalidate_s=60))


def test_only_if_cached_takes_an_old_one_where_it_may() -> None:
    async def test(bench: Bench) -> None:
        bench.clock.advance(TTL_S + 30)
        assert isinstance((await bench.ask(CacheControl(only_if_cached=True, stale_s=40)))[0], Recalled)
        with pytest.raises(NotCached):
            await bench.ask(CacheControl(only_if_cached=True))
        assert bench.backend.runs == 1

    run(test, Stale(if_error_s=60))


def test_the_directives_are_read_from_the_header() -> None:
    assert headers.cache_control(b"max-stale=5, stale-if-error=60, stale-while-revalidate=7") == CacheControl(
        stale_s=5, stale_if_error_s=60, stale_while_revalidate_s=7
    )
    assert headers.cache_control(b"max-stale").stale_s > 1e9
    assert headers.cache_control(b"max-stale=junk").stale_s == 0
