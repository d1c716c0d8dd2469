from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sqlite3
import subprocess
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.tiers import neighbour
from tests.tiers.neighbour import INLINE_BYTES, ask, entry_of, open_tier

from anaphora.clock import ManualClock
from anaphora.errors import TierFailed
from anaphora.events import Damaged, Event
from anaphora.testing.tiers import make_entry, make_key
from anaphora.tiers.base import Entry
from anaphora.tiers.disk import DiskOptions, DiskTier
from anaphora.types import Scope, Tenant

MIB = 1 << 20
LARGE = INLINE_BYTES + 1


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


# -- capacity and order ------------------------------------------------------------------------------------------------


def test_a_smaller_capacity_takes_effect_on_opening(tmp_path: Path) -> None:
    async def body() -> None:
        tier = open_tier(tmp_path, MIB)
        await tier.put_many({make_key(number): make_entry(LARGE) for number in range(10)})
        await tier.aclose()
        again = open_tier(tmp_path, 3 * (LARGE + 256))
        assert set(await again.keys()) == {make_key(number) for number in (7, 8, 9)}
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
        tier = open_tier(tmp_path, MIB)
        secret = b"the-secret-words"
        for number in range(30):
            await tier.put_many({make_key(number): Entry(secret * (1 + number * 10), 1.0, tenant=Tenant("secretive"))})
        await tier.put_many({make_key("other"): make_entry()})
        assert await tier.forget(Scope(tenant=Tenant("secretive"))) == 30
        assert files_with("the-secret-words", tmp_path) == files_with("secretive", tmp_path) == ""
        assert await tier.keys() == [make_key("other")]
        await tier.aclose()

    run(body())


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
    """RLIMIT_FSIZE: value files over 50 kB cannot be written, and sooner or later the index cannot grow."""
    with killed_in_the_end(neighbour.start(tmp_path, 100 * MIB, "fill", 50_000)) as process:
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
