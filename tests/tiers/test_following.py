from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from anaphora.clock import ManualClock
from anaphora.errors import TierFailed
from anaphora.policies.lru import LRU
from anaphora.registry import POLICIES
from anaphora.store import Store
from anaphora.testing.tiers import TierContract, make_entry, make_key
from anaphora.tiers.base import EVERYTHING, Erasure, Eviction, Tier
from anaphora.tiers.disk import DiskOptions, DiskTier
from anaphora.tiers.following import FollowingTier
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import Key, Scope, Tenant

MIB = 1 << 20
OF_A, OF_B = Scope(tenant=Tenant("a")), Scope(tenant=Tenant("b"))


class Leader(RamTier):
    """A tier in memory with a log of erasures, which a test may cut off."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(RamOptions(MIB), policy=LRU(), clock=clock)
        self.log: list[Erasure] = []
        self.reachable = True
        self.lost = 0
        self.num_asked = 0

    def epoch(self) -> int:
        return len(self.log) if self.reachable else 0

    async def erasures(self, since: int) -> tuple[int, tuple[Erasure, ...]]:
        self.num_asked += 1
        if not self.reachable:
            raise TierFailed("cut off")
        told = (Erasure(EVERYTHING),) if since < self.lost else tuple(self.log[since:])
        return len(self.log), told


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


class Machine:
    """One machine's disk behind a leader; `again` is the next time it is switched on."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self.folder = folder
        self.leader = Leader(self.clock)
        self.again()

    def again(self) -> None:
        self.disk = DiskTier(DiskOptions(str(self.folder), MIB), clock=self.clock)
        self.tier = FollowingTier(self.disk, self.leader, memo=self.folder / "erased")

    async def fill(self) -> set[Key]:
        entries = {make_key(1): make_entry(tenant="a"), make_key(2): make_entry(tenant="b")}
        await self.tier.put_many(entries)
        return set(entries)

    async def left(self) -> set[Key]:
        return set(await self.tier.get_many([make_key(1), make_key(2)]))


class TestFollowing(TierContract):
    def make(self, *, capacity_bytes: int, eviction: Eviction, clock: Any) -> Tier:
        inner = RamTier(RamOptions(capacity_bytes, eviction), policy=POLICIES.load(eviction.order)(), clock=clock)
        return FollowingTier(inner, Leader(clock), memo=Path("/nowhere/at/all"))


def test_what_another_machine_erased_is_gone_and_the_rest_stays(tmp_path: Path) -> None:
    async def body() -> None:
        machine = Machine(tmp_path)
        assert await machine.fill() == await machine.left()
        machine.leader.log.append(Erasure(OF_A))
        assert await machine.left() == {make_key(2)}
        assert await machine.disk.keys() == [make_key(2)]
        machine.leader.log.append(Erasure(keys=(make_key(2),)))
        assert await machine.left() == set()
        assert await machine.disk.keys() == []
        await machine.tier.aclose()

    run(body())


def test_without_news_nobody_is_asked(tmp_path: Path) -> None:
    async def body() -> None:
        machine = Machine(tmp_path)
        for _ in range(3):
            await machine.left()
        assert machine.leader.num_asked == 1
        await machine.tier.aclose()

    run(body())


def test_what_was_erased_while_the_machine_was_off_is_gone_before_anything_is_read(tmp_path: Path) -> None:
    async def body() -> None:
        machine = Machine(tmp_path)
        await machine.left()
        await machine.fill()
        await machine.tier.aclose()
        machine.leader.log.append(Erasure(OF_B))
        machine.again()
        assert await machine.left() == {make_key(1)}
        await machine.tier.aclose()
        machine.again()
        assert await machine.left() == {make_key(1)}
        await machine.tier.aclose()

    run(body())


def test_after_too_long_an_absence_everything_goes(tmp_path: Path) -> None:
    async def body() -> None:
        machine = Machine(tmp_path)
        await machine.fill()
        machine.leader.log += [Erasure(OF_B)] * 3
        machine.leader.lost = 2
        assert await machine.left() == set()
        assert await machine.fill() == await machine.left()
        await machine.tier.aclose()

    run(body())


def test_a_leader_that_cannot_be_reached_at_the_start_is_not_needed_and_heeded_later(tmp_path: Path) -> None:
    async def body() -> None:
        machine = Machine(tmp_path)
        await machine.fill()
        machine.leader.log.append(Erasure(OF_A))
        machine.leader.reachable = False
        assert await machine.left() == {make_key(1), make_key(2)}
        machine.leader.reachable = True
        async with asyncio.timeout(30):
            while await machine.left() != {make_key(2)}:
                pass
        assert await machine.disk.keys() == [make_key(2)]
        await machine.tier.aclose()

    run(body())


def test_a_store_does_not_bring_back_from_disk_what_another_machine_erased(tmp_path: Path) -> None:
    async def body() -> None:
        machine = Machine(tmp_path)
        clock, leader = machine.clock, machine.leader
        store = Store([RamTier(RamOptions(MIB), policy=LRU(), clock=clock), machine.tier, leader], clock=clock)
        for name, tenant in ((1, "a"), (2, "b")):
            assert store.put(make_key(name), b"value", tenant=Tenant(tenant))
        await store.flush()
        leader.forget_now(OF_A)
        leader.log.append(Erasure(OF_A))
        assert await store.get(make_key(1)) is None
        assert await store.get(make_key(2)) is not None
        await store.aclose()

    run(body())
