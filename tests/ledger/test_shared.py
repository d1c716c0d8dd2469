"""Limits that several servers hold together: in every order in which their changes can meet, and on a real server."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anaphora.clock import ManualClock
from anaphora.config import LimitConfig
from anaphora.errors import LimitReached, TierFailed
from anaphora.events import Event, Failed
from anaphora.ledger.allowance import Allowance
from anaphora.ledger.joint import Joint, unpacked
from anaphora.ledger.prices import Price, Prices
from anaphora.ledger.shared import Cells, Shared
from anaphora.ledger.tallies import Tallies
from anaphora.testing.valkey import ValkeyServer, valkey_cluster
from anaphora.types import Message, Request, Tenant, TextPart

PRICES = Prices((Price(model="m", input=Decimal(10), output=Decimal(10)),))
NOW_S = 1_795_000_000.0
LIMIT = LimitConfig(tenant="t", requests_per_month=10, tokens_per_month=1000)


chances = st.integers(0, 2**32).map(random.Random)
used_of_answers = st.lists(st.integers(0, 300), min_size=1, max_size=25)


class Table:
    """Cells in memory. What is asked of them happens when `driven` says so, and may be lost before or after it happened."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.waiting: list[asyncio.Future[str]] = []
        self.now_s = NOW_S

    async def read(self, name: str) -> tuple[bytes, float]:
        if await self._turn() != "works":
            raise TierFailed("gone")
        return self.data.get(name, b""), self.now_s

    async def swap(self, name: str, expected: bytes, data: bytes) -> tuple[bool, bytes, float]:
        how = await self._turn()
        there = self.data.get(name, b"")
        if how != "refused" and there == expected:
            self.data[name] = data
        if how != "works":
            raise TierFailed("gone")
        return there == expected, self.data.get(name, b""), self.now_s

    async def aclose(self) -> None: ...

    async def _turn(self) -> str:
        self.waiting.append(asyncio.get_running_loop().create_future())
        return await self.waiting[-1]

    async def driven(self, work: Awaitable[object], chance: random.Random, *ways: str) -> None:
        """`work` to its end, and all that it leaves to be told."""
        task = asyncio.ensure_future(work)
        idle = 0
        while not task.done() or idle < 20:
            await asyncio.sleep(0)
            idle += 1
            if self.waiting and (idle > 5 or chance.random() < 0.5):
                idle = 0
                how = chance.choice(ways) if ways and not task.done() else "works"
                self.waiting.pop(chance.randrange(len(self.waiting))).set_result(how)
        await task

    def joint(self) -> Joint:
        return unpacked(self.data.get("t", b""))

    def tokens(self) -> int:
        """Of the month, as all servers have them."""
        return self.joint().counts[-2]


class Server:
    """One of several. `own` is what it knows alone."""

    def __init__(
        self, cells: Cells, number: int, clock: ManualClock | None = None, limit: LimitConfig = LIMIT, rest_s: float = 0.0
    ) -> None:
        self.events: list[Event] = []
        clock = clock or ManualClock(NOW_S)
        self.own = Tallies()
        self.shared = Shared(
            cells, server=number, process=number, own=self.own.read, clock=clock, report=self.events.append, rest_s=rest_s
        )
        self.allowance = Allowance([limit], self.own, PRICES, clock, shared=self.shared)

    async def admitted(self) -> bool:
        try:
            await self.allowance.admit("t")
        except LimitReached:
            return False
        return True

    async def reserved(self, request_id: str, max_tokens: int = 96) -> bool:
        """About 100 tokens."""
        request = Request("m", Tenant("t"), (Message("user", (TextPart("sixteen letters!"),)),), max_tokens=max_tokens)
        try:
            await self.allowance.reserve(request, request_id)
        except LimitReached:
            return False
        return True

    def left(self) -> list[int]:
        return [at.remaining for at in self.allowance.standings("t")]


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())


@settings(deadline=None)
@given(chances, st.integers(2, 4), st.integers(0, 30))
def test_in_whatever_order_servers_meet_they_let_in_what_the_limit_says(chance: random.Random, num: int, asks: int) -> None:
    async def body() -> None:
        table = Table()
        servers = [Server(table, number, ManualClock(NOW_S + 4000 * number)) for number in range(num)]
        asked = [chance.choice(servers) for _ in range(asks)]
        answers: list[bool] = []

        async def ask(server: Server) -> None:
            answers.append(await server.admitted())

        await table.driven(asyncio.gather(*map(ask, asked)), chance)
        assert sum(answers) == min(asks, 10)

    run(body)


@settings(deadline=None)
@given(chances, used_of_answers)
def test_what_is_reserved_and_settled_is_what_was_used(chance: random.Random, used: list[int]) -> None:
    async def body() -> None:
        table = Table()
        servers = [Server(table, number) for number in range(3)]
        let_in: list[int] = []
        holding = 0

        async def ask(number: int) -> None:
            nonlocal holding
            server = servers[number % 3]
            if await server.reserved(str(number)):
                holding += 1
                assert holding <= 10
                if number % 2:
                    await asyncio.sleep(0)
                holding -= 1
                server.allowance.settle(str(number), used[number], 0)
                let_in.append(used[number])

        await table.driven(asyncio.gather(*map(ask, range(len(used)))), chance)
        if let_in:
            assert table.tokens() == sum(let_in)
            assert table.joint().leases == ()
        assert len(let_in) == len(used) or sum(let_in) + 100 * 10 >= 1000

    run(body)


@settings(deadline=None)
@given(chances, used_of_answers, st.sampled_from([("works", "refused"), ("works", "lost")]))
def test_nothing_that_was_used_is_forgotten_when_the_cells_come_and_go(
    chance: random.Random, used: list[int], ways: tuple[str, ...]
) -> None:
    """Where the reply alone was lost it may count twice."""

    async def body() -> None:
        table = Table()
        servers = [Server(table, number, limit=LimitConfig(tenant="t", tokens_per_month=10**6)) for number in range(2)]

        async def ask(number: int) -> None:
            server = servers[number % 2]
            assert await server.reserved(str(number))
            server.allowance.settle(str(number), used[number], 0)

        await table.driven(asyncio.gather(*map(ask, range(len(used)))), chance, *ways)
        await table.driven(asyncio.gather(*(server.shared.told() for server in servers)), chance)
        if ways[1] == "refused":
            assert table.tokens() == sum(used)
        else:
            assert table.tokens() >= sum(used)
        assert table.joint().leases == ()

    run(body)


def test_who_has_no_limits_waits_for_nobody() -> None:
    async def body() -> None:
        server = Server(Table(), 1)
        with pytest.raises(StopIteration):
            server.allowance.admit("somebody else").send(None)

    run(body)


def test_who_leaves_before_he_is_answered_has_used_nothing() -> None:
    async def body() -> None:
        table = Table()
        server = Server(table, 1)
        for rounds in range(12):
            asking = asyncio.create_task(server.reserved("r"))
            for _ in range(rounds):
                await asyncio.sleep(0)
                while table.waiting:
                    table.waiting.pop().set_result("works")
            asking.cancel()
            await asyncio.wait([asking])
            server.allowance.settle("r", 0, 0)
            await table.driven(server.shared.told(), random.Random(0))
            assert table.tokens() == 0
            assert table.joint().leases == ()

    run(body)


def test_whoever_ends_while_the_cells_are_gone_waits_for_nothing() -> None:
    async def body() -> None:
        table = Table()
        server = Server(table, 1)
        await table.driven(server.reserved("r"), random.Random(0))
        server.allowance.settle("r", 7, 0)
        await table.driven(server.allowance.aclose(), random.Random(0), "refused")
        assert table.tokens() == 100

    run(body)


# -- on a real server --------------------------------------------------------------------------------------------------


def cells(url: str, *, keep_s: int = 100) -> Cells:
    from anaphora.tiers.valkey.cells import Cells as ValkeyCells
    from anaphora.tiers.valkey.servers import Access

    return ValkeyCells(Access(url, timeout_s=60.0, connect_timeout_s=60.0), "anaphora:limits:", keep_s=keep_s)


def test_a_cell_changes_only_for_whoever_has_seen_what_is_in_it(valkey: str, valkey_server: ValkeyServer) -> None:
    async def body() -> None:
        one, other = cells(valkey), cells(valkey)
        assert (await one.read("ten{ant}"))[0] == b""
        assert (await one.swap("ten{ant}", b"", b"first"))[:2] == (True, b"first")
        assert (await other.swap("ten{ant}", b"", b"\0second"))[:2] == (False, b"first")
        swapped, there, now_s = await other.swap("ten{ant}", b"first", b"\0second")
        assert (swapped, there) == (True, b"\0second")
        data, later_s = await one.read("ten{ant}")
        assert (data, now_s <= later_s) == (b"\0second", True)
        [key] = valkey_server.command("KEYS", "*").split(b"\r\n")[2:3]
        assert key.startswith(b"anaphora:limits:{")
        assert 0 < int(valkey_server.command("TTL", key)[1:]) <= 100
        for each in (one, other):
            await each.aclose()

    run(body)


def test_many_at_once_on_two_servers_get_what_the_limit_says_whatever_time_they_think_it_is(valkey: str) -> None:
    async def body() -> None:
        clocks = [ManualClock(NOW_S), ManualClock(NOW_S + 40 * 86_400)]
        servers = [Server(cells(valkey), number, clock) for number, clock in enumerate(clocks)]
        answers = await asyncio.gather(*(servers[number % 2].admitted() for number in range(100)))
        assert sum(answers) == 10
        assert [server.left() for server in servers] == [[0, 1000], [0, 1000]]
        for server in servers:
            await server.allowance.aclose()

    run(body)


def test_what_another_server_reserved_is_worth_coming_back_for(valkey: str) -> None:
    async def body() -> None:
        one, other = (Server(cells(valkey), number) for number in range(2))
        assert await one.reserved("r", max_tokens=996)
        with pytest.raises(LimitReached, match="reserved") as caught:
            await other.allowance.reserve(Request("m", Tenant("t")), "s")
        assert caught.value.retry_after_s == 1
        one.allowance.settle("r", 1000, 0)
        await one.shared.told()
        with pytest.raises(LimitReached, match="is reached"):
            await other.allowance.reserve(Request("m", Tenant("t")), "s")
        for server in (one, other):
            await server.allowance.aclose()

    run(body)


def test_limits_are_shared_on_a_cluster() -> None:
    pytest.importorskip("redis")

    async def body(url: str) -> None:
        servers = [Server(cells(url), number) for number in range(2)]
        answers = await asyncio.gather(*(servers[number % 2].admitted() for number in range(30)))
        assert sum(answers) == 10
        for server in servers:
            await server.allowance.aclose()

    with valkey_cluster() as nodes:
        asyncio.run(body(f"redis+cluster://127.0.0.1:{nodes[0].port}"))


def test_while_the_server_is_gone_each_holds_the_limit_alone_and_once_it_is_back_all_of_it_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The server keeps nothing on disk: it comes back empty, and each tells it what it has used."""
    pytest.importorskip("redis")
    caplog.set_level(logging.WARNING, "anaphora.ledger.shared")

    async def body(valkey: ValkeyServer) -> None:
        one, other = (Server(cells(valkey.url), number, rest_s=0.01) for number in range(2))
        assert [await server.admitted() for server in (one, one, one, other, other)] == 5 * [True]
        assert other.left() == [5, 1000]
        valkey.kill()
        assert [await one.admitted() for _ in range(9)] == 7 * [True] + 2 * [False]
        assert await other.reserved("r")
        assert (one.left(), other.left()) == ([0, 1000], [8, 900])
        assert any(isinstance(event, Failed) and event.tier == "limits" for event in one.events)
        valkey.start()
        await asyncio.gather(one.shared.told(), other.shared.told())
        assert not await other.admitted()  # 10 and 2 were let in
        other.allowance.settle("r", 30, 0)
        await other.shared.told()
        assert await one.reserved("s")
        assert one.left() == [0, 870]
        for server in (one, other):
            await server.allowance.aclose()

    with ValkeyServer() as valkey:
        asyncio.run(body(valkey))
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "cannot be shared" in text]) == 2
    assert len([text for text in said if "again" in text]) == 2


def test_a_server_that_answers_and_takes_nothing_is_gone_and_said_to_be_once(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("redis")
    caplog.set_level(logging.WARNING, "anaphora.ledger.shared")

    async def body(valkey: ValkeyServer) -> None:
        tried = asyncio.Event()
        server = Server(cells(valkey.url), 1, rest_s=0.01)
        assert await server.admitted()
        valkey.command("CONFIG", "SET", "maxmemory", "1")

        def report(event: Event) -> None:
            server.events.append(event)
            if len(server.events) == 5:
                tried.set()

        server.shared._report = report
        assert [await server.admitted() for _ in range(10)] == 9 * [True] + [False]
        await tried.wait()
        valkey.command("CONFIG", "SET", "maxmemory", "0")
        await server.shared.told()
        assert not await server.admitted()
        await server.allowance.aclose()

    with ValkeyServer() as valkey:
        asyncio.run(body(valkey))
    assert len(caplog.records) == 2


def test_a_server_that_was_never_there_holds_nobody_up() -> None:
    pytest.importorskip("redis")

    async def body() -> None:
        server = Server(cells("redis://127.0.0.1:1/0"), 1, rest_s=0.01)
        assert [await server.admitted() for _ in range(11)] == 10 * [True] + [False]
        await server.allowance.aclose()

    run(body)
