"""What lies on disk: an SQLite index (WAL) with small values inside, and one file for each large value.

    FOLDER/index.db        entries, metadata, checksums, the order of leaving
    FOLDER/values/NAME     large values; every name is used once
    FOLDER/epoch           see `epoch`
    FOLDER/traces          see `traces`
    FOLDER/lock            held while opening, and while a damaged index is replaced
    FOLDER/damaged-*.db    the last index that could not be read, kept for inspection until something is forgotten

One rule makes it crash-safe: **`values/` is only written by whoever holds SQLite's write lock, in the transaction that adds
or removes the row.** So a process that gets that lock and finds a file without a row, or a row without a file, has found
what a crash left, and removes it. Nothing else has to be recovered: SQLite does its own.

All processes on a folder follow one order of leaving (`Eviction.order`), which is noted in the index. A process makes it its
own before it puts something for the first time, and when it opens the folder with a capacity too small for what lies there:
processes that disagree follow the one that came last, and whoever only looks changes nothing. When the order changes, all
entries are ranked anew in one transaction, by their uses so far, which count under either. Capacity and shares are each
process's own. A smaller capacity, or share of what is kept, takes effect on opening; a smaller share of what a tenant may
fill, when that tenant's next entry comes.

That a key is not there is known without asking the index, from `traces`. A process goes by them when it has gathered them
itself, under the write lock; it leaves the trace of a key before it commits the key's row; and where it cannot, it removes the
file, which tells all others to go by it no longer.

Needs SQLite 3.35 (`RETURNING`).
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from anaphora.clock import Clock
from anaphora.errors import TierFailed
from anaphora.sqlite import Unreadable, execute_all, inode, is_damage, locked, prepare, put_aside, transaction
from anaphora.tiers.base import Entry, Erasure, Eviction, Examined
from anaphora.tiers.disk import erased
from anaphora.tiers.disk.epoch import SharedEpoch
from anaphora.tiers.disk.leaving import Leaving
from anaphora.tiers.disk.rows import Removed, Row, checksum, remove, remove_file, select, within
from anaphora.tiers.disk.schema import COLUMNS, FORMAT, FORMATS, rank_sql
from anaphora.tiers.disk.traces import SharedTraces
from anaphora.types import Key, Scope

log = logging.getLogger(__name__)

_GATHER_AFTER = 1 << 18
"""So many keys later traces are gathered anew: most of what they were left by may be gone."""

T = TypeVar("T")


class Found(msgspec.Struct, frozen=True):
    entries: dict[Key, Entry]
    damaged: tuple[int, ...] = ()
    """Ids of rows whose bytes are not what they were."""


class Written(msgspec.Struct, frozen=True):
    stored: frozenset[Key] = frozenset()
    num_evicted: int = 0
    evicted_bytes: int = 0

    @classmethod
    def of(cls, evicted: Collection[tuple[Key, int]], stored: Iterable[Key] = ()) -> Written:
        return cls(frozenset(stored), len(evicted), sum(size for _, size in evicted))


class DiskIndex:
    """One connection to the folder, for one thread. Every method raises TierFailed and nothing else.

    Opens by itself, again too when the index was replaced behind its back (put aside as damaged, or the folder removed).
    """

    def __init__(
        self,
        folder: Path,
        *,
        capacity: int,
        eviction: Eviction,
        inline_bytes: int,
        fsync: bool,
        busy_timeout_s: float,
        clock: Clock,
    ) -> None:
        self._folder = folder
        self._path = folder / "index.db"
        self._values = folder / "values"
        self._inline_bytes = inline_bytes
        self._fsync = fsync
        self._busy_timeout_s = busy_timeout_s
        self._clock = clock
        self._db: sqlite3.Connection | None = None
        self._inode = (0, 0)
        self._epoch: SharedEpoch | None = None
        self._traces: SharedTraces | None = None
        self._num_traces = 0
        """Left by this process since it gathered them."""
        self._leaving = Leaving(capacity, eviction, clock, self._values)
        self._new_files: list[str] = []

    # -- reading -------------------------------------------------------------------------------------------------------

    def candidates(self, keys: Collection[Key]) -> Collection[Key]:
        """`keys` without those that are certainly not there. Immediate, and may be called on any thread."""
        traces = self._traces
        if traces is None or traces.replaced():
            return keys
        return [key for key in keys if traces.has(key)]

    def get(self, keys: Collection[Key]) -> Found:
        return self._run(lambda db: self._get(db, list(keys)))

    def keys(self, scope: Scope) -> list[Key]:
        where, values = within(scope)
        sql = f"SELECT key FROM entries WHERE {where} AND (expires_at IS NULL OR expires_at > ?)"
        return self._run(lambda db: [Key(key) for (key,) in db.execute(sql, (*values, self._clock.now_s()))])

    def sizes(self, keys: Collection[Key]) -> dict[Key, int]:
        def work(db: sqlite3.Connection) -> dict[Key, int]:
            now_s = self._clock.now_s()
            rows = select(db, "key, size, expires_at", keys)
            return {Key(key): size for key, size, expires_at in rows if expires_at is None or expires_at > now_s}

        return self._run(work)

    def examine(self, keys: Collection[Key], num_bytes: int | None) -> dict[Key, Examined]:
        """As `ExaminableTier` says."""
        return self._run(lambda db: self._examine(db, list(keys), num_bytes))

    def totals(self) -> tuple[int, int, int]:
        """(number of entries, used bytes, kept bytes)"""
        kept = (
            "SELECT COALESCE(SUM(size), 0) FROM entries WHERE kept_until > :now AND (expires_at IS NULL OR expires_at > :now)"
        )
        sql = f"SELECT (SELECT COUNT(*) FROM entries), used, ({kept}) FROM meta"
        return self._run(lambda db: tuple(db.execute(sql, {"now": self._clock.now_s()}).fetchone()))

    # -- writing -------------------------------------------------------------------------------------------------------

    def put(self, entries: Mapping[Key, Entry], *, epoch: int | None, touched: Iterable[Key]) -> Written:
        def work(db: sqlite3.Connection) -> Written:
            self._leaving.settle(db)
            return self._put(db, entries, epoch, touched)

        return self._run(work)

    def touch(self, touched: Iterable[Key]) -> None:
        def work(db: sqlite3.Connection) -> None:
            with self._transaction(db):
                self._leaving.apply_touches(db, touched)

        self._run(work)

    def keep(self, keys: Collection[Key], until_s: float) -> int:
        """As `Tier` says."""

        def work(db: sqlite3.Connection) -> int:
            with self._transaction(db):
                now_s = self._leaving.end_times(db)
                if until_s > now_s:
                    return self._leaving.keep(db, dict.fromkeys(keys, until_s))
                db.executemany("UPDATE entries SET kept_until = NULL WHERE key = ?", [(key,) for key in keys])
                return 0

        return self._run(work)

    def drop_damaged(self, ids: Sequence[int]) -> int:
        """Remove these very rows; how many were still there."""

        def work(db: sqlite3.Connection) -> int:
            with self._transaction(db):
                return sum(len(remove(db, self._values, "id = ?", (row,))) for row in ids)

        return self._run(work)

    def delete(self, keys: Collection[Key]) -> int:
        return self._erase(
            Erasure(keys=tuple(keys)), lambda db: sum(len(remove(db, self._values, "key = ?", (key,))) for key in keys)
        )

    def forget(self, scope: Scope) -> int:
        where, values = within(scope)
        count = self._erase(Erasure(scope), lambda db: len(remove(db, self._values, where, values)))
        if count:
            with suppress(TierFailed):  # busy: the traces stay until the folder is opened the next time
                self._run(self._gather_again)
        return count

    # -- life ----------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> SharedEpoch | None:
        """None until the folder could be opened."""
        return self._epoch

    def open_epoch(self) -> None:
        """Make the folder and map its epoch: quick, and enough to answer `epoch`."""
        try:
            self._open_epoch()
        except OSError as error:
            raise TierFailed(str(error)) from error

    def open(self) -> Written:
        """Open now what would be opened at the first use, and clear up after processes that crashed."""

        def work(db: sqlite3.Connection) -> Written:
            try:
                with self._transaction(db):
                    evicted = self._sweep(db)
                self._gather_again(db)
            except (sqlite3.OperationalError, OSError) as error:  # a full disk, say: reading is still possible
                log.warning("%s cannot be cleared up: %s", self._folder, error)
                return Written()
            return Written.of(evicted)

        return self._run(work)

    def close(self) -> None:
        self._leaving.unsettle()
        self._traces = None
        if self._db is not None:
            self._db.close()
            self._db = None

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            try:
                return work(self._connection())
            except sqlite3.Error as error:
                if not is_damage(error):
                    raise
                self._put_aside(str(error))
            return work(self._connection())  # with the fresh index
        except sqlite3.Error as error:
            raise TierFailed(f"{self._path}: {error}") from error
        except OSError as error:
            raise TierFailed(str(error)) from error

    def _connection(self) -> sqlite3.Connection:
        if self._db is not None and self._epoch is not None and not self._epoch.replaced():
            try:
                if inode(self._path) == self._inode:
                    return self._db
            except FileNotFoundError:
                pass
        self.close()
        self._open_epoch()
        with self._opening():
            try:
                self._db = self._open()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                self._replace(str(error))
                self._db = self._open()
            self._inode = inode(self._path)
        return self._db

    def _open_epoch(self) -> None:
        if self._epoch is None or self._epoch.replaced():
            self._values.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._epoch = SharedEpoch(self._folder / "epoch")

    def _open(self) -> sqlite3.Connection:
        self._values.mkdir(mode=0o700, parents=True, exist_ok=True)
        db = sqlite3.connect(self._path, timeout=self._busy_timeout_s, isolation_level=None, cached_statements=32)
        try:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only a new database takes it
            prepare(db, synchronous="FULL" if self._fsync else "NORMAL")
            if not 0 <= version <= FORMAT:
                raise Unreadable(f"format {version}, not {FORMAT}")
            if version < FORMAT:
                with self._transaction(db):
                    for statements in FORMATS[version:]:
                        execute_all(db, statements)
                    db.execute(f"PRAGMA user_version = {FORMAT}")
                    if version == 0:
                        self._sweep(db)  # files of an index that was put aside
        except BaseException:
            db.close()
            raise
        return db

    def _sweep(self, db: sqlite3.Connection) -> Removed:
        """Remove what a crash left, what has expired, and what a smaller capacity has no room for; (key, size) of the last."""
        known = {name for (name,) in db.execute("SELECT file FROM entries WHERE file IS NOT NULL")}
        present = set(os.listdir(self._values))
        for name in present - known:
            remove_file(self._values, name)
        for name in known - present:
            remove(db, self._values, "file = ?", (name,))
        self._leaving.end_times(db)
        return self._leaving.shrink(db)

    # -- a damaged index -----------------------------------------------------------------------------------------------

    def _put_aside(self, reason: str) -> None:
        """Replace the index this connection found damaged, unless another process already has. Never raises."""
        self.close()
        try:
            with self._opening():
                if inode(self._path) == self._inode:
                    self._replace(reason)
        except OSError as error:
            log.warning("%s is damaged (%s) and cannot be put aside: %s", self._path, reason, error)

    def _replace(self, reason: str) -> None:
        """Under `_opening`. The next open makes a fresh index and sweeps the old one's files."""
        self._remove_put_aside()
        aside = self._folder / f"damaged-{int(self._clock.now_s())}.db"
        log.warning("%s cannot be read (%s): put aside as %s, starting empty", self._path, reason, aside.name)
        put_aside(self._path, aside)
        if self._epoch is not None:
            self._epoch.change()  # copies of entries that no index knows must not be served: they could not be forgotten

    def _remove_put_aside(self) -> None:
        for old in self._folder.glob("damaged-*"):
            old.unlink(missing_ok=True)

    def _opening(self) -> AbstractContextManager[None]:
        return locked(self._folder / "lock", self._busy_timeout_s)

    # -- inside a transaction ------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self, db: sqlite3.Connection) -> Iterator[None]:
        def undo() -> None:
            for name in self._new_files:
                remove_file(self._values, name)

        try:
            with transaction(db, undo):
                yield
        finally:
            self._new_files.clear()

    def _put(self, db: sqlite3.Connection, entries: Mapping[Key, Entry], epoch: int | None, touched: Iterable[Key]) -> Written:
        with self._transaction(db):
            if epoch is not None:
                entries = self._not_erased(db, entries, epoch)
            if not entries:
                return Written()
            self._leave_traces(db, entries)
            self._leaving.apply_touches(db, touched)
            self._leaving.end_times(db)
            stored: set[Key] = set()
            evicted: Removed = []
            known = {key for (key,) in select(db, "key", entries)}  # looked up first: a DELETE of nothing takes longer
            for key, entry in entries.items():
                if key in known:
                    remove(db, self._values, "key = ?", (key,))
                gone = self._leaving.make_room(db, entry)
                if gone is not None:
                    self._insert(db, key, entry)
                    stored.difference_update(victim for victim, _ in gone)
                    stored.add(key)
                    evicted += gone
        return Written.of(evicted, stored)

    def _not_erased(self, db: sqlite3.Connection, entries: Mapping[Key, Entry], epoch: int) -> Mapping[Key, Entry]:
        """Those that may still be stored, if they were prepared when the epoch was `epoch`."""
        # Asked under the write lock: whoever forgets changes the epoch under that lock too.
        return {} if self._epoch is None else erased.not_erased(db, entries, epoch, self._epoch.read())

    def _leave_traces(self, db: sqlite3.Connection, keys: Collection[Key]) -> None:
        if self._traces is None or self._traces.replaced() or self._num_traces > _GATHER_AFTER:
            self._gather(db)
        if self._traces is not None:
            for key in keys:
                self._traces.add(key)
            self._num_traces += len(keys)

    def _gather_again(self, db: sqlite3.Connection) -> None:
        with self._transaction(db):
            self._gather(db)

    def _gather(self, db: sqlite3.Connection) -> None:
        """Traces of what is there, and of nothing else. First in a transaction: what that does may be taken back."""
        path = self._folder / "traces"
        traces = self._traces
        self._traces, self._num_traces = None, 0
        try:
            if traces is None or traces.replaced():
                traces = SharedTraces(path)
        except OSError as error:
            log.debug("%s cannot be used: %s", path, error)
            path.unlink(missing_ok=True)
            return
        traces.gather(key for (key,) in db.execute("SELECT key FROM entries"))
        self._traces = traces

    def _insert(self, db: sqlite3.Connection, key: Key, entry: Entry) -> None:
        tick = self._leaving.tick(db)
        file = None
        if len(entry.value) >= self._inline_bytes:
            file = f"{key.hex()}-{secrets.token_hex(8)}"
            self._write(file, entry.value)
        db.execute(
            f"INSERT INTO entries ({COLUMNS}, size, accessed, rank) "
            f"VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?1, {rank_sql('1', '?6', '?12')})",
            (
                tick,
                key,
                file,
                entry.stored_at_s,
                entry.expires_at_s,
                entry.cost_s,
                entry.tenant,
                entry.model,
                msgspec.json.encode(entry.tags).decode(),
                checksum(key, entry),
                entry.value if file is None else None,
                entry.size,
            ),
        )

    def _write(self, name: str, value: bytes) -> None:
        self._new_files.append(name)
        fd = os.open(self._values / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(value)
            while rest:
                rest = rest[os.write(fd, rest) :]
            if self._fsync:
                os.fsync(fd)
        finally:
            os.close(fd)

    def _erase(self, erasure: Erasure, work: Callable[[sqlite3.Connection], int]) -> int:
        """`work` removes rows in one transaction; their bytes leave the medium, and copies in other processes are void."""

        def erase(db: sqlite3.Connection) -> int:
            epoch = self._epoch
            assert epoch is not None  # a connection is only made after it
            with self._transaction(db):
                # Before the commit: a write that was prepared earlier must not put anything back.
                erased.erase(db, epoch, erasure, self._clock.now_s())
                count = work(db)
            try:
                with self._transaction(db):  # and after: a reader may have copied the old state in between
                    erased.erase(db, epoch, erasure, self._clock.now_s())
            except sqlite3.Error:
                epoch.change()
            self._remove_put_aside()
            with suppress(sqlite3.OperationalError):  # busy: the pages are zeroed all the same, and given back later
                db.execute("PRAGMA incremental_vacuum").fetchall()
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            return count

        return self._run(erase)

    # -- a value back --------------------------------------------------------------------------------------------------

    def _get(self, db: sqlite3.Connection, keys: list[Key]) -> Found:
        now_s = self._clock.now_s()
        entries: dict[Key, Entry] = {}
        damaged: list[int] = []
        for row in select(db, COLUMNS, keys):
            key = Key(row[1])
            try:
                entry = self._entry(row)
            except FileNotFoundError:
                # Evicted or replaced since it was selected? Then its row is gone or new by now.
                again = next(select(db, COLUMNS, [key]), None)
                if again is None:
                    continue
                row = again
                try:
                    entry = self._entry(row)
                except FileNotFoundError:
                    entry = None
            if entry is None:
                damaged.append(row[0])
            elif not entry.expired(now_s):
                entries[key] = entry
        return Found(entries, tuple(damaged))

    def _examine(self, db: sqlite3.Connection, keys: list[Key], num_bytes: int | None) -> dict[Key, Examined]:
        found: dict[Key, Examined] = {}
        value = "value" if num_bytes is None else f"substr(value, 1, {num_bytes:d})"
        for *row, size in select(db, f"{COLUMNS.removesuffix('value')}{value}, size", keys):
            try:
                entry = self._entry(row, num_bytes)
            except FileNotFoundError:
                if not db.execute("SELECT 1 FROM entries WHERE id = ?", (row[0],)).fetchall():
                    continue  # evicted since it was selected
                entry = None
            found[Key(row[1])] = Examined(entry, size if isinstance(size, int) else 0)
        return found

    def _entry(self, row: Sequence[object], num_bytes: int | None = None) -> Entry | None:
        """The entry of a row, None if it is damaged. FileNotFoundError if its file is gone. With `num_bytes`: of a value's
        beginning alone, which has no checksum."""
        try:
            fields = msgspec.convert(row, Row)
            value = fields.value if fields.file is None else self._read_file(fields.file, num_bytes)
            if value is None:
                return None
            entry = fields.entry(value)
        except (msgspec.MsgspecError, ValueError):
            return None
        return entry if num_bytes is not None or checksum(fields.key, entry) == fields.checksum else None

    def _read_file(self, name: str, num_bytes: int | None) -> bytes:
        with (self._values / name).open("rb") as file:
            return file.read() if num_bytes is None else file.read(num_bytes)
