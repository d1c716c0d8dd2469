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

import fcntl
import logging
import os
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from anaphora.clock import Clock
from anaphora.errors import TierFailed
from anaphora.tiers.base import ALL_KEPT_SHARE, Entry, Erasure, Eviction, Examined
from anaphora.tiers.disk import erased
from anaphora.tiers.disk.epoch import SharedEpoch
from anaphora.tiers.disk.traces import SharedTraces
from anaphora.types import Key, Scope, Tenant

log = logging.getLogger(__name__)

_FORMATS = (
    """
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
""",
    """
ALTER TABLE meta ADD COLUMN ranked_by TEXT NOT NULL DEFAULT 'lru';
ALTER TABLE meta ADD COLUMN age REAL NOT NULL DEFAULT 0;
ALTER TABLE entries ADD COLUMN rank REAL NOT NULL DEFAULT 0;
ALTER TABLE entries ADD COLUMN frequency INTEGER NOT NULL DEFAULT 1;
ALTER TABLE entries ADD COLUMN kept_until REAL;
DROP INDEX entries_by_access;
CREATE INDEX entries_by_rank ON entries (rank, accessed, size, kept_until) WHERE kept_until IS NULL;
CREATE INDEX entries_by_keeping ON entries (kept_until, size, expires_at) WHERE kept_until IS NOT NULL;
CREATE INDEX entries_by_keeper ON entries (tenant, size, kept_until) WHERE kept_until IS NOT NULL;
""",
    erased.SCHEMA,
)
"""Statements that lead from each format to the next. A semicolon at a line's end ends a statement."""
FORMAT = len(_FORMATS)
"""SQLite's `user_version`. An index of a later format is put aside like a damaged one."""

_SHARES = """
CREATE TABLE used_by_tenant (tenant TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO used_by_tenant SELECT tenant, SUM(size) FROM entries GROUP BY tenant;
CREATE INDEX entries_by_tenant ON entries (tenant, rank, accessed, size, kept_until) WHERE kept_until IS NULL;
CREATE TRIGGER tenant_grows AFTER INSERT ON entries
    BEGIN INSERT INTO used_by_tenant VALUES (NEW.tenant, NEW.size) ON CONFLICT DO UPDATE SET bytes = bytes + NEW.size; END;
CREATE TRIGGER tenant_shrinks AFTER DELETE ON entries
    BEGIN UPDATE used_by_tenant SET bytes = bytes - OLD.size WHERE tenant = OLD.tenant; END;
CREATE TRIGGER nothing_used AFTER UPDATE ON used_by_tenant WHEN NEW.bytes <= 0
    BEGIN DELETE FROM used_by_tenant WHERE tenant = NEW.tenant; END;
"""
"""Only in folders of which a process has limited the share of a tenant: others need not pay for it."""
_OVER = """
SELECT 1 FROM entries WHERE expires_at <= :now UNION ALL SELECT 1 FROM entries WHERE kept_until <= :now
UNION ALL SELECT 1 FROM erased WHERE at <= :noted LIMIT 1
"""
_COLUMNS = "id, key, file, stored_at, expires_at, cost, tenant, model, tags, checksum, value"
_KEYS_PER_QUERY = 500
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
        self._capacity = capacity
        self._eviction = eviction
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
        self._settled = False
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
        where, values = _where(scope)
        sql = f"SELECT key FROM entries WHERE {where} AND (expires_at IS NULL OR expires_at > ?)"
        return self._run(lambda db: [Key(key) for (key,) in db.execute(sql, (*values, self._clock.now_s()))])

    def sizes(self, keys: Collection[Key]) -> dict[Key, int]:
        def work(db: sqlite3.Connection) -> dict[Key, int]:
            now_s = self._clock.now_s()
            rows = self._rows(db, "key, size, expires_at", keys)
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
            self._settle(db)
            return self._put(db, entries, epoch, touched)

        return self._run(work)

    def touch(self, touched: Iterable[Key]) -> None:
        def work(db: sqlite3.Connection) -> None:
            with self._transaction(db):
                self._apply_touches(db, touched)

        self._run(work)

    def keep(self, keys: Collection[Key], until_s: float) -> int:
        """As `Tier` says."""

        def work(db: sqlite3.Connection) -> int:
            with self._transaction(db):
                now_s = self._end_times(db)
                if until_s > now_s:
                    return self._keep(db, dict.fromkeys(keys, until_s))
                db.executemany("UPDATE entries SET kept_until = NULL WHERE key = ?", [(key,) for key in keys])
                return 0

        return self._run(work)

    def drop_damaged(self, ids: Sequence[int]) -> int:
        """Remove these very rows; how many were still there."""

        def work(db: sqlite3.Connection) -> int:
            with self._transaction(db):
                return sum(len(self._delete(db, "id = ?", (row,))) for row in ids)

        return self._run(work)

    def delete(self, keys: Collection[Key]) -> int:
        return self._erase(Erasure(keys=tuple(keys)), lambda db: sum(len(self._delete(db, "key = ?", (key,))) for key in keys))

    def forget(self, scope: Scope) -> int:
        where, values = _where(scope)
        count = self._erase(Erasure(scope), lambda db: len(self._delete(db, where, values)))
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
        self._settled = False
        self._traces = None
        if self._db is not None:
            self._db.close()
            self._db = None

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            try:
                return work(self._connection())
            except sqlite3.Error as error:
                if not _is_damage(error):
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
                if _inode(self._path) == self._inode:
                    return self._db
            except FileNotFoundError:
                pass
        self.close()
        self._open_epoch()
        with self._opening():
            try:
                self._db = self._open()
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self._replace(str(error))
                self._db = self._open()
            self._inode = _inode(self._path)
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
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA synchronous = {'FULL' if self._fsync else 'NORMAL'}")
            db.execute("PRAGMA secure_delete = ON")  # what was forgotten is not left in free pages
            db.execute(f"PRAGMA journal_size_limit = {4 << 20}")
            if not 0 <= version <= FORMAT:
                raise _Unreadable(f"format {version}, not {FORMAT}")
            if version < FORMAT:
                with self._transaction(db):
                    for statements in _FORMATS[version:]:
                        _execute_all(db, statements)
                    db.execute(f"PRAGMA user_version = {FORMAT}")
                    if version == 0:
                        self._sweep(db)  # files of an index that was put aside
        except BaseException:
            db.close()
            raise
        return db

    def _sweep(self, db: sqlite3.Connection) -> list[tuple[Key, int]]:
        """Remove what a crash left, what has expired, and what a smaller capacity has no room for; (key, size) of the last."""
        known = {name for (name,) in db.execute("SELECT file FROM entries WHERE file IS NOT NULL")}
        present = set(os.listdir(self._values))
        for name in present - known:
            self._unlink(name)
        for name in known - present:
            self._delete(db, "file = ?", (name,))
        self._end_times(db)
        kept = self._kept(db)
        if not self._may_keep(kept.total(), max(kept.values(), default=0)):
            self._keep_less(db)
        excess = self._used(db) - self._capacity
        if excess <= 0:
            return []
        self._rank_anew(db)
        return self._evict(db, self._first(db, excess) or [])

    # -- a damaged index -----------------------------------------------------------------------------------------------

    def _put_aside(self, reason: str) -> None:
        """Replace the index this connection found damaged, unless another process already has. Never raises."""
        self.close()
        try:
            with self._opening():
                if _inode(self._path) == self._inode:
                    self._replace(reason)
        except OSError as error:
            log.warning("%s is damaged (%s) and cannot be put aside: %s", self._path, reason, error)

    def _replace(self, reason: str) -> None:
        """Under `_opening`. The next open makes a fresh index and sweeps the old one's files."""
        self._remove_put_aside()
        aside = self._folder / f"damaged-{int(self._clock.now_s())}.db"
        log.warning("%s cannot be read (%s): put aside as %s, starting empty", self._path, reason, aside.name)
        for suffix in ("-shm", "-wal", ""):
            part = Path(f"{self._path}{suffix}")
            if part.exists():
                part.rename(f"{aside}{suffix}")
        if self._epoch is not None:
            self._epoch.change()  # copies of entries that no index knows must not be served: they could not be forgotten

    def _remove_put_aside(self) -> None:
        for old in self._folder.glob("damaged-*"):
            old.unlink(missing_ok=True)

    @contextmanager
    def _opening(self) -> Iterator[None]:
        fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._lock(fd)
            yield
        finally:
            os.close(fd)

    def _lock(self, fd: int) -> None:
        """Wait for the lock no longer than for SQLite's: whoever holds it may have been stopped."""
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)  # on a worker thread

    # -- inside a transaction ------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self, db: sqlite3.Connection) -> Iterator[None]:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            # Still under the write lock where SQLite has not rolled back by itself; the names are ours alone in any case.
            for name in self._new_files:
                self._unlink(name)
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        finally:
            self._new_files.clear()

    def _put(self, db: sqlite3.Connection, entries: Mapping[Key, Entry], epoch: int | None, touched: Iterable[Key]) -> Written:
        with self._transaction(db):
            if epoch is not None:
                entries = self._not_erased(db, entries, epoch)
            if not entries:
                return Written()
            self._leave_traces(db, entries)
            self._apply_touches(db, touched)
            self._end_times(db)
            stored: set[Key] = set()
            evicted: list[tuple[Key, int]] = []
            known = {key for (key,) in self._rows(db, "key", entries)}  # looked up first: a DELETE of nothing takes longer
            for key, entry in entries.items():
                if key in known:
                    self._delete(db, "key = ?", (key,))
                gone = self._make_room(db, entry)
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
        tick = self._tick(db)
        file = None
        if len(entry.value) >= self._inline_bytes:
            file = f"{key.hex()}-{secrets.token_hex(8)}"
            self._write(file, entry.value)
        db.execute(
            f"INSERT INTO entries ({_COLUMNS}, size, accessed, rank) "
            f"VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?1, {_rank('1', '?6', '?12')})",
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
                _checksum(key, entry),
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

    def _delete(self, db: sqlite3.Connection, where: str, values: Sequence[object]) -> list[tuple[Key, int]]:
        """Remove rows and their files. The files go before the commit, so that room is free before it is used again."""
        rows = db.execute(f"DELETE FROM entries WHERE {where} RETURNING key, size, file", values).fetchall()
        for _, _, file in rows:
            if file is not None:
                self._unlink(file)
        return [(Key(key), size) for key, size, _ in rows]

    def _unlink(self, name: str) -> None:
        (self._values / name).unlink(missing_ok=True)

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

    # -- the order of leaving ------------------------------------------------------------------------------------------

    def _settle(self, db: sqlite3.Connection) -> None:
        """Once, before the first put: make the folder's order ours, and have it count what each tenant uses if we ask that."""
        if self._settled:
            return
        with self._transaction(db):
            self._rank_anew(db)
            if self._eviction.tenant_share < 1 and not db.execute("PRAGMA table_info(used_by_tenant)").fetchall():
                _execute_all(db, _SHARES)
        self._settled = True

    def _rank_anew(self, db: sqlite3.Connection) -> None:
        """By our order, if that is not the folder's."""
        if db.execute("UPDATE meta SET ranked_by = :order WHERE ranked_by <> :order", {"order": self._eviction.order}).rowcount:
            db.execute(f"UPDATE entries SET rank = {_rank('frequency')}")

    def _apply_touches(self, db: sqlite3.Connection, touched: Iterable[Key]) -> None:
        used = f"accessed = ?, frequency = frequency + 1, rank = {_rank('(frequency + 1)')}"
        for key in touched:
            db.execute(f"UPDATE entries SET {used} WHERE key = ?", (self._tick(db), key))

    def _tick(self, db: sqlite3.Connection) -> int:
        """A logical time: unlike a clock's it never stands still, and never goes back."""
        return _number(db.execute("UPDATE meta SET tick = tick + 1 RETURNING tick").fetchall())

    def _make_room(self, db: sqlite3.Connection, entry: Entry) -> list[tuple[Key, int]] | None:
        """Evict until `entry` fits; (key, size) of what went. None, and nothing went, if what is kept leaves it no room."""
        share = self._eviction.tenant_share * self._capacity
        if entry.size > min(share, self._capacity):
            return None
        victims: list[_Victim] = []
        if self._eviction.tenant_share < 1:
            used = db.execute("SELECT bytes FROM used_by_tenant WHERE tenant = ?", (entry.tenant,)).fetchone()
            excess = (used[0] if used else 0) + entry.size - share
            own = self._first(db, excess, of=entry.tenant)
            if own is None:
                return None
            victims += own
        excess = self._used(db) + entry.size - self._capacity - sum(victim.size for victim in victims)
        others = self._first(db, excess, besides=victims)
        return None if others is None else self._evict(db, victims + others)

    def _first(
        self, db: sqlite3.Connection, num_bytes: float, *, of: Tenant | None = None, besides: Iterable[_Victim] = ()
    ) -> list[_Victim] | None:
        """What leaves first, together so large, of what is not kept; None if there is not so much."""
        first: list[_Victim] = []
        if num_bytes <= 0:
            return first
        chosen = {victim.id for victim in besides}
        whose, values = ("", ()) if of is None else ("AND tenant = ?", (of,))
        sql = f"SELECT id, size, rank FROM entries WHERE kept_until IS NULL {whose} ORDER BY rank, accessed"
        with closing(db.execute(sql, values)) as rows:
            for victim in map(_Victim._make, rows):
                if victim.id not in chosen:
                    first.append(victim)
                    num_bytes -= victim.size
                    if num_bytes <= 0:
                        return first
        return None

    def _evict(self, db: sqlite3.Connection, victims: Iterable[_Victim]) -> list[tuple[Key, int]]:
        evicted: list[tuple[Key, int]] = []
        for victim in victims:
            if victim.rank:
                self._grow_older(db, victim.rank)
            evicted += self._delete(db, "id = ?", (victim.id,))
        return evicted

    def _grow_older(self, db: sqlite3.Connection, rank: float) -> None:
        """As `policies.gdsf` does when what has this rank leaves: if it is at the front, of all that may leave."""
        in_front = "SELECT 1 FROM entries WHERE kept_until IS NULL AND rank < :rank"
        db.execute(f"UPDATE meta SET age = :rank WHERE age < :rank AND NOT EXISTS ({in_front})", {"rank": rank})

    def _used(self, db: sqlite3.Connection) -> int:
        return _number(db.execute("SELECT used FROM meta").fetchall())

    # -- what is kept --------------------------------------------------------------------------------------------------

    def _end_times(self, db: sqlite3.Connection) -> float:
        """Remove what has expired, and keep no longer what was kept until now; what time that is."""
        now_s = self._clock.now_s()
        times = {"now": now_s, "noted": now_s - erased.REMEMBERED_S}
        if db.execute(_OVER, times).fetchall():
            self._delete(db, "expires_at <= ?", (now_s,))
            db.execute("UPDATE entries SET kept_until = NULL WHERE kept_until <= :now", times)
            db.execute("DELETE FROM erased WHERE at <= :noted", times)
        return now_s

    def _kept(self, db: sqlite3.Connection) -> Counter[str]:
        """Bytes by tenant."""
        sql = "SELECT tenant, SUM(size) FROM entries WHERE kept_until IS NOT NULL GROUP BY tenant"
        return Counter(dict(db.execute(sql)))

    def _may_keep(self, num_bytes: int, of_one_tenant: int) -> bool:
        return num_bytes <= ALL_KEPT_SHARE * self._capacity and of_one_tenant <= self._eviction.keep_share * self._capacity

    def _keep(self, db: sqlite3.Connection, until_s: Mapping[Key, float]) -> int:
        """How many of them are there and kept so long; first come, first served."""
        rows = {key: row for key, *row in self._rows(db, "key, id, size, tenant, kept_until", until_s)}
        kept = self._kept(db) if any(already_s is None for *_, already_s in rows.values()) else Counter[str]()
        num_bytes = kept.total()
        num_kept = 0
        for key in until_s:
            if key not in rows:
                continue
            row, size, tenant, already_s = rows[key]
            if already_s is None:
                if not self._may_keep(num_bytes + size, kept[tenant] + size):
                    continue
                num_bytes += size
                kept[tenant] += size
            if already_s is None or already_s < until_s[key]:
                db.execute("UPDATE entries SET kept_until = ? WHERE id = ?", (until_s[key], row))
            num_kept += 1
        return num_kept

    def _keep_less(self, db: sqlite3.Connection) -> None:
        """As much of what is kept as the shares leave room for, what would leave last first."""
        last_first = "SELECT key, kept_until FROM entries WHERE kept_until IS NOT NULL ORDER BY rank DESC, accessed DESC"
        kept = {Key(key): until_s for key, until_s in db.execute(last_first)}
        db.execute("UPDATE entries SET kept_until = NULL WHERE kept_until IS NOT NULL")
        self._keep(db, kept)

    # -- a value back --------------------------------------------------------------------------------------------------

    def _get(self, db: sqlite3.Connection, keys: list[Key]) -> Found:
        now_s = self._clock.now_s()
        entries: dict[Key, Entry] = {}
        damaged: list[int] = []
        for row in self._rows(db, _COLUMNS, keys):
            key = Key(row[1])
            try:
                entry = self._entry(row)
            except FileNotFoundError:
                # Evicted or replaced since it was selected? Then its row is gone or new by now.
                again = next(self._rows(db, _COLUMNS, [key]), None)
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
        for *row, size in self._rows(db, f"{_COLUMNS.removesuffix('value')}{value}, size", keys):
            try:
                entry = self._entry(row, num_bytes)
            except FileNotFoundError:
                if not db.execute("SELECT 1 FROM entries WHERE id = ?", (row[0],)).fetchall():
                    continue  # evicted since it was selected
                entry = None
            found[Key(row[1])] = Examined(entry, size if isinstance(size, int) else 0)
        return found

    def _rows(self, db: sqlite3.Connection, columns: str, keys: Collection[Key]) -> Iterator[tuple[Any, ...]]:
        for some in _in_queries(list(keys)):
            marks = ",".join("?" * len(some))
            yield from db.execute(f"SELECT {columns} FROM entries WHERE key IN ({marks})", some).fetchall()

    def _entry(self, row: Sequence[object], num_bytes: int | None = None) -> Entry | None:
        """The entry of a row, None if it is damaged. FileNotFoundError if its file is gone. With `num_bytes`: of a value's
        beginning alone, which has no checksum."""
        try:
            fields = msgspec.convert(row, _Row)
            value = fields.value if fields.file is None else self._read_file(fields.file, num_bytes)
            if value is None:
                return None
            entry = Entry(
                value,
                fields.stored_at,
                fields.expires_at,
                fields.cost,
                Tenant(fields.tenant),
                fields.model,
                msgspec.json.decode(fields.tags, type=tuple[str, ...]),
            )
        except (msgspec.MsgspecError, ValueError):
            return None
        return entry if num_bytes is not None or _checksum(fields.key, entry) == fields.checksum else None

    def _read_file(self, name: str, num_bytes: int | None) -> bytes:
        with (self._values / name).open("rb") as file:
            return file.read() if num_bytes is None else file.read(num_bytes)


class _Row(msgspec.Struct, array_like=True):
    """`_COLUMNS`, typed: a damaged row may hold anything."""

    id: int
    key: bytes
    file: str | None
    stored_at: float
    expires_at: float | None
    cost: float
    tenant: str
    model: str
    tags: str
    checksum: bytes
    value: bytes | None


class _Victim(NamedTuple):
    id: int
    size: int
    rank: float


class _Unreadable(sqlite3.DatabaseError):
    """SQLite reads it, but it is not what this module writes."""


def _execute_all(db: sqlite3.Connection, statements: str) -> None:
    """In the transaction that is open, which `executescript` would commit."""
    for statement in statements.split(";\n"):
        db.execute(statement)


def _rank(frequency: str, cost: str = "cost", size: str = "size") -> str:
    """SQL for the first thing that entries are ordered by; the second is their last use. As `policies.gdsf` has it."""
    return f"(SELECT CASE ranked_by WHEN 'gdsf' THEN age + {frequency} * {cost} / {size} ELSE 0 END FROM meta)"


def _in_queries(keys: list[Key]) -> Iterator[list[Key]]:
    return (keys[start : start + _KEYS_PER_QUERY] for start in range(0, len(keys), _KEYS_PER_QUERY))


def _number(rows: list[tuple[object, ...]]) -> int:
    """The one integer of a one-row result."""
    if len(rows) != 1 or not isinstance(rows[0][0], int):
        raise _Unreadable("the index has no totals")
    return rows[0][0]


def _is_damage(error: sqlite3.Error) -> bool:
    if isinstance(error, (_Unreadable, sqlite3.IntegrityError)):  # no statement here breaks a constraint of sound data
        return True
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _checksum(key: bytes, entry: Entry) -> bytes:
    """Covers value and metadata, and binds them to the key: bytes that strayed under another key do not pass."""
    about = (entry.stored_at_s, entry.expires_at_s, entry.cost_s, entry.tenant, entry.model, entry.tags)
    check = blake2b(msgspec.msgpack.encode(about), digest_size=16, key=key)
    check.update(entry.value)
    return check.digest()


def _where(scope: Scope) -> tuple[str, list[str]]:
    conditions = {
        "tenant = ?": scope.tenant,
        "model = ?": scope.model,
        "EXISTS (SELECT 1 FROM json_each(tags) WHERE value = ?)": scope.tag,
    }
    chosen = {condition: value for condition, value in conditions.items() if value is not None}
    return " AND ".join(chosen) or "TRUE", [str(value) for value in chosen.values()]


def _inode(path: Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino
