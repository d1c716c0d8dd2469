"""What lies on disk: an SQLite index (WAL) with small values inside, and one file for each large value.

    FOLDER/index.db        entries, metadata, checksums, order of use
    FOLDER/values/NAME     large values; every name is used once
    FOLDER/epoch           see `epoch`
    FOLDER/lock            held while opening, and while a damaged index is replaced
    FOLDER/damaged-*.db    the last index that could not be read, kept for inspection until something is forgotten

One rule makes it crash-safe: **`values/` is only written by whoever holds SQLite's write lock, in the transaction that adds
or removes the row.** So a process that gets that lock and finds a file without a row, or a row without a file, has found
what a crash left, and removes it. Nothing else has to be recovered: SQLite does its own.

Needs SQLite 3.35 (`RETURNING`).
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import msgspec

from anaphora.clock import Clock
from anaphora.errors import TierFailed
from anaphora.tiers.base import Entry, Examined
from anaphora.tiers.disk.epoch import SharedEpoch
from anaphora.types import Key, Scope, Tenant

log = logging.getLogger(__name__)

FORMAT = 1
"""SQLite's `user_version`. An index of another format is put aside like a damaged one."""

_SCHEMA = """
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
"""
_COLUMNS = "id, key, file, stored_at, expires_at, cost, tenant, model, tags, checksum, value"
_KEYS_PER_QUERY = 500

T = TypeVar("T")


class Found(msgspec.Struct, frozen=True):
    entries: dict[Key, Entry]
    damaged: tuple[int, ...] = ()
    """Ids of rows whose bytes are not what they were."""


class Written(msgspec.Struct, frozen=True):
    stored: frozenset[Key] = frozenset()
    num_evicted: int = 0
    evicted_bytes: int = 0


class DiskIndex:
    """One connection to the folder, for one thread. Every method raises TierFailed and nothing else.

    Opens by itself, again too when the index was replaced behind its back (put aside as damaged, or the folder removed).
    """

    def __init__(
        self, folder: Path, *, capacity: int, inline_bytes: int, fsync: bool, busy_timeout_s: float, clock: Clock
    ) -> None:
        self._folder = folder
        self._path = folder / "index.db"
        self._values = folder / "values"
        self._capacity = capacity
        self._inline_bytes = inline_bytes
        self._fsync = fsync
        self._busy_timeout_s = busy_timeout_s
        self._clock = clock
        self._db: sqlite3.Connection | None = None
        self._inode = (0, 0)
        self._epoch: SharedEpoch | None = None
        self._new_files: list[str] = []

    # -- reading -------------------------------------------------------------------------------------------------------

    def get(self, keys: Collection[Key]) -> Found:
        return self._run(lambda db: self._get(db, list(keys)))

    def keys(self, scope: Scope) -> list[Key]:
        where, values = _where(scope)
        sql = f"SELECT key FROM entries WHERE {where} AND (expires_at IS NULL OR expires_at > ?)"
        return self._run(lambda db: [Key(key) for (key,) in db.execute(sql, (*values, self._clock.now_s()))])

    def sizes(self, keys: Collection[Key]) -> dict[Key, int]:
        def work(db: sqlite3.Connection) -> dict[Key, int]:
            found: dict[Key, int] = {}
            for some in _in_queries(list(keys)):
                marks = ",".join("?" * len(some))
                sql = f"SELECT key, size FROM entries WHERE key IN ({marks}) AND (expires_at IS NULL OR expires_at > ?)"
                found.update((Key(key), size) for key, size in db.execute(sql, (*some, self._clock.now_s())))
            return found

        return self._run(work)

    def examine(self, keys: Collection[Key], num_bytes: int | None) -> dict[Key, Examined]:
        """As `ExaminableTier` says."""
        return self._run(lambda db: self._examine(db, list(keys), num_bytes))

    def totals(self) -> tuple[int, int]:
        """(number of entries, used bytes)"""
        sql = "SELECT (SELECT COUNT(*) FROM entries), used FROM meta"
        return self._run(lambda db: tuple(db.execute(sql).fetchone()))

    # -- writing -------------------------------------------------------------------------------------------------------

    def put(self, entries: Mapping[Key, Entry], *, epoch: int | None, touched: Iterable[Key]) -> Written:
        return self._run(lambda db: self._put(db, entries, epoch, touched))

    def touch(self, touched: Iterable[Key]) -> None:
        def work(db: sqlite3.Connection) -> None:
            with self._transaction(db):
                self._apply_touches(db, touched)

        self._run(work)

    def drop_damaged(self, ids: Sequence[int]) -> int:
        """Remove these very rows; how many were still there."""

        def work(db: sqlite3.Connection) -> int:
            with self._transaction(db):
                return sum(len(self._delete(db, "id = ?", (row,))) for row in ids)

        return self._run(work)

    def delete(self, keys: Collection[Key]) -> int:
        return self._erase(lambda db: sum(len(self._delete(db, "key = ?", (key,))) for key in keys))

    def forget(self, scope: Scope) -> int:
        where, values = _where(scope)
        return self._erase(lambda db: len(self._delete(db, where, values)))

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

    def open(self) -> None:
        """Open now what would be opened at the first use, and clear up after processes that crashed."""

        def work(db: sqlite3.Connection) -> None:
            try:
                with self._transaction(db):
                    self._sweep(db)
            except (sqlite3.OperationalError, OSError) as error:  # a full disk, say: reading is still possible
                log.warning("%s cannot be cleared up: %s", self._folder, error)

        self._run(work)

    def close(self) -> None:
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
            if version not in (0, FORMAT):
                raise _Unreadable(f"format {version}, not {FORMAT}")
            if version == 0:
                with self._transaction(db):
                    for statement in _SCHEMA.split(";\n"):  # the triggers' own semicolons are not followed by a line end
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {FORMAT}")
                    self._sweep(db)  # files of an index that was put aside
        except BaseException:
            db.close()
            raise
        return db

    def _sweep(self, db: sqlite3.Connection) -> None:
        """Remove what a crash left, what has expired, and what a smaller capacity has no room for."""
        known = {name for (name,) in db.execute("SELECT file FROM entries WHERE file IS NOT NULL")}
        present = set(os.listdir(self._values))
        for name in present - known:
            self._unlink(name)
        for name in known - present:
            self._delete(db, "file = ?", (name,))
        self._delete(db, "expires_at <= ?", (self._clock.now_s(),))
        self._make_room(db, 0)

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
            # Asked under the write lock: whoever forgets changes the epoch under that lock too.
            if epoch is not None and (self._epoch is None or self._epoch.read() != epoch):
                return Written()
            self._apply_touches(db, touched)
            self._delete(db, "expires_at <= ?", (self._clock.now_s(),))
            stored: set[Key] = set()
            evicted: list[tuple[Key, int]] = []
            for key, entry in entries.items():
                self._delete(db, "key = ?", (key,))
                if entry.size <= self._capacity:
                    evicted += self._make_room(db, entry.size)
                    self._insert(db, key, entry)
                    stored.add(key)
            stored.difference_update(key for key, _ in evicted)
        return Written(frozenset(stored), len(evicted), sum(size for _, size in evicted))

    def _insert(self, db: sqlite3.Connection, key: Key, entry: Entry) -> None:
        tick = self._tick(db)
        file = None
        if len(entry.value) >= self._inline_bytes:
            file = f"{key.hex()}-{secrets.token_hex(8)}"
            self._write(file, entry.value)
        db.execute(
            f"INSERT INTO entries ({_COLUMNS}, size, accessed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
                tick,
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

    def _make_room(self, db: sqlite3.Connection, size: int) -> list[tuple[Key, int]]:
        """Evict, least recently used first, until `size` more bytes fit; (key, size) of what went."""
        need = _number(db.execute("SELECT used FROM meta").fetchall()) + size - self._capacity
        evicted: list[tuple[Key, int]] = []
        while need > 0:
            rows = db.execute("SELECT id, size FROM entries ORDER BY accessed LIMIT 16").fetchall()
            for row, freed in rows:
                evicted += self._delete(db, "id = ?", (row,))
                need -= freed
                if need <= 0:
                    break
            if not rows:
                break
        return evicted

    def _delete(self, db: sqlite3.Connection, where: str, values: Sequence[object]) -> list[tuple[Key, int]]:
        """Remove rows and their files. The files go before the commit, so that room is free before it is used again."""
        rows = db.execute(f"DELETE FROM entries WHERE {where} RETURNING key, size, file", values).fetchall()
        for _, _, file in rows:
            if file is not None:
                self._unlink(file)
        return [(Key(key), size) for key, size, _ in rows]

    def _unlink(self, name: str) -> None:
        (self._values / name).unlink(missing_ok=True)

    def _apply_touches(self, db: sqlite3.Connection, touched: Iterable[Key]) -> None:
        for key in touched:
            db.execute("UPDATE entries SET accessed = ? WHERE key = ?", (self._tick(db), key))

    def _tick(self, db: sqlite3.Connection) -> int:
        """A logical time: unlike a clock's it never stands still, and never goes back."""
        return _number(db.execute("UPDATE meta SET tick = tick + 1 RETURNING tick").fetchall())

    def _erase(self, work: Callable[[sqlite3.Connection], int]) -> int:
        """`work` removes rows in one transaction; their bytes leave the medium, and copies in other processes are void."""

        def erase(db: sqlite3.Connection) -> int:
            epoch = self._epoch
            assert epoch is not None  # a connection is only made after it
            with self._transaction(db):
                epoch.change()  # before the commit: a write that was prepared earlier must not put anything back
                count = work(db)
            epoch.change()  # and after: a reader may have copied the old state in between
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
        for row in self._rows(db, keys):
            key = Key(row[1])
            try:
                entry = self._entry(row)
            except FileNotFoundError:
                # Evicted or replaced since it was selected? Then its row is gone or new by now.
                again = next(self._rows(db, [key]), None)
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
        for some in _in_queries(keys):
            marks = ",".join("?" * len(some))
            sql = f"SELECT {_COLUMNS.removesuffix('value')}{value}, size FROM entries WHERE key IN ({marks})"
            for *row, size in db.execute(sql, some).fetchall():
                try:
                    entry = self._entry(row, num_bytes)
                except FileNotFoundError:
                    if not db.execute("SELECT 1 FROM entries WHERE id = ?", (row[0],)).fetchall():
                        continue  # evicted since it was selected
                    entry = None
                found[Key(row[1])] = Examined(entry, size if isinstance(size, int) else 0)
        return found

    def _rows(self, db: sqlite3.Connection, keys: list[Key]) -> Iterator[tuple[int, bytes, str | None]]:
        for some in _in_queries(keys):
            marks = ",".join("?" * len(some))
            yield from db.execute(f"SELECT {_COLUMNS} FROM entries WHERE key IN ({marks})", some).fetchall()

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


class _Unreadable(sqlite3.DatabaseError):
    """SQLite reads it, but it is not what this module writes."""


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
