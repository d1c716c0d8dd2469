from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

import anaphora.store
from anaphora.clock import ManualClock
from anaphora.errors import TierFailed
from anaphora.events import Dropped, Event, Failed
from anaphora.policies.lru import LRU
from anaphora.store import Store, StoreOptions
from anaphora.testing.tiers import make_key
from anaphora.tiers.base import ENTRY_OVERHEAD, EVERYTHING, Entry, TierStats
from anaphora.tiers.disk import DiskOptions, DiskTier
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import Key, Scope, Tenant

A, B = Tenant("a"), Tenant("b")
MIB = 1 << 20


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


def ram(clock: ManualClock, capacity: int = MIB) -> RamTier:
    return RamTier(RamOptions(capacity), policy=LRU(), clock=clock)


def disk(clock: ManualClock, folder: Path, capacity: int = MIB) -> DiskTier:
    return DiskTier(DiskOptions(str(folder), capacity), clock=clock)


class SlowTier:
    """A shared tier in memory whose every verb waits at a gate, so that a test decides what happens meanwhile."""

    name = "slow"

    def __init__(self, clock: ManualClock, capacity: int = MIB) -> None:
        self.inner = ram(clock, capacity)
        self.gate = asyncio.Event()
        self.gate.set()
        self.arrived = asyncio.Event()
        self.failing: str | None = None
        self.current_epoch = 1

    async def pass_gate(self) -> None:
        self.arrived.set()
        await self.gate.wait()
        if self.failing is not None:
            raise TierFailed(self.failing)

    @property
    def capacity_bytes(self) -> int:
        return self.inner.capacity_bytes

    async def get_many(self, keys: Collection[Key]) -> dict[Key, Entry]:
        found = await self.inner.get_many(keys)
        await self.pass_gate()
        return found

    async def sizes(self, keys: Collection[Key]) -> dict[Key, int]:
        await self.pass_gate()
        return await self.inner.sizes(keys)

    async def put_many(self, entries: Mapping[Key, Entry], *, epoch: int | None = None) -> frozenset[Key]:
        await self.pass_gate()
        return frozenset() if epoch not in (None, self.current_epoch) else await self.inner.put_many(entries)

    async def delete_many(self, keys: Collection[Key]) -> int:
        await self.pass_gate()
        self.current_epoch += 1
        return await self.inner.delete_many(keys)

    async def forget(self, scope: Scope) -> int:
        await self.pass_gate()
        self.current_epoch += 1
        return await self.inner.forget(scope)

    async def keys(self, scope: Scope = EVERYTHING) -> list[Key]:
        await self.pass_gate()
        return await self.inner.keys(scope)

    def touch(self, keys: Iterable[Key]) -> None:
        self.inner.touch(keys)

    async def keep(self, keys: Collection[Key], until_s: float) -> int:
        await self.pass_gate()
        return await self.inner.keep(keys, until_s)

    def epoch(self) -> int:
        return self.current_epoch

    async def stats(self) -> TierStats:
        await self.pass_gate()
        return await self.inner.stats()

    async def aclose(self) -> None:
        pass


# -- over memory and a folder ------------------------------------------------------------------------------------------


def test_what_is_put_is_there_at_once_and_after_a_restart(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        store = Store([ram(clock), disk(clock, tmp_path)], clock=clock)
        assert store.put(make_key(1), b"value", cost_s=2.5, tenant=A, model="m", tags=("t",))
        first = store.get_now(make_key(1))
        assert first == Entry(b"value", clock.now_s(), None, 2.5, A, "m", ("t",))
        await store.aclose()
        clock.advance(60)
        store = Store([ram(clock), disk(clock, tmp_path)], clock=clock)
        assert store.get_now(make_key(1)) is None
        assert await store.get(make_key(1)) == first
        assert store.get_now(make_key(1)) == first  # promoted, as old as it is
        await store.aclose()

    run(body())


def test_an_entry_expires_in_all_tiers_at_one_moment_counted_from_its_put(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        store = Store([ram(clock), disk(clock, tmp_path)], clock=clock, options=StoreOptions(ttl_s=100))
        store.put(make_key("default"), b"v", tenant=A)
        store.put(make_key("own"), b"v", tenant=A, ttl_s=10)
        await store.aclose()
        clock.advance(9)
        store = Store([ram(clock), disk(clock, tmp_path)], clock=clock)
        assert set(await store.get_many([make_key("default"), make_key("own")])) == {make_key("default"), make_key("own")}
        clock.advance(1)
        assert await store.get(make_key("own")) is None
        clock.advance(90)
        assert await store.get(make_key("default")) is None
        await store.aclose()

    run(body())


def test_forgetting_says_what_went_from_each_tier_and_that_nothing_is_left(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        events: list[Event] = []
        store = Store([ram(clock), disk(clock, tmp_path)], clock=clock, emit=events.append)
        for number in range(5):
            store.put(make_key(number), b"v", tenant=A if number < 3 else B)
        await store.flush()
        receipt = await store.forget(Scope(tenant=A))
        assert receipt.removed == {"ram": 3, "disk": 3}
        assert receipt.remaining == {"ram": 0, "disk": 0}
        assert receipt.complete
        assert receipt in events
        found = await store.get_many([make_key(number) for number in range(5)])
        assert set(found) == {make_key(3), make_key(4)}
        await store.aclose()

    run(body())


def test_what_waits_to_be_written_is_forgotten_too(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        store = Store([ram(clock), disk(clock, tmp_path)], clock=clock)
        store.put(make_key(1), b"v", tenant=A)
        assert (await store.forget(Scope(tenant=A))).complete
        await store.flush()
        assert await store.get(make_key(1)) is None
        await store.aclose()

    run(body())


def test_what_waits_to_be_written_and_is_not_to_be_forgotten_stays(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        store = Store([ram(clock), disk(clock, tmp_path)], clock=clock)
        for name in (b"a", b"b", b"c"):  # the first is written at once, those behind it wait for company
            store.put(Key(name * 32), name, tenant=Tenant(name.decode()))
            await asyncio.sleep(0)
        assert (await store.forget(Scope(tenant=Tenant("b")))).complete
        found = await store.get_many([Key(name * 32) for name in (b"a", b"b", b"c")])
        assert sorted(entry.value for entry in found.values()) == [b"a", b"c"]
        await store.aclose()

    run(body())


def test_hot_entries_are_kept_on_disk_too(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        size = 1000 + ENTRY_OVERHEAD
        store = Store([ram(clock), disk(clock, tmp_path, 3 * size)], clock=clock)
        for number in range(3):
            store.put(make_key(number), b"v" * 1000, tenant=A)
        await store.flush()
        assert store.get_now(make_key(0)) is not None  # served from memory, but a use all the same
        store.put(make_key(3), b"v" * 1000, tenant=A)
        await store.aclose()
        store = Store([ram(clock), disk(clock, tmp_path, 3 * size)], clock=clock)
        assert set(await store.get_many([make_key(number) for number in range(4)])) == {make_key(n) for n in (0, 2, 3)}
        await store.aclose()

    run(body())


def test_a_value_too_large_for_memory_lives_in_the_slower_tier(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        store = Store([ram(clock, 1000), disk(clock, tmp_path, 50_000)], clock=clock)
        assert store.put(make_key(1), b"v" * 5000, tenant=A)
        assert (await store.get(make_key(1))) is not None  # while it waits to be written
        await store.flush()
        assert (await store.get(make_key(1))) is not None
        assert not store.put(make_key(2), b"v" * 60_000, tenant=A)
        await store.aclose()

    run(body())


# -- while a slower tier takes its time --------------------------------------------------------------------------------


def test_a_read_that_a_forget_overtook_brings_nothing_back() -> None:
    async def body() -> None:
        clock = ManualClock()
        slow = SlowTier(clock)
        store = Store([ram(clock), slow], clock=clock)
        await slow.inner.put_many({make_key(1): Entry(b"v", 1.0, tenant=A)})
        slow.gate.clear()
        reading = asyncio.create_task(store.get(make_key(1)))
        await slow.arrived.wait()  # it has read the entry
        forgetting = asyncio.create_task(store.forget(Scope(tenant=A)))
        await asyncio.sleep(0)
        slow.gate.set()
        assert (await forgetting).complete
        assert await reading is None
        assert store.get_now(make_key(1)) is None

    run(body())


def test_a_read_that_another_process_forget_overtook_brings_nothing_back() -> None:
    async def body() -> None:
        clock = ManualClock()
        slow = SlowTier(clock)
        store = Store([ram(clock), slow], clock=clock)
        await slow.inner.put_many({make_key(1): Entry(b"v", 1.0, tenant=A)})
        slow.gate.clear()
        reading = asyncio.create_task(store.get(make_key(1)))
        await slow.arrived.wait()
        await slow.inner.forget(Scope(tenant=A))
        slow.current_epoch += 1
        slow.gate.set()
        assert await reading is None
        assert store.get_now(make_key(1)) is None

    run(body())


def test_what_was_asked_for_before_a_forget_is_not_kept_after_it(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        here, there = (Store([ram(clock), disk(clock, tmp_path)], clock=clock) for _ in range(2))
        asked = here.mark()
        assert here.put(make_key(1), b"v", tenant=A, since=asked)
        await here.flush()
        assert (await there.forget(Scope(tenant=A))).complete  # another process on the same folder
        assert not here.put(make_key(1), b"v", tenant=A, since=asked)
        assert here.put(make_key(2), b"v", tenant=A, since=here.mark())
        asked = here.mark()
        here.drop(Scope(tenant=B))  # another process that shares no tier
        assert not here.put(make_key(3), b"v", tenant=A, since=asked)
        assert set(await here.get_many([make_key(number) for number in range(4)])) == {make_key(2)}
        await here.aclose()
        await there.aclose()

    run(body())


def test_what_waits_for_the_disk_while_another_process_forgets_is_written_unless_it_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anaphora.store._WRITE_EVERY_S", 60.0)

    async def body() -> None:
        clock = ManualClock()
        here, there = (Store([ram(clock), disk(clock, tmp_path)], clock=clock) for _ in range(2))
        here.put(make_key(0), b"v", tenant=A)
        await here.flush()  # from here on writes wait
        for number, tenant in enumerate([A, B, A, B], 1):
            here.put(make_key(number), b"%d" % number, tenant=tenant)
        assert (await there.forget(Scope(tenant=A))).complete
        keys = [make_key(number) for number in range(5)]
        assert [here.get_now(key) for key in keys] == [None] * 5  # it is not known yet which were meant
        assert await here.locate(keys) == {}
        found = await here.get_many(keys)
        assert {key: entry.value for key, entry in found.items()} == {make_key(2): b"2", make_key(4): b"4"}
        assert set(await there.get_many(keys)) == {make_key(2), make_key(4)}
        await here.aclose()
        await there.aclose()

    run(body())


class Knowing(SlowTier):
    """Knows what it has not."""

    def lacks(self, keys: Collection[Key]) -> bool:
        return not any(key in self.inner._entries for key in keys)


def test_a_tier_that_knows_that_it_has_nothing_is_not_waited_for() -> None:
    async def body() -> None:
        clock = ManualClock()
        slow = Knowing(clock)
        store = Store([ram(clock), slow], clock=clock)
        await slow.inner.put_many({make_key(1): Entry(b"v", 1.0, tenant=A)})
        slow.gate.clear()
        assert await store.get(make_key(2)) is None  # at once: nobody opens the gate
        reading = asyncio.create_task(store.get_many([make_key(1), make_key(2)]))
        await slow.arrived.wait()
        slow.gate.set()
        assert set(await reading) == {make_key(1)}
        await store.aclose()

    run(body())


class Overtaken(SlowTier):
    """Another process forgets right after the epoch was read."""

    overtake = False

    def epoch(self) -> int:
        epoch = self.current_epoch
        self.current_epoch += self.overtake
        return epoch


def test_a_forget_between_a_puts_look_at_the_epoch_and_its_write_wins() -> None:
    async def body() -> None:
        clock = ManualClock()
        slow = Overtaken(clock)
        store = Store([ram(clock), slow], clock=clock)
        asked = store.mark()
        slow.overtake = True
        assert store.put(make_key(1), b"v", tenant=A, since=asked)  # nothing to see yet
        slow.overtake = False
        await store.flush()
        assert await store.get(make_key(1)) is None
        assert await slow.keys() == []

    run(body())


def test_what_another_process_forgets_is_dropped_here_and_the_rest_stays() -> None:
    async def body() -> None:
        clock = ManualClock()
        slow = SlowTier(clock)
        store = Store([ram(clock), slow], clock=clock)
        slow.gate.clear()
        for number in range(4):
            store.put(make_key(number), b"v", tenant=A if number < 2 else B)
        await slow.arrived.wait()
        store.drop(Scope(tenant=A))
        assert [store.get_now(make_key(number)) is not None for number in range(4)] == [False, False, True, True]
        slow.gate.set()
        await store.flush()

    run(body())


def test_a_write_that_a_forget_overtook_is_undone_by_it() -> None:
    async def body() -> None:
        clock = ManualClock()
        slow = SlowTier(clock)
        store = Store([ram(clock), slow], clock=clock)
        slow.gate.clear()
        store.put(make_key(1), b"v", tenant=A)
        await slow.arrived.wait()  # the write is under way
        forgetting = asyncio.create_task(store.forget(Scope(tenant=A)))
        await asyncio.sleep(0)
        slow.gate.set()
        assert (await forgetting).complete
        await store.flush()
        assert await store.get(make_key(1)) is None

    run(body())


def test_what_is_being_forgotten_is_not_served_even_while_the_slower_tier_takes_its_time() -> None:
    async def body() -> None:
        clock = ManualClock()
        slow = SlowTier(clock)
        store = Store([ram(clock, 300), slow], clock=clock)
        slow.gate.clear()
        store.put(make_key(1), b"too large for memory" * 10, tenant=A)
        assert store.get_now(make_key(1)) is not None  # it waits to be written
        forgetting = asyncio.create_task(store.forget(Scope(tenant=A)))
        await asyncio.sleep(0)
        assert store.get_now(make_key(1)) is None
        slow.gate.set()
        assert (await forgetting).complete

    run(body())


def test_a_write_prepared_before_another_process_forgot_is_dropped() -> None:
    async def body() -> None:
        clock = ManualClock()
        events: list[Event] = []
        slow = SlowTier(clock)
        store = Store([ram(clock), slow], clock=clock, emit=events.append)
        slow.gate.clear()
        store.put(make_key(1), b"v", tenant=A)
        await slow.arrived.wait()
        slow.current_epoch += 1
        slow.gate.set()
        await store.flush()
        assert await store.get(make_key(1)) is None
        assert Dropped("slow", 1) in events

    run(body())


def test_a_put_during_a_read_of_the_same_key_wins() -> None:
    async def body() -> None:
        clock = ManualClock()
        slow = SlowTier(clock)
        store = Store([ram(clock), slow], clock=clock)
        await slow.inner.put_many({make_key(1): Entry(b"old", 1.0, tenant=A)})
        slow.gate.clear()
        reading = asyncio.create_task(store.get(make_key(1)))
        await slow.arrived.wait()
        store.put(make_key(1), b"new", tenant=A)
        slow.gate.set()
        read = await reading
        assert read is not None
        assert read.value == b"new"
        await store.flush()
        assert (await slow.inner.get_many([make_key(1)]))[make_key(1)].value == b"new"

    run(body())


def test_writing_behind_is_bounded() -> None:
    async def body() -> None:
        clock = ManualClock()
        events: list[Event] = []
        slow = SlowTier(clock)
        options = StoreOptions(max_pending_bytes=3 * (1000 + ENTRY_OVERHEAD))
        store = Store([ram(clock), slow], clock=clock, options=options, emit=events.append)
        slow.gate.clear()
        for number in range(5):
            store.put(make_key(number), b"v" * 1000, tenant=A)
        slow.gate.set()
        await store.flush()
        assert events.count(Dropped("slow", 1)) == 2
        assert (await slow.stats()).num_entries == 3
        assert all(store.get_now(make_key(number)) for number in range(5))

    run(body())


# -- a tier that fails -------------------------------------------------------------------------------------------------


def test_a_failing_tier_makes_a_smaller_store(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        clock = ManualClock()
        events: list[Event] = []
        slow = SlowTier(clock)
        store = Store([ram(clock), slow], clock=clock, emit=events.append)
        slow.failing = "it is on fire"
        for number in range(3):
            assert store.put(make_key(number), b"v", tenant=A)
            await store.flush()
            assert await store.get(make_key(number)) is not None
            assert await store.get(make_key("absent")) is None
        assert set(await store.stats()) == {"ram"}
        receipt = await store.forget(Scope())
        assert receipt.failed == ("slow",)
        assert not receipt.complete
        operations = [event.operation for event in events if isinstance(event, Failed)]
        assert operations == ["put", "get"] * 3 + ["stats", "forget"]
        slow.failing = None
        store.put(make_key(9), b"v", tenant=A)
        await store.flush()
        assert (await store.stats())["slow"].num_entries == 1
        await store.aclose()

    with caplog.at_level(logging.WARNING):
        run(body())
    assert len(caplog.records) == 4  # one a minute for each kind of failure


def test_a_tier_that_hangs_is_not_waited_for_and_then_left_alone_for_a_while() -> None:
    async def body() -> None:
        clock = ManualClock()
        slow = SlowTier(clock)
        store = Store([ram(clock), slow], clock=clock, options=StoreOptions(lookup_timeout_s=0.001, rest_s=5))
        await slow.inner.put_many({make_key(1): Entry(b"v", 1.0, tenant=A)})
        slow.gate.clear()
        assert await store.get(make_key(1)) is None
        slow.gate.set()
        slow.arrived.clear()
        assert await store.get(make_key(1)) is None
        assert not slow.arrived.is_set()
        clock.advance(5)
        assert await store.get(make_key(1)) is not None

    run(body())


def test_a_store_whose_only_tier_is_slow_reads_its_own_writes() -> None:
    async def body() -> None:
        clock = ManualClock()
        slow = SlowTier(clock)
        store = Store([slow], clock=clock)
        slow.gate.clear()
        store.put(make_key(1), b"v", tenant=A, ttl_s=5)
        assert store.get_now(make_key(1)) is not None
        clock.advance(5)
        assert store.get_now(make_key(1)) is None
        slow.gate.set()
        await store.flush()

    run(body())


def test_an_entry_found_in_the_slowest_tier_is_copied_into_those_between() -> None:
    async def body() -> None:
        clock = ManualClock()
        middle, slow = SlowTier(clock), SlowTier(clock)
        store = Store([ram(clock), middle, slow], clock=clock)
        await slow.inner.put_many({make_key(1): Entry(b"v", 1.0, tenant=A)})
        assert await store.get(make_key(1)) is not None
        await store.flush()
        assert len(await middle.keys()) == 1

    run(body())


class Noting(SlowTier):
    """Remembers what was written together."""

    def __init__(self, clock: ManualClock, capacity: int = MIB) -> None:
        super().__init__(clock, capacity)
        self.written: list[set[Key]] = []

    async def put_many(self, entries: Mapping[Key, Entry], *, epoch: int | None = None) -> frozenset[Key]:
        self.written.append(set(entries))
        return await super().put_many(entries, epoch=epoch)


def test_small_entries_that_come_thick_and_fast_are_written_together_and_a_flush_waits_for_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(anaphora.store, "_WRITE_EVERY_S", 3600.0)

    async def body() -> None:
        clock = ManualClock()
        tier = Noting(clock)
        store = Store([ram(clock), tier], clock=clock)
        store.put(make_key(1), b"v", tenant=A)
        await tier.arrived.wait()  # the first one waits for nothing
        for number in (2, 3, 4):
            store.put(make_key(number), b"v", tenant=A)
            for _ in range(8):
                await asyncio.sleep(0)  # whatever would be written by now is
        await store.flush()
        store.put(make_key(5), b"v", tenant=A)
        await store.flush()
        assert tier.written == [{make_key(1)}, {make_key(2), make_key(3), make_key(4)}, {make_key(5)}]

    run(body())


@pytest.mark.parametrize("sizes", [(5 * MIB,), (10,) * 64], ids=["large", "many"])
def test_what_is_large_or_many_is_written_at_once(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    monkeypatch.setattr(anaphora.store, "_WRITE_EVERY_S", 3600.0)

    async def body() -> None:
        clock = ManualClock()
        tier = Noting(clock, 16 * MIB)
        store = Store([ram(clock), tier], clock=clock)
        store.put(make_key(1), b"v", tenant=A)
        await store.flush()
        tier.arrived.clear()
        for number, size in enumerate(sizes, 2):
            store.put(make_key(number), b"v" * size, tenant=A)
        async with asyncio.timeout(60):
            await tier.arrived.wait()
        assert len(tier.written) == 2

    run(body())


def test_giving_up_on_a_flush_does_not_give_up_on_the_writes() -> None:
    async def body() -> None:
        clock = ManualClock()
        slow = SlowTier(clock)
        store = Store([ram(clock), slow], clock=clock)
        slow.gate.clear()
        store.put(make_key(1), b"v", tenant=A)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await store.flush()
        slow.gate.set()
        await store.flush()
        assert len(await slow.keys()) == 1

    run(body())


def test_the_fastest_tier_with_a_key_is_where_it_lies(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        slow = SlowTier(clock)
        store = Store((ram(clock, 1000), disk(clock, tmp_path), slow), clock=clock)
        store.put(make_key(1), b"x" * 10, tenant=A)
        store.put(make_key(2), b"x" * 2000, tenant=A)  # too large for memory
        await store.flush()
        await slow.inner.put_many({make_key(3): Entry(b"abc", clock.now_s())})
        store.put(make_key(4), b"x" * 3000, tenant=A)  # on its way to both slower tiers
        found = await store.locate([make_key(number) for number in range(6)])
        places = {key: name for key, (name, _) in found.items()}
        assert places.pop(make_key(4)) in ("disk", "slow")
        assert places == {make_key(1): "ram", make_key(2): "disk", make_key(3): "slow"}
        assert found[make_key(3)] == ("slow", 3 + ENTRY_OVERHEAD)
        slow.failing = "gone"
        assert make_key(3) not in await store.locate([make_key(3)])
        await store.aclose()

    run(body())


def test_a_deleted_key_is_in_no_tier_any_more_and_the_others_are(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        store = Store((ram(clock), disk(clock, tmp_path)), clock=clock)
        for number in range(3):
            store.put(make_key(number), b"x", tenant=A)
        await store.flush()
        store.put(make_key(3), b"x", tenant=A)  # still to be written
        await store.delete([make_key(1), make_key(3), make_key(9)])
        await store.flush()
        assert set(await store.get_many([make_key(number) for number in range(4)])) == {make_key(0), make_key(2)}
        await store.aclose()

    run(body())


def test_what_was_touched_last_leaves_last(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        store = Store((ram(clock), disk(clock, tmp_path, 4 * (100 + ENTRY_OVERHEAD))), clock=clock)
        for number in range(4):
            store.put(make_key(number), b"x" * 100, tenant=A)
        await store.flush()
        store.touch(make_key(number) for number in (3, 2, 1, 0, 9))
        for number in (4, 5):
            store.put(make_key(number), b"x" * 100, tenant=A)
        await store.flush()
        await store.aclose()
        again = disk(clock, tmp_path, MIB)
        assert set(await again.keys()) == {make_key(number) for number in (0, 1, 4, 5)}
        await again.aclose()

    run(body())


def test_what_is_kept_is_kept_in_every_tier_that_can_be_reached(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        size = 100 + ENTRY_OVERHEAD
        gone = SlowTier(clock)
        store = Store((ram(clock, 4 * size), disk(clock, tmp_path, 4 * size), gone), clock=clock)
        store.put(make_key(0), b"x" * 100, tenant=A)
        await store.flush()
        gone.failing = "away"
        assert await store.keep([make_key(0), make_key("unknown")], clock.now_s() + 60) == {"ram": 1, "disk": 1}
        for number in range(1, 9):
            store.put(make_key(number), b"x" * 100, tenant=A)
        await store.flush()
        await store.aclose()
        again = disk(clock, tmp_path, MIB)
        assert make_key(0) in await again.keys()
        await again.aclose()

    run(body())
