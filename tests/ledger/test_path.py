"""What the path of a request tells the ledger, and what limits let through it. Gates of the echo force the interleavings."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path

import pytest
from tests.ledger.entries import rows_of

from anaphora.accounting import Asked
from anaphora.answer import Answer, Recalled
from anaphora.backends.echo import EchoBackend, Gate, fail_at
from anaphora.catalogue import Catalogue
from anaphora.clock import ManualClock
from anaphora.config import LimitConfig
from anaphora.errors import BackendFailed, LimitReached, NotCached
from anaphora.events import Event
from anaphora.gateway import Gateway, Stale
from anaphora.ledger.allowance import Allowance
from anaphora.ledger.entry import Entry
from anaphora.ledger.prices import Price, Prices
from anaphora.ledger.recorder import Recorder
from anaphora.ledger.tallies import Tallies
from anaphora.levels.exact import ExactLevel, ExactOptions
from anaphora.memory import Memory
from anaphora.policies.lru import LRU
from anaphora.prompt import Prompt
from anaphora.store import Store, StoreOptions
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import CacheControl, Key, Message, Request, Sampling, Tenant, TextPart

PRICES = Prices((Price(model="echo", input=Decimal(1), output=Decimal(1)),))
T = Tenant("t")
TTL_S, KEPT_S = 60.0, 600.0


class Bench:
    """A gateway over echo and memory, with limits, whose events a recorder takes."""

    def __init__(self, folder: Path, gate: Gate | None = None, *, stale: Stale | None = None, **limits: int | Decimal) -> None:
        self.clock = ManualClock()
        self.backend = EchoBackend(gate=gate, clock=self.clock)
        given = LimitConfig("*", **limits)  # type: ignore[arg-type]
        self.allowance = Allowance([given], Tallies(), PRICES, self.clock)
        self.recorder = Recorder(folder / "ledger.db", PRICES, self.clock, tell=lambda event: None, settles=self.allowance)
        policy: LRU[Key] = LRU()
        options = StoreOptions(ttl_s=None if stale is None else TTL_S + KEPT_S)
        store = Store([RamTier(RamOptions(), policy=policy, clock=self.clock)], clock=self.clock, options=options)
        level = ExactLevel(ExactOptions(stale_s=0.0 if stale is None else KEPT_S), store=store, clock=self.clock)
        catalogue = Catalogue(self.backend, ["also-echo"])

        def emit(event: Event) -> None:
            self.recorder.record(event)

        memory = Memory([level], fingerprint=catalogue.fingerprint, emit=emit)
        self.gateway = Gateway(
            self.backend,
            memory,
            catalogue,
            allowance=self.allowance,
            stale=stale or Stale(),
            clock=self.clock,
            emit=emit,
        )
        self._book = folder / "ledger.db"
        self._num_asked = 0

    async def ask(self, text: str = "to be or not", model: str = "echo", control: CacheControl | None = None) -> Answer:
        self._num_asked += 1
        request = Request(
            model, T, (Message("user", (TextPart(text),)),), sampling=Sampling(temperature=0.0), max_tokens=8, stream=True
        )
        prompt = Prompt("openai", model, ())
        asked = Asked(lambda: prompt, "answer", "w", model, f"r{self._num_asked}", "label")
        return await self.gateway.complete(request, control or CacheControl(), asked)

    async def whole(self, text: str = "to be or not", control: CacheControl | None = None) -> None:
        answer = await self.ask(text, control=control)
        if not isinstance(answer, Recalled):
            await answer.whole()
            answer.leave()
        await self.landed()

    async def landed(self) -> None:
        await self.gateway._flights.drain()  # nobody else has business with flights

    def entries(self) -> list[Entry]:
        self.recorder.start()
        self.recorder.close()
        return rows_of(self._book)

    def remaining(self) -> list[int]:
        return [standing.remaining for standing in self.allowance.standings(T)]


def run(body: Callable[[Path], Awaitable[None]]) -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            await body(Path(folder))

    asyncio.run(main())


class Held:
    """A gate that holds every run at one delta until it is opened."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self, index: int) -> None:
        if index == self.at:
            self.reached.set()
            await self.open.wait()


def test_every_request_says_who_asked_for_what_and_who_answered() -> None:
    async def body(folder: Path) -> None:
        bench = Bench(folder, tokens_per_day=10_000)
        await bench.gateway.start()
        answer = await bench.ask(model="also-echo")
        assert not isinstance(answer, Recalled)
        await answer.whole()
        await bench.landed()
        await bench.whole()
        computed, hit = bench.entries()
        for entry in (computed, hit):
            assert (entry.tenant, entry.workspace, entry.tag, entry.model) == ("t", "w", "label", "echo")
        assert (computed.asked, computed.level, computed.request_id) == ("also-echo", "computed", "r1")
        assert (hit.asked, hit.level, hit.request_id) == ("echo", "exact", "r2")
        assert hit.saved_answers == computed.paid == computed.tokens * 10**6 > 0

    run(body)


def test_one_computation_of_many_is_paid_once_though_its_first_client_leaves() -> None:
    async def body(folder: Path) -> None:
        gate = Held(3)
        bench = Bench(folder, gate, tokens_per_day=10_000)
        await bench.gateway.start()
        first, second = await bench.ask(), await bench.ask()
        assert not isinstance(first, Recalled)
        assert not isinstance(second, Recalled)
        await gate.reached.wait()
        await first.burst()
        first.leave()
        gate.open.set()
        await second.whole()
        await bench.landed()
        left, collapsed = bench.entries()
        assert (left.outcome, left.level, collapsed.level) == ("left", "computed", "collapsed")
        assert (left.estimated, left.tokens, collapsed.tokens) == (0, 4 + 4, 0)
        assert left.paid == collapsed.saved_answers
        assert bench.remaining() == [10_000 - left.tokens]

    run(body)


def test_what_nobody_waited_for_is_charged_as_far_as_it_came() -> None:
    async def body(folder: Path) -> None:
        gate = Held(3)
        bench = Bench(folder, gate, tokens_per_day=10_000)
        await bench.gateway.start()
        answer = await bench.ask()
        assert not isinstance(answer, Recalled)
        await gate.reached.wait()
        await answer.burst()
        answer.leave()
        await bench.landed()
        (entry,) = bench.entries()
        assert (entry.outcome, entry.estimated, entry.input) == ("left", 1, 4)
        assert entry.output == 2  # "to " and "be " are six characters
        assert bench.remaining() == [10_000 - 6]

    run(body)


def test_a_failure_before_the_first_word_costs_a_request_and_nothing_else() -> None:
    async def body(folder: Path) -> None:
        bench = Bench(folder, fail_at(0), requests_per_day=5, tokens_per_day=10_000)
        await bench.gateway.start()
        with pytest.raises(BackendFailed):
            await bench.whole()
        (entry,) = bench.entries()
        assert (entry.outcome, entry.tokens, entry.paid, entry.priced) == ("failed", 0, 0, 1)
        assert bench.remaining() == [4, 10_000]

    run(body)


def test_what_is_remembered_costs_a_request_and_no_tokens() -> None:
    async def body(folder: Path) -> None:
        bench = Bench(folder, requests_per_day=4, tokens_per_day=1)
        await bench.gateway.start()
        await bench.whole()
        await bench.whole()
        with pytest.raises(LimitReached, match="reserved"):
            await bench.whole("another question")
        with pytest.raises(NotCached):
            await bench.ask("another question", control=CacheControl(only_if_cached=True))
        await bench.whole()
        with pytest.raises(LimitReached, match="4 requests per day"):
            await bench.whole()
        assert bench.backend.runs == 1
        assert len(bench.entries()) == 3
        assert bench.remaining() == [0, 0]

    run(body)


def test_who_joins_a_computation_reserves_nothing_of_his_own() -> None:
    async def body(folder: Path) -> None:
        gate = Held(1)
        bench = Bench(folder, gate, tokens_per_day=1000)
        await bench.gateway.start()
        answers = [await bench.ask() for _ in range(5)]
        assert bench.remaining() == [1000 - (3 + 8)]
        gate.open.set()
        for answer in answers:
            assert not isinstance(answer, Recalled)
            await answer.whole()
        await bench.landed()
        assert [entry.level for entry in bench.entries()] == ["computed"] + 4 * ["collapsed"]
        assert bench.remaining() == [1000 - 8]

    run(body)


def test_an_answer_that_is_computed_anew_behind_an_older_one_is_paid_once_and_saves_nothing_in_the_end() -> None:
    async def body(folder: Path) -> None:
        bench = Bench(folder, stale=Stale(while_revalidate_s=500), requests_per_day=10, tokens_per_day=1000)
        gateway = bench.gateway
        await gateway.start()
        await bench.whole()
        bench.clock.advance(100)
        await bench.whole()
        await asyncio.gather(*gateway._refreshing)
        await bench.landed()
        first, *rest = bench.entries()
        old, new = sorted(rest, key=lambda entry: entry.level)
        assert (old.level, new.level, new.request_id) == ("exact", "refresh", f"{old.request_id}.refresh")
        assert (old.saved_answers, new.paid, new.saved_answers) == (first.paid, first.paid, -first.paid)
        assert bench.remaining() == [8, 1000 - 16]

    run(body)


def test_without_a_budget_an_older_answer_stays_as_old_as_it_is() -> None:
    async def body(folder: Path) -> None:
        bench = Bench(folder, stale=Stale(while_revalidate_s=500), tokens_per_day=1)
        await bench.gateway.start()
        await bench.whole()
        bench.clock.advance(100)
        await bench.whole()
        assert bench.backend.runs == 1
        assert [entry.level for entry in bench.entries()] == ["computed", "exact"]

    run(body)


def test_what_could_not_be_computed_and_was_remembered_after_all_holds_no_reservation() -> None:
    async def body(folder: Path) -> None:
        failing = False

        async def gate(index: int) -> None:
            if failing:
                raise BackendFailed("The echo was told to fail.")

        bench = Bench(folder, gate, stale=Stale(if_error_s=500), tokens_per_day=1000)
        await bench.gateway.start()
        await bench.whole()
        bench.clock.advance(100)
        failing = True
        await bench.whole()
        first, old = bench.entries()
        assert (old.level, old.paid, old.saved_answers) == ("exact", 0, first.paid)
        assert bench.remaining() == [1000 - 8]

    run(body)
