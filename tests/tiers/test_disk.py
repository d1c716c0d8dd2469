from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import secrets
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.tiers import neighbour
from tests.tiers.neighbour import INLINE_BYTES, ask, entry_of, open_tier

from anaphora.clock import ManualClock, SystemClock
from anaphora.errors import TierFailed
from anaphora.events import Damaged, Event, Evicted
from anaphora.policies.gdsf import GDSF
from anaphora.testing.tiers import make_entry, make_key
from anaphora.tiers.base import ALL_KEPT_SHARE, ENTRY_OVERHEAD, Entry, Eviction
from anaphora.tiers.disk import DiskOptions, DiskTier, index
from anaphora.tiers.disk.rows import checksum as checksum_of
from anaphora.tiers.disk.traces import SharedTraces
from anaphora.types import Key, Scope, Tenant

MIB = 1 << 20
LARGE = INLINE_BYTES + 1
LATER = 1e12
"""Seconds since the epoch."""


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


def index_of(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / "index.db", isolation_level=None)


def check_folder(folder: Path, capacity: int) -> set[str]:
    """Invariant 4, seen from outside: totals are sums, no file without a row, no row without a file. Names of the files."""
    db = index_of(folder)
    try:
        used, total = db.execute("SELECT used, (SELECT COALESCE(SUM(size), 0) FROM entries) FROM meta").fetchone()
        files = {file for (file,) in db.execute("SELECT file FROM entries WHERE file IS NOT NULL")}
        by_tenant = dict(db.execute("SELECT tenant, SUM(size) FROM entries GROUP BY tenant"))
        if db.execute("PRAGMA table_info(used_by_tenant)").fetchall():
            assert dict(db.execute("SELECT * FROM used_by_tenant")) == by_tenant
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        db.close()
    assert used == total <= capacity
    assert set(os.listdir(folder / "values")) == files
    return files


def put_aside(folder: Path) -> list[Path]:
    return list(folder.glob("damaged-*"))


def files_with(words: str, folder: Path) -> str:
    """Looked at by another process: closing a file of the index in this one would drop SQLite's locks on it."""
    return subprocess.run(["grep", "-rl", words, folder], capture_output=True, text=True, check=False).stdout


@contextmanager
def killed_in_the_end(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    with process:
        try:
            yield process
        finally:
            process.kill()


# -- damage ------------------------------------------------------------------------------------------------------------


def test_entries_are_there_after_reopening(tmp_path: Path) -> None:
    async def body() -> None:
        names = [str(number) for number in range(20)]
        first = open_tier(tmp_path, MIB)
        await first.put_many({make_key(name): entry_of(name) for name in names})
        await first.aclose()
        again = open_tier(tmp_path, MIB)
        assert await again.get_many([make_key(name) for name in names]) == {make_key(name): entry_of(name) for name in names}
        await again.aclose()
        assert check_folder(tmp_path, MIB)

    run(body())


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE entries SET value = X'00' WHERE file IS NULL",
        "UPDATE entries SET value = NULL",
        "UPDATE entries SET value = 'text'",
        "UPDATE entries SET tenant = 'b'",
        "UPDATE entries SET model = 5",
        "UPDATE entries SET tags = 'no json'",
        "UPDATE entries SET expires_at = 9e99",
        "UPDATE entries SET checksum = X''",
        "UPDATE entries SET key = (SELECT key FROM entries WHERE id > 2)",
    ],
)
def test_a_damaged_row_is_a_counted_miss_and_gone(tmp_path: Path, damage: str) -> None:
    events: list[Event] = []

    async def body() -> None:
        tier = DiskTier(DiskOptions(str(tmp_path), MIB), clock=ManualClock(), emit=events.append)
        key, other = make_key(1), make_key(2)
        await tier.put_many({key: make_entry(100), other: make_entry(200)})
        db = index_of(tmp_path)
        if "SET key" in damage:  # bytes that strayed under another key
            db.execute("DELETE FROM entries WHERE key = ?", (other,))
            db.execute("UPDATE entries SET key = ?", (other,))
            key = other
        else:
            db.execute(f"{damage} {'AND' if 'WHERE' in damage else 'WHERE'} key = ?", (key,))
        db.close()
        assert await tier.get_many([key]) == {}
        assert key not in await tier.keys()
        assert (await tier.stats()).num_damaged == 1
        assert Damaged("disk", 1) in events
        await tier.put_many({key: make_entry(100)})
        assert await tier.get_many([key]) == {key: make_entry(100)}
        await tier.aclose()
        check_folder(tmp_path, MIB)

    run(body())


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_a_counted_miss_and_gone(tmp_path: Path, damage: str) -> None:
    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        await tier.put_many({make_key(1): make_entry(LARGE), make_key(2): make_entry(LARGE, fill=b"y")})
        db = index_of(tmp_path)
        (name,) = db.execute("SELECT file FROM entries WHERE key = ?", (make_key(1),)).fetchone()
        db.close()
        file = tmp_path / "values" / name
        match damage:
            case "flip":
                file.write_bytes(b"X" + file.read_bytes()[1:])
            case "truncate":
                os.truncate(file, 5)
            case "remove":
                file.unlink()
        assert await tier.get_many([make_key(1), make_key(2)]) == {make_key(2): make_entry(LARGE, fill=b"y")}
        assert (await tier.stats()).num_damaged == 1
        await tier.aclose()
        assert len(check_folder(tmp_path, MIB)) == 1

    run(body())


def spoil_header(folder: Path) -> None:
    (folder / "index.db").write_bytes(b"this is not a database" * 500)


def spoil_pages(folder: Path) -> None:
    size = (folder / "index.db").stat().st_size
    with open(folder / "index.db", "r+b") as file:
        file.seek(4096)
        file.write(random.Random(1).randbytes(size - 4096))


def spoil_format(folder: Path) -> None:
    db = index_of(folder)
    db.execute("PRAGMA user_version = 999")
    db.close()


def spoil_totals(folder: Path) -> None:
    db = index_of(folder)
    db.execute("DELETE FROM meta")
    db.close()


@pytest.mark.parametrize("spoil", [spoil_header, spoil_pages, spoil_format, spoil_totals])
def test_a_corrupt_index_is_put_aside_and_a_fresh_one_started(
    tmp_path: Path, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        await tier.put_many({make_key(number): make_entry(LARGE) for number in range(10)})
        await tier.aclose()
        spoil(tmp_path)
        again = open_tier(tmp_path, MIB)
        key = make_key("new")
        await again.put_many({key: make_entry(LARGE)})
        assert await again.get_many([key, make_key(1)]) == {key: make_entry(LARGE)}
        assert put_aside(tmp_path)
        await again.forget(Scope(tenant=Tenant("a")))
        assert not put_aside(tmp_path)  # it may hold what was to be forgotten
        await again.aclose()
        check_folder(tmp_path, MIB)

    with caplog.at_level(logging.WARNING):
        run(body())
    assert "put aside" in caplog.text


def test_an_index_replaced_by_one_process_is_found_by_the_others(tmp_path: Path) -> None:
    async def body() -> None:
        ours, theirs = open_tier(tmp_path, MIB), open_tier(tmp_path, MIB)
        await theirs.put_many({make_key(1): make_entry()})
        assert await ours.keys() == [make_key(1)]
        epoch = theirs.epoch()
        (tmp_path / "index.db").rename(tmp_path / "elsewhere.db")
        await ours.put_many({make_key(2): make_entry()})
        assert await theirs.keys() == [make_key(2)]
        assert theirs.epoch() == ours.epoch() == epoch
        await ours.aclose()
        await theirs.aclose()

    run(body())


def test_a_folder_removed_under_a_running_process_is_made_again(tmp_path: Path) -> None:
    async def body() -> None:
        folder = tmp_path / "cache"
        tier = open_tier(folder, MIB)
        await tier.put_many({make_key(1): make_entry(LARGE)})
        folder.rename(tmp_path / "gone")
        assert await tier.get_many([make_key(1)]) == {}
        await tier.put_many({make_key(2): make_entry(LARGE)})
        other = open_tier(folder, MIB)
        assert await other.keys() == [make_key(2)]
        before = tier.epoch()
        await other.forget(Scope())
        assert tier.epoch() != before
        await tier.aclose()
        await other.aclose()

    run(body())


# -- what is known not to be there -------------------------------------------------------------------------------------


def test_the_index_is_not_asked_for_what_was_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Key] = []
    original = index.DiskIndex.get

    def get(self: index.DiskIndex, keys: Collection[Key]) -> index.Found:
        asked.extend(keys)
        return original(self, keys)

    monkeypatch.setattr(index.DiskIndex, "get", get)

    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        await tier.put_many({make_key(number): make_entry() for number in range(3)})
        found = await tier.get_many([make_key(number) for number in range(100)])
        assert set(found) == set(asked) == {make_key(number) for number in range(3)}
        asked.clear()
        await tier.forget(Scope())
        assert await tier.get_many([make_key(1)]) == {}
        assert asked == []  # what is forgotten has left no trace
        await tier.aclose()

    run(body())


def test_what_another_process_puts_is_found_though_it_was_just_not_there(tmp_path: Path) -> None:
    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        with killed_in_the_end(neighbour.start(tmp_path, MIB, "serve")) as other:
            for name in "abcde":
                assert await tier.get_many([make_key(name)]) == {}
                assert ask(other, f"put {name}") == "ok"
                assert await tier.get_many([make_key(name)]) != {}
                assert ask(other, f"get {name}{name}") == "-"
                await tier.put_many({make_key(f"{name}{name}"): make_entry(7)})
                assert ask(other, f"get {name}{name}") == "7"
        await tier.aclose()

    run(body())


def wiped(traces: Path) -> None:
    """As a power cut may leave them."""
    traces.write_bytes(bytes(traces.stat().st_size))


@pytest.mark.parametrize(
    "harm", [wiped, Path.unlink, lambda traces: traces.write_bytes(b"short")], ids=["wiped", "gone", "cut"]
)
def test_traces_are_gathered_anew_on_opening(harm: Callable[[Path], object], tmp_path: Path) -> None:
    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        await tier.put_many({make_key(1): make_entry()})
        await tier.aclose()
        harm(tmp_path / "traces")
        again = open_tier(tmp_path, MIB)
        assert make_key(1) in await again.get_many([make_key(1)])
        await again.aclose()

    run(body())


def test_nobody_goes_by_traces_where_somebody_cannot_leave_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "no space")

    async def body() -> None:
        ours, theirs = open_tier(tmp_path, MIB), open_tier(tmp_path, MIB)
        assert await ours.get_many([make_key(1)]) == {}
        with monkeypatch.context() as patch:
            patch.setattr(index, "SharedTraces", full)
            await theirs.put_many({make_key(1): make_entry()})
        assert make_key(1) in await ours.get_many([make_key(1)])
        await ours.put_many({make_key(2): make_entry()})  # gathers them again
        assert len(await theirs.get_many([make_key(1), make_key(2)])) == 2
        await ours.aclose()
        await theirs.aclose()

    run(body())


def test_what_a_failed_write_would_have_replaced_is_still_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: index.DiskIndex, db: sqlite3.Connection, key: Key, entry: Entry) -> None:
        raise OSError(errno.EIO, "broken")

    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        await tier.put_many({make_key(1): make_entry()})
        with monkeypatch.context() as patch:
            patch.setattr(index.DiskIndex, "_insert", fail)
            patch.setattr(index, "_GATHER_AFTER", 0)
            with pytest.raises(TierFailed):
                await tier.put_many({make_key(1): make_entry(), make_key(2): make_entry()})
        assert set(await tier.get_many([make_key(1), make_key(2)])) == {make_key(1)}
        await tier.aclose()

    run(body())


def test_traces_of_what_stays_are_there_while_all_are_gathered(tmp_path: Path) -> None:
    traces = SharedTraces(tmp_path / "traces")
    stays, goes = [make_key(number) for number in range(1000)], [make_key(f"gone {number}") for number in range(1000)]
    for key in stays + goes:
        traces.add(key)
    looking = SharedTraces(tmp_path / "traces")
    done, missed, looks = threading.Event(), 0, 0

    def look() -> None:
        nonlocal missed, looks
        while not done.is_set():
            missed += sum(not looking.has(key) for key in stays)
            looks += 1

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(20):
            traces.gather(stays)
    finally:
        done.set()
        thread.join()
    assert looks
    assert not missed
    assert not any(map(looking.has, goes))


# -- capacity and order ------------------------------------------------------------------------------------------------


def test_a_smaller_capacity_takes_effect_on_opening(tmp_path: Path) -> None:
    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        await tier.put_many({make_key(number): make_entry(LARGE) for number in range(10)})
        await tier.aclose()
        again = open_tier(tmp_path, 3 * (LARGE + 256))
        assert set(await again.keys()) == {make_key(number) for number in (7, 8, 9)}
        assert (await again.stats()).num_evicted == 7
        await again.aclose()
        assert len(check_folder(tmp_path, MIB)) == 3

    run(body())


def test_the_order_of_use_survives_reopening(tmp_path: Path) -> None:
    async def body() -> None:
        size = LARGE + 256
        tier = open_tier(tmp_path, 3 * size)
        await tier.put_many({make_key(number): make_entry(LARGE) for number in range(3)})
        await tier.get_many([make_key(0)])
        await tier.aclose()
        again = open_tier(tmp_path, 3 * size)
        await again.put_many({make_key(3): make_entry(LARGE)})
        assert set(await again.keys()) == {make_key(number) for number in (0, 2, 3)}
        await again.aclose()

    run(body())


def test_reading_does_not_write(tmp_path: Path) -> None:
    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        await tier.put_many({make_key(1): make_entry()})
        await tier.get_many([make_key(1)])
        log_before = (tmp_path / "index.db-wal").stat().st_size
        for _ in range(20):
            await tier.get_many([make_key(1), make_key(2)])
        assert (tmp_path / "index.db-wal").stat().st_size == log_before
        await tier.aclose()

    run(body())


def test_forgotten_bytes_are_in_no_file_of_the_folder(tmp_path: Path) -> None:
    async def body() -> None:
        tier = open_tier(tmp_path, MIB, Eviction(tenant_share=0.9))
        secret = b"the-secret-words"
        for number in range(30):
            await tier.put_many({make_key(number): Entry(secret * (1 + number * 10), 1.0, tenant=Tenant("secretive"))})
        await tier.put_many({make_key("other"): make_entry()})
        assert await tier.keep([make_key(number) for number in range(30)], LATER) == 30
        assert await tier.forget(Scope(tenant=Tenant("secretive"))) == 30
        assert files_with("the-secret-words", tmp_path) == files_with("secretive", tmp_path) == ""
        assert await tier.keys() == [make_key("other")]
        await tier.aclose()

    run(body())


# -- the order of leaving, and what does not leave ---------------------------------------------------------------------


def costing(seconds: float, size: int = LARGE) -> Entry:
    return Entry(b"x" * size, 1.0, cost_s=seconds)


def order_of(folder: Path) -> str:
    db = index_of(folder)
    (order,) = db.execute("SELECT ranked_by FROM meta").fetchone()
    db.close()
    return str(order)


@pytest.mark.parametrize("seed", range(3))
def test_processes_that_share_a_folder_follow_one_order_over_restarts(tmp_path: Path, seed: int) -> None:
    """Whoever of them puts and reads: what leaves is what leaves one policy that is told of everything."""
    capacity = 10_000

    async def body() -> None:
        draw = random.Random(seed)
        policy: GDSF[Key] = GDSF()
        sizes: dict[Key, int] = {}
        tiers = [open_tier(tmp_path, capacity, Eviction("gdsf")) for _ in range(2)]
        for number in range(200):
            side = draw.randrange(2)
            used = draw.sample(sorted(sizes), k=min(len(sizes), draw.randrange(4)))
            tiers[side].touch(used)
            for key in used:
                policy.touch(key)
            key, entry = make_key(number), costing(draw.choice([0.01, 0.5, 2.0, 9.0]), draw.randrange(3000))
            while sum(sizes.values()) + entry.size > capacity:
                victim = next(policy.victims())
                policy.remove(victim)
                del sizes[victim]
            policy.insert(key, entry.size, entry.cost_s)
            sizes[key] = entry.size
            await tiers[side].put_many({key: entry})
            assert set(await tiers[1 - side].keys()) == set(sizes)
            if draw.randrange(10) == 0:
                await tiers[side].aclose()
                tiers[side] = open_tier(tmp_path, capacity, Eviction("gdsf"))
        for tier in tiers:
            await tier.aclose()

    run(body())
    check_folder(tmp_path, capacity)


def test_another_order_takes_effect_on_reopening(tmp_path: Path) -> None:
    size = LARGE + ENTRY_OVERHEAD

    async def body() -> None:
        tier = open_tier(tmp_path, 4 * size)
        for name, seconds in {"dear": 9.0, "used": 2.0, "plain": 3.0, "cheap": 1.0}.items():
            await tier.put_many({make_key(name): costing(seconds)})
        tier.touch([make_key("used")])
        await tier.aclose()

        by_worth = open_tier(tmp_path, 4 * size, Eviction("gdsf"))
        await by_worth.put_many({make_key("first"): costing(5.0)})
        assert set(await by_worth.keys()) == {make_key(name) for name in ("dear", "used", "plain", "first")}
        await by_worth.put_many({make_key("second"): costing(5.0)})
        assert set(await by_worth.keys()) == {make_key(name) for name in ("dear", "used", "first", "second")}, "uses count"
        await by_worth.aclose()

        by_use = open_tier(tmp_path, 4 * size)
        await by_use.put_many({make_key("third"): costing(0.0)})
        assert set(await by_use.keys()) == {make_key(name) for name in ("used", "first", "second", "third")}
        await by_use.aclose()

        larger = open_tier(tmp_path, 5 * size, Eviction("gdsf"))
        for name, seconds in {"new": 2.5, "fourth": 5.0, "fifth": 5.0}.items():
            await larger.put_many({make_key(name): costing(seconds)})
        expected = {make_key(name) for name in ("used", "first", "second", "fourth", "fifth")}
        assert set(await larger.keys()) == expected, "the new one is no younger than those that were ranked anew"
        await larger.aclose()

    run(body())


def test_another_order_says_what_a_smaller_capacity_has_no_room_for(tmp_path: Path) -> None:
    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        for name, seconds in {"dear": 9.0, "plain": 3.0, "cheap": 1.0}.items():
            await tier.put_many({make_key(name): costing(seconds)})
        await tier.aclose()
        smaller = open_tier(tmp_path, 2 * (LARGE + ENTRY_OVERHEAD), Eviction("gdsf"))
        assert set(await smaller.keys()) == {make_key("dear"), make_key("plain")}
        await smaller.aclose()

    run(body())


def test_what_leaves_for_its_tenants_share_ages_no_others(tmp_path: Path) -> None:
    async def body() -> None:
        size = LARGE + ENTRY_OVERHEAD
        tier = open_tier(tmp_path, 6 * size, Eviction("gdsf", tenant_share=0.5))
        for name, seconds in {"plain": 3.0, "dear": 9.0, "dearest": 10.0}.items():
            await tier.put_many({make_key(name): costing(seconds)})
        other = [Entry(b"x" * LARGE, 1.0, cost_s=seconds, tenant=Tenant("b")) for seconds in (4.0, 7.0, 8.0, 5.0, 6.0)]
        for number, entry in enumerate(other[:4]):
            await tier.put_many({make_key(number): entry})
        assert set(await tier.keys(Scope(tenant=Tenant("b")))) == {make_key(number) for number in (1, 2, 3)}
        await tier.put_many({make_key(4): other[4]})
        assert make_key(3) not in await tier.keys(), "it would be worth 9 had it been put after what was worth 4 left the front"
        await tier.aclose()

    run(body())


def test_who_only_looks_leaves_the_order_alone(tmp_path: Path) -> None:
    async def body() -> None:
        size = LARGE + ENTRY_OVERHEAD
        tier = open_tier(tmp_path, 2 * size, Eviction("gdsf"))
        await tier.put_many({make_key("dear"): costing(9.0)})
        await tier.put_many({make_key("cheap"): costing(1.0)})
        onlooker = open_tier(tmp_path, MIB)
        assert len(await onlooker.get_many([make_key("cheap")])) == 1
        assert await onlooker.keep([make_key("cheap")], 0) == 0
        await onlooker.aclose()  # says what it has used
        await tier.put_many({make_key("new"): costing(5.0)})
        assert set(await tier.keys()) == {make_key("dear"), make_key("new")}
        await tier.aclose()

    run(body())
    assert order_of(tmp_path) == "gdsf"


def test_processes_that_disagree_about_the_order_follow_the_one_that_came_last(tmp_path: Path) -> None:
    async def body() -> None:
        first, last = open_tier(tmp_path, MIB, Eviction("gdsf")), open_tier(tmp_path, MIB)
        orders = []
        for number, tier in enumerate((first, last, first, last)):
            await tier.put_many({make_key(number): costing(1.0)})
            orders.append(order_of(tmp_path))
        assert orders == ["gdsf", "lru", "lru", "lru"]
        await first.aclose()
        await last.aclose()

    run(body())


def test_what_one_process_keeps_no_other_evicts_also_after_a_restart(tmp_path: Path) -> None:
    async def body() -> None:
        size = LARGE + ENTRY_OVERHEAD
        ours, theirs = open_tier(tmp_path, 8 * size), open_tier(tmp_path, 8 * size)
        kept = [make_key("a"), make_key("b")]
        await ours.put_many({key: make_entry(LARGE) for key in kept})
        assert await ours.keep(kept, LATER) == 2
        await theirs.put_many({make_key(number): make_entry(LARGE) for number in range(20)})
        assert (await theirs.stats()).kept_bytes == 2 * size
        assert await theirs.keep([make_key(19)], LATER) == 0, "the share is one for all"
        await ours.aclose()
        await theirs.aclose()
        again = open_tier(tmp_path, 8 * size)
        await again.put_many({make_key(number): make_entry(LARGE) for number in range(20, 40)})
        assert set(kept) <= set(await again.keys())
        assert len(await again.keys()) == 8
        await again.aclose()

    run(body())


def test_a_shorter_time_to_keep_changes_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        options = DiskOptions(str(tmp_path), 4 * (10 + ENTRY_OVERHEAD))
        tier = DiskTier(options, clock=clock)
        key = make_key("kept")
        await tier.put_many({key: make_entry(10)})
        assert [await tier.keep([key], clock.now_s() + seconds) for seconds in (100, 10)] == [1, 1]
        clock.advance(99)
        await tier.put_many({make_key(number): make_entry(10) for number in range(8)})
        assert key in await tier.keys()
        clock.advance(1)
        await tier.put_many({make_key(number): make_entry(10) for number in range(8, 12)})
        assert key not in await tier.keys()
        await tier.aclose()

    run(body())


def test_keeping_all_or_nothing_where_the_medium_fails_halfway(tmp_path: Path) -> None:
    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        keys = [make_key(number) for number in range(4)]
        await tier.put_many({key: make_entry() for key in keys})
        db = index_of(tmp_path)
        (third,) = db.execute("SELECT id FROM entries WHERE key = ?", (keys[2],)).fetchone()
        db.execute(
            f"CREATE TRIGGER fails AFTER UPDATE OF kept_until ON entries WHEN NEW.id = {third} "
            "BEGIN SELECT json('no json'); END"
        )
        with pytest.raises(TierFailed):
            await tier.keep(keys, LATER)
        assert (await tier.stats()).kept_bytes == 0
        db.execute("DROP TRIGGER fails")
        db.close()
        assert await tier.keep(keys, LATER) == 4
        await tier.aclose()

    run(body())


def test_a_capacity_smaller_than_what_is_kept_takes_effect_on_opening(tmp_path: Path) -> None:
    events: list[Event] = []

    async def body() -> None:
        size = LARGE + ENTRY_OVERHEAD
        tier = open_tier(tmp_path, 20 * size, Eviction(keep_share=0.5))
        keys = [make_key(number) for number in range(20)]
        await tier.put_many({key: make_entry(LARGE) for key in keys})
        assert await tier.keep(keys, LATER) == 10
        await tier.aclose()
        eviction = Eviction(keep_share=0.5)
        options = DiskOptions(str(tmp_path), 4 * size, inline_bytes=INLINE_BYTES, eviction=eviction)
        again = DiskTier(options, clock=SystemClock(), emit=events.append)
        assert set(await again.keys()) == {*keys[8:10], *keys[18:]}, "the shares are of the smaller capacity now"
        stats = await again.stats()
        assert (stats.used_bytes, stats.kept_bytes, stats.num_evicted) == (4 * size, 2 * size, 16)
        assert events == [Evicted("disk", 16, 16 * size)]
        assert await again.put_many({make_key("new"): make_entry(LARGE)}) == {make_key("new")}
        assert set(await again.keys()) == {*keys[8:10], keys[19], make_key("new")}
        await again.aclose()
        check_folder(tmp_path, 4 * size)

    run(body())


def test_a_smaller_share_of_what_is_kept_takes_effect_on_opening(tmp_path: Path) -> None:
    async def body() -> None:
        size = LARGE + ENTRY_OVERHEAD
        tier = open_tier(tmp_path, 20 * size, Eviction(keep_share=0.5))
        keys = [make_key(number) for number in range(10)]
        await tier.put_many({key: make_entry(LARGE) for key in keys})
        assert await tier.keep(keys, LATER) == 10
        await tier.aclose()
        again = open_tier(tmp_path, 20 * size, Eviction(keep_share=0.2))
        assert (await again.stats()).kept_bytes == 4 * size
        assert (await again.stats()).num_entries == 10
        await again.aclose()

    run(body())


def test_a_share_for_tenants_counts_what_was_there_before(tmp_path: Path) -> None:
    async def body() -> None:
        size = LARGE + ENTRY_OVERHEAD
        tier = open_tier(tmp_path, 10 * size)
        await tier.put_many({make_key(number): make_entry(LARGE) for number in range(9)})
        await tier.put_many({make_key("other"): make_entry(LARGE, tenant="b")})
        await tier.aclose()
        for _ in range(2):
            again = open_tier(tmp_path, 10 * size, Eviction(tenant_share=0.5))
            await again.put_many({make_key("new"): make_entry(LARGE)})
            expected = {*(make_key(number) for number in range(5, 9)), make_key("other"), make_key("new")}
            assert set(await again.keys()) == expected
            await again.aclose()
        check_folder(tmp_path, 10 * size)

    run(body())


def test_an_entry_that_made_room_and_is_put_again_in_one_batch_is_said_to_be_stored(tmp_path: Path) -> None:
    async def body() -> None:
        tier = open_tier(tmp_path, 2 * (LARGE + ENTRY_OVERHEAD))
        await tier.put_many({make_key(1): make_entry(LARGE), make_key(2): make_entry(LARGE)})
        batch = {make_key(3): make_entry(LARGE), make_key(1): make_entry(LARGE)}
        assert await tier.put_many(batch) == set(batch) == set(await tier.keys())
        await tier.aclose()

    run(body())


@pytest.mark.parametrize("seed", range(6))
def test_shares_and_what_is_kept_hold_over_any_history(tmp_path: Path, seed: int) -> None:
    capacity = 20_000
    draw = random.Random(seed)
    eviction = Eviction(draw.choice(["lru", "gdsf"]), tenant_share=0.6, keep_share=0.3)

    def check(now_s: float) -> None:
        db = index_of(tmp_path)
        used = dict(db.execute("SELECT tenant, SUM(size) FROM entries GROUP BY tenant"))
        alive = "kept_until > :now AND IFNULL(expires_at > :now, TRUE)"
        kept = dict(db.execute(f"SELECT tenant, SUM(size) FROM entries WHERE {alive} GROUP BY tenant", {"now": now_s}))
        db.close()
        assert all(size <= eviction.tenant_share * capacity for size in used.values())
        assert all(size <= eviction.keep_share * capacity for size in kept.values())
        assert sum(kept.values()) <= ALL_KEPT_SHARE * capacity
        check_folder(tmp_path, capacity)

    async def body() -> None:
        clock = ManualClock()
        options = DiskOptions(str(tmp_path), capacity, inline_bytes=1000, eviction=eviction)
        tiers = [DiskTier(options, clock=clock) for _ in range(2)]
        kept: dict[Key, float] = {}
        await tiers[0].put_many({make_key("a0"): make_entry()})
        for _ in range(150):
            tier = draw.choice(tiers)
            names = draw.sample([f"{tenant}{number}" for tenant in "abcd" for number in range(8)], k=draw.randrange(1, 5))
            keys = [make_key(name) for name in names]
            now_s = clock.now_s()
            kept = {key: until_s for key, until_s in kept.items() if until_s > now_s}
            match draw.randrange(9):
                case 0:
                    await tier.delete_many(keys)
                    kept = {key: until_s for key, until_s in kept.items() if key not in keys}
                case 1:
                    await tier.forget(Scope(tenant=Tenant(names[0][0])))
                    left = set(await tier.keys())
                    kept = {key: until_s for key, until_s in kept.items() if key in left}
                case 2:
                    clock.advance(draw.choice([1, 5, 30]))
                case 3:
                    await tier.get_many(keys)
                case 4:
                    await tier.aclose()
                    tiers[tiers.index(tier)] = DiskTier(options, clock=clock)
                case 5 | 6:
                    until_s = now_s + draw.choice([-1, 3, 20])
                    there = await tier.sizes(keys)
                    number = await tier.keep(keys, until_s)
                    assert number <= len(there)
                    if until_s <= now_s:
                        kept = {key: until_s for key, until_s in kept.items() if key not in keys}
                    elif number == len(there):
                        kept.update({key: max(until_s, kept.get(key, 0)) for key in there})
                case _:
                    entries = {
                        make_key(name): Entry(
                            b"x" * draw.randrange(4000),
                            1.0,
                            draw.choice([None, None, now_s + 10]),
                            draw.choice([0.0, 0.1, 5.0]),
                            Tenant(name[0]),
                        )
                        for name in names
                    }
                    kept = {key: until_s for key, until_s in kept.items() if key not in entries}
                    stay = set(kept) & set(await tier.keys())
                    assert stay | await tier.put_many(entries) <= set(await tier.keys())
            check(clock.now_s())
        for tier in tiers:
            await tier.aclose()

    run(body())


FORMAT_1 = """
CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 0), used INTEGER NOT NULL CHECK (used >= 0), tick INTEGER NOT NULL);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, accessed INTEGER NOT NULL, file TEXT,
    stored_at REAL NOT NULL, expires_at REAL, cost REAL NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL,
    tags TEXT NOT NULL, checksum BLOB NOT NULL, value BLOB
);
CREATE INDEX entries_by_access ON entries (accessed);
CREATE INDEX entries_by_expiry ON entries (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX entries_by_file ON entries (file) WHERE file IS NOT NULL;
CREATE TRIGGER used_grows AFTER INSERT ON entries BEGIN UPDATE meta SET used = used + NEW.size; END;
CREATE TRIGGER used_shrinks AFTER DELETE ON entries BEGIN UPDATE meta SET used = used - OLD.size; END;
INSERT INTO meta VALUES (0, 0, 0);
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
PRAGMA user_version = 1;
"""


def write_format_1(folder: Path, entries: dict[Key, Entry]) -> None:
    """What the first release wrote, the entries in the order of their last use."""
    (folder / "values").mkdir()
    db = index_of(folder)
    db.executescript(FORMAT_1)
    for tick, (key, entry) in enumerate(entries.items(), 1):
        file = None
        if len(entry.value) >= INLINE_BYTES:
            file = f"{key.hex()}-{secrets.token_hex(8)}"
            (folder / "values" / file).write_bytes(entry.value)
        value, checksum = entry.value if file is None else None, checksum_of(key, entry)
        about = (entry.stored_at_s, entry.expires_at_s, entry.cost_s, entry.tenant, entry.model, '["tag","of-a"]')
        row = (100 - tick, key, entry.size, tick, file, *about, checksum, value)
        db.execute(f"INSERT INTO entries VALUES ({','.join('?' * len(row))})", row)
        db.execute("UPDATE meta SET tick = ?", (1000 + tick,))
    db.close()


@pytest.mark.parametrize(("order", "leaves"), [("lru", "old"), ("gdsf", "large")])
def test_a_folder_of_the_first_release_is_taken_over(
    tmp_path: Path, order: Any, leaves: str, caplog: pytest.LogCaptureFixture
) -> None:
    entries = {
        make_key("old"): make_entry(10),
        make_key("large"): make_entry(9000),
        make_key("small"): make_entry(1500),
        make_key("last"): make_entry(LARGE),
    }
    write_format_1(tmp_path, entries)
    capacity = sum(entry.size for entry in entries.values())

    async def body() -> None:
        tier = open_tier(tmp_path, capacity, Eviction(order, tenant_share=0.99))
        await tier.put_many({make_key("new"): make_entry(0, tenant="b")})
        left = {key: entry for key, entry in entries.items() if key != make_key(leaves)}
        assert await tier.get_many(list(entries)) == left
        assert await tier.keep(list(left), LATER) > 0
        await tier.aclose()

    with caplog.at_level(logging.WARNING):
        run(body())
    assert not put_aside(tmp_path)
    assert not caplog.records
    check_folder(tmp_path, capacity)


# -- a failing medium --------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_fails_the_tier_and_is_tried_again_later(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        (tmp_path / "file").write_text("in the way")
        folder = tmp_path / "file" / "cache"
        tier = DiskTier(DiskOptions(str(folder), MIB), clock=clock)
        for _ in range(2):
            with pytest.raises(TierFailed):
                await tier.put_many({make_key(1): make_entry()})
        (tmp_path / "file").unlink()
        with pytest.raises(TierFailed):
            await tier.get_many([make_key(1)])
        clock.advance(10)
        await tier.put_many({make_key(1): make_entry()})
        assert await tier.keys() == [make_key(1)]
        await tier.aclose()
        with pytest.raises(TierFailed):
            await tier.keys()

    run(body())


def test_a_read_only_folder_fails_the_tier_and_nothing_else(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write to a read-only folder")

    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        with pytest.raises(TierFailed):
            await tier.put_many({make_key(1): make_entry()})
        with pytest.raises(TierFailed):
            await tier.get_many([make_key(1)])
        await tier.aclose()

    tmp_path.chmod(0o500)
    try:
        run(body())
    finally:
        tmp_path.chmod(0o700)


def test_a_file_size_limit_fails_writes_and_leaves_a_sound_folder(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: value files over 65 kB cannot be written, and sooner or later the index cannot grow."""
    with killed_in_the_end(neighbour.start(tmp_path, 100 * MIB, "fill", 65_000)) as process:
        assert process.stdout is not None
        stored, failures, intact = map(int, process.stdout.readline().split())
        assert process.wait() == 0
    assert failures > 0
    assert stored == intact > 0
    run(reopen(tmp_path, 100 * MIB))
    check_folder(tmp_path, 100 * MIB)


def test_a_full_disk_fails_writes_and_leaves_a_sound_folder(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        with killed_in_the_end(neighbour.start(tmp_path, 100 * MIB, "fill")) as process:
            assert process.stdout is not None
            stored, failures, intact = map(int, process.stdout.readline().split())
            assert process.wait() == 0
        assert failures > 0
        assert stored == intact > 0
        subprocess.run(["mount", "-o", "remount,size=20m", tmp_path], check=True)
        run(reopen(tmp_path, 100 * MIB))
        check_folder(tmp_path, 100 * MIB)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


async def reopen(folder: Path, capacity: int) -> None:
    tier = open_tier(folder, capacity)
    await tier.stats()
    await tier.aclose()


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def test_what_was_acknowledged_before_a_kill_is_there_and_nothing_is_orphaned(tmp_path: Path) -> None:
    draw = random.Random(20)
    acknowledged: list[str] = []
    for life in range(6):
        with killed_in_the_end(neighbour.start(tmp_path, 1000 * MIB, "write", f"life{life}-", 100_000)) as process:
            assert process.stdout is not None
            acknowledged += [process.stdout.readline().strip() for _ in range(draw.randrange(1, 60))]
            for _ in range(draw.randrange(20_000)):
                pass  # an instant that no step of the writer is in step with
            process.send_signal(signal.SIGKILL)
            acknowledged += process.stdout.read().split("\n")[:-1]

    async def body() -> None:
        tier = open_tier(tmp_path, 1000 * MIB)
        entries = await tier.get_many([make_key(name) for name in acknowledged])
        for name in acknowledged:
            assert entries.get(make_key(name)) == entry_of(name), name
        everything = await tier.get_many(await tier.keys())
        assert len(everything) <= len(acknowledged) + 6  # at most the one put that was not acknowledged any more
        assert (await tier.stats()).num_damaged == 0
        await tier.aclose()

    run(body())
    assert check_folder(tmp_path, 1000 * MIB)


def test_a_kill_amid_evictions_and_erasures_leaves_a_sound_folder(tmp_path: Path) -> None:
    draw = random.Random(21)
    capacity = 400_000
    entries = [entry_of(str(number)) for number in range(60)]

    async def look() -> None:
        tier = open_tier(tmp_path, capacity)
        everything = await tier.get_many(await tier.keys())
        assert all(entry in entries for entry in everything.values())
        assert (await tier.stats()).num_damaged == 0
        await tier.aclose()

    for life in range(3):
        with ExitStack() as stack:
            pair = [
                stack.enter_context(killed_in_the_end(neighbour.start(tmp_path, capacity, "churn", f"{life}-{side}")))
                for side in "ab"
            ]
            for process in pair:
                assert process.stdout is not None
                for _ in range(draw.randrange(5, 40)):
                    process.stdout.readline()
                process.send_signal(signal.SIGKILL)
        run(look())
        check_folder(tmp_path, capacity)


# -- several processes -------------------------------------------------------------------------------------------------


def test_two_processes_share_a_folder_and_its_capacity_is_never_passed(tmp_path: Path) -> None:
    capacity = 300_000
    run(reopen(tmp_path, capacity))
    db = index_of(tmp_path)
    with ExitStack() as stack:
        pair = [
            stack.enter_context(killed_in_the_end(neighbour.start(tmp_path, capacity, "write", prefix, 120)))
            for prefix in ("a", "b")
        ]
        largest = looks = 0
        while any(process.poll() is None for process in pair):
            used, total = db.execute("SELECT used, (SELECT COALESCE(SUM(size), 0) FROM entries) FROM meta").fetchone()
            assert used == total
            largest = max(largest, used, bytes_in(tmp_path / "values"))
            looks += 1
        for process in pair:
            assert process.stdout is not None
            assert process.wait() == 0
            assert len(process.stdout.read().split()) == 120  # not one put failed
    db.close()
    assert looks > 20
    assert capacity // 2 < largest <= capacity
    check_folder(tmp_path, capacity)


def bytes_in(folder: Path) -> int:
    """Of all files at one moment, as near as a listing comes to it: what vanishes meanwhile does not count."""
    before = os.listdir(folder)
    sizes = {}
    for name in before:
        try:
            sizes[name] = (folder / name).stat().st_size
        except FileNotFoundError:
            continue
    now = set(os.listdir(folder))
    return sum(size for name, size in sizes.items() if name in now)


def test_opening_does_not_sweep_away_what_a_living_process_writes(tmp_path: Path) -> None:
    with killed_in_the_end(neighbour.start(tmp_path, 1000 * MIB, "write", "w", 150)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while process.poll() is None:
            run(reopen(tmp_path, 1000 * MIB))

    async def body() -> None:
        tier = open_tier(tmp_path, 1000 * MIB)
        found = await tier.get_many([make_key(f"w{number}") for number in range(150)])
        assert len(found) == 150
        await tier.aclose()

    run(body())


def test_what_one_process_forgets_another_does_not_serve_from_memory(tmp_path: Path) -> None:
    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        await tier.put_many({make_key("1"): make_entry(77, tenant="a"), make_key("2"): make_entry(88, tenant="b")})
        with killed_in_the_end(neighbour.start(tmp_path, MIB, "serve")) as other:
            assert ask(other, "get 1") == ask(other, "ram 1") == "77"
            assert ask(other, "get 2") == "88"
            await tier.forget(Scope(tenant=Tenant("a")))
            assert ask(other, "ram 1") == "-"
            assert ask(other, "get 1") == "-"
            assert ask(other, "get 2") == "88"
            assert ask(other, "put mine") == "ok"
            assert ask(other, "ram mine") != "-"
            await tier.forget(Scope())
            assert {ask(other, f"{verb} {name}") for verb in ("ram", "get") for name in ("1", "2", "mine")} == {"-"}
            assert ask(other, "put mine") == "ok"  # and it goes on working
            assert make_key("mine") in await tier.keys()
        await tier.aclose()

    run(body())
