"""What the semantic level keeps, in one SQLite file (WAL) that all gateway processes of a server share.

    FOLDER/semantic.db            entries, labels, decisions; numbers of what was removed
    FOLDER/semantic.epoch         changes with every forget (`tiers.disk.epoch`)
    FOLDER/semantic.vectors       what `Entries` would otherwise have to build anew when it starts
    FOLDER/semantic.lock          held while one of these is put in its place or aside
    FOLDER/semantic.damaged.db    the last file that could not be read, until something is forgotten

Entries are numbered in the order they are written, removals likewise, so a process sees what others did by reading on from
where it was. An entry is written only if nothing was forgotten since it came up: whoever forgets changes the epoch under the
write lock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from anaphora import vectors
from anaphora.errors import AnaphoraError
from anaphora.levels.semantic.records import Decision, Entry, Labelled
from anaphora.tiers.disk.epoch import SharedEpoch
from anaphora.types import Key, Scope, Tenant
from anaphora.vectors import Vectors

log = logging.getLogger(__name__)

FORMAT = 1
"""SQLite's `user_version`. A file of a later format is put aside like a damaged one."""
BUSY_S = 5.0
"""How long to wait for another process's write."""
MAX_REMOVALS = 100_000
"""Numbers that are kept of what was removed. Whoever has fallen behind further reads everything again."""
DECISIONS_PER_TENANT = 10_000
MAX_LABELS = 200_000
_IDS_PER_QUERY = 500

_SCHEMA = f"""
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 0), identity BLOB NOT NULL, encoder TEXT NOT NULL, num_entries INTEGER NOT NULL
);
CREATE TABLE entries (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id INTEGER NOT NULL UNIQUE, space BLOB NOT NULL, digest BLOB NOT NULL,
    key BLOB NOT NULL, text TEXT NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, tags TEXT NOT NULL,
    stored_at REAL NOT NULL, expires_at REAL, used_at REAL NOT NULL, vector BLOB NOT NULL, UNIQUE (space, digest)
);
CREATE INDEX entries_by_use ON entries (used_at);
CREATE INDEX entries_by_owner ON entries (tenant, model);
CREATE INDEX entries_by_expiry ON entries (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE removals (number INTEGER PRIMARY KEY AUTOINCREMENT, id INTEGER NOT NULL);
CREATE TABLE labels (
    number INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, model TEXT NOT NULL, tags TEXT NOT NULL,
    writer BLOB NOT NULL, content BLOB NOT NULL
);
CREATE TABLE decisions (
    number INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, model TEXT NOT NULL, tags TEXT NOT NULL,
    request_id TEXT NOT NULL, answer_id TEXT NOT NULL, content BLOB NOT NULL
);
CREATE INDEX decisions_by_tenant ON decisions (tenant, number);
CREATE INDEX decisions_by_request ON decisions (request_id);
CREATE INDEX decisions_by_answer ON decisions (answer_id);
CREATE TRIGGER entry_comes AFTER INSERT ON entries BEGIN UPDATE meta SET num_entries = num_entries + 1; END;
CREATE TRIGGER entry_goes AFTER DELETE ON entries
    BEGIN UPDATE meta SET num_entries = num_entries - 1; INSERT INTO removals (id) VALUES (OLD.id); END;
INSERT INTO meta VALUES (0, randomblob(16), '', 0);
PRAGMA user_version = {FORMAT};
"""
_ENTRY = "id, space, digest, key, text, tenant, model, tags, stored_at, expires_at"
_encode = msgspec.msgpack.encode

T = TypeVar("T")


class EntriesFailed(AnaphoraError):
    """The file cannot be read or written; says which and why."""


class Position(msgspec.Struct, frozen=True):
    """How far somebody has read, and in which file."""

    identity: bytes = b""
    entry: int = 0
    removal: int = 0
    label: int = 0


class News(msgspec.Struct):
    position: Position
    entries: list[Entry]
    removed: list[int]
    labels: list[Labelled]
    anew: bool
    """From the beginning on: what the reader has and does not come now is gone."""
    last: bool
    """There is no more."""


class Addition(msgspec.Struct, frozen=True):
    entry: Entry
    vector: bytes
    """float16"""
    epoch: int
    """From before it came up."""


class Noted(msgspec.Struct, frozen=True):
    what: Labelled | Decision
    epoch: int
    """From when it was noted."""


class Changes(msgspec.Struct):
    """What is to be written at once. `used`: id → when."""

    added: Sequence[Addition] = ()
    removed: Sequence[int] = ()
    used: Mapping[int, float] = msgspec.field(default_factory=dict)
    noted: Sequence[Noted] = ()


class EntryFile:
    """One connection, for one thread. Every method raises EntriesFailed and nothing else."""

    def __init__(self, folder: Path, *, encoder: str = "", max_entries: int = 0, writes: bool = True) -> None:
        self.path = folder / "semantic.db"
        self.vectors_path = folder / "semantic.vectors"
        self._folder = folder
        self._encoder = encoder
        self._max_entries = max_entries
        self._writes = writes
        self._writer = secrets.token_bytes(8)
        self._epoch: SharedEpoch | None = None
        self._db: sqlite3.Connection | None = None
        self._inode = (0, 0)
        self._num_opened = 0

    # -- the epoch -----------------------------------------------------------------------------------------------------

    def open_epoch(self) -> None:
        """Make the folder and map its epoch: quick."""
        try:
            self._map_epoch()
        except OSError as error:
            raise EntriesFailed(str(error)) from error

    @property
    def epoch(self) -> int:
        """One memory read, from any thread. 0 until the folder could be opened."""
        return 0 if self._epoch is None else self._epoch.read()

    # -- reading -------------------------------------------------------------------------------------------------------

    def changed(self) -> tuple[int, int]:
        """What another process's writing changes. Cheap."""
        return self._run(lambda db: (self._num_opened, _integer(db, "PRAGMA data_version")))

    def news(self, since: Position, num: int) -> News:
        """With at most `num` entries, and without the labels that this object wrote."""
        return self._run(lambda db: _news(db, since, num, self._writer))

    def vectors(self, ids: Sequence[int]) -> dict[int, bytes]:
        def work(db: sqlite3.Connection) -> dict[int, bytes]:
            found: dict[int, bytes] = {}
            for start in range(0, len(ids), _IDS_PER_QUERY):
                some = ids[start : start + _IDS_PER_QUERY]
                found.update(db.execute(f"SELECT id, vector FROM entries WHERE id IN ({_marks(some)})", some).fetchall())
            return found

        return self._run(work)

    def decisions(self, tenant: str | None = None, *, request: str = "", limit: int = -1) -> list[Decision]:
        """The latest first. `request`: only those that are known by this id, the request's or the answer's."""
        conditions = {"tenant = :tenant": tenant is not None, "(request_id = :id OR answer_id = :id)": bool(request)}
        where = " AND ".join(text for text, holds in conditions.items() if holds) or "TRUE"
        sql = f"SELECT content FROM decisions WHERE {where} ORDER BY number DESC LIMIT :limit"
        values = {"tenant": tenant, "id": request, "limit": limit}
        return self._run(lambda db: _decoded(db.execute(sql, values), Decision))

    def labels(self) -> list[Labelled]:
        """All, the oldest first."""
        sql = "SELECT content FROM labels ORDER BY number"
        return self._run(lambda db: _decoded(db.execute(sql), Labelled))

    def count(self, scope: Scope) -> int:
        where, values = _where(scope)
        return self._run(lambda db: _integer(db, f"SELECT COUNT(*) FROM entries WHERE {where}", values))

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, changes: Changes, now_s: float) -> list[int]:
        """All or nothing, but without what came up before something was forgotten. Ids of entries that were not written, or had
        to go."""

        def work(db: sqlite3.Connection) -> list[int]:
            with self._transaction(db):
                gone = self._add(db, changes.added)
                db.executemany("DELETE FROM entries WHERE id = ?", [(identity,) for identity in changes.removed])
                used = [(at_s, identity) for identity, at_s in changes.used.items()]
                db.executemany("UPDATE entries SET used_at = ? WHERE id = ?", used)
                self._note(db, changes.noted)
                return gone + self._make_room(db, now_s)

        return self._run(work)

    def forget(self, scope: Scope) -> int:
        """Erase entries, labels and decisions within `scope`, in old pages too, and what was made of them; how many entries."""
        where, values = _where(scope)

        def work(db: sqlite3.Connection) -> int:
            with self._transaction(db):
                num = db.execute(f"DELETE FROM entries WHERE {where}", values).rowcount
                db.execute(f"DELETE FROM labels WHERE {where}", values)
                db.execute(f"DELETE FROM decisions WHERE {where}", values)
                self._change_epoch()
            self._change_epoch()  # again: who looked between the first change and the end of the transaction saw too much
            with self._locked():
                for path in self._folder.glob("semantic.damaged.db*"):
                    path.unlink(missing_ok=True)
                for path in self._folder.glob("*semantic.vectors*"):
                    vectors.remove(path)
            self._truncate(db)
            return num

        return self._run(work)

    def _truncate(self, db: sqlite3.Connection) -> None:
        """What was overwritten is in the log still, until that is done with."""
        busy = _integer(db, "PRAGMA wal_checkpoint(TRUNCATE)")
        if busy:
            raise EntriesFailed(f"{self.path}: another process is reading it, so not all of what was forgotten is erased yet")

    def save(self, contents: Vectors) -> None:
        """In `vectors_path`, unless something is forgotten meanwhile."""
        epoch = self.epoch
        whole = self._folder / f"semantic.vectors.{secrets.token_hex(4)}"
        try:
            contents.save(whole)
            with self._locked():
                if self.epoch == epoch:
                    os.replace(whole, self.vectors_path)
        except OSError as error:
            raise EntriesFailed(f"{self.vectors_path}: {error}") from error
        finally:
            whole.unlink(missing_ok=True)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    # -- the file ------------------------------------------------------------------------------------------------------

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            try:
                return work(self._connection())
            except sqlite3.Error as error:
                if not _is_damage(error) or not self._writes:
                    raise
                self._put_aside(str(error))
            return work(self._connection())
        except (sqlite3.Error, OSError, msgspec.MsgspecError) as error:
            self.close()
            raise EntriesFailed(f"{self.path}: {error}") from error

    def _connection(self) -> sqlite3.Connection:
        if self._db is not None:
            try:
                if _inode(self.path) == self._inode:
                    return self._db
            except FileNotFoundError:
                pass
            self.close()
        if self._writes:
            self._map_epoch()
        mode = "rwc" if self._writes else "rw"
        db = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode={mode}", uri=True, timeout=BUSY_S, isolation_level=None)
        try:
            if self._writes:
                self.path.chmod(0o600)
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute("PRAGMA secure_delete = ON")
                db.execute(f"PRAGMA journal_size_limit = {4 << 20}")
                self._make(db)
            else:
                db.execute("PRAGMA query_only = ON")
            if _integer(db, "PRAGMA user_version") != FORMAT:
                raise _Unreadable(f"not of format {FORMAT}")
            self._inode = _inode(self.path)
        except BaseException:
            db.close()
            raise
        self._db = db
        self._num_opened += 1
        return db

    def _make(self, db: sqlite3.Connection) -> None:
        with self._transaction(db):
            if not _integer(db, "PRAGMA user_version"):
                for statement in filter(None, map(str.strip, _SCHEMA.split(";\n"))):
                    db.execute(statement)
            if self._encoder and db.execute("SELECT encoder FROM meta").fetchone() != (self._encoder,):
                db.execute("DELETE FROM entries")  # their vectors are of another encoder
                db.execute("UPDATE meta SET encoder = ?", (self._encoder,))

    def _map_epoch(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._epoch is None or self._epoch.replaced():
            self._epoch = SharedEpoch(self._folder / "semantic.epoch")

    def _change_epoch(self) -> None:
        if self._epoch is not None:
            self._epoch.change()

    def _put_aside(self, reason: str) -> None:
        """Unless another process already has."""
        inode = self._inode if self._db is not None else _inode(self.path)
        self.close()
        with self._locked():
            if _inode(self.path) != inode:
                return
            aside = self._folder / "semantic.damaged.db"
            log.warning("%s cannot be read (%s): put aside as %s, starting empty", self.path, reason, aside.name)
            for suffix in ("-shm", "-wal", ""):
                part = Path(f"{self.path}{suffix}")
                if part.exists():
                    part.rename(f"{aside}{suffix}")
            self._change_epoch()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self._folder / "semantic.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline_s = time.monotonic() + BUSY_S
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline_s:
                        raise
                    time.sleep(0.01)  # on a thread of its own
            yield
        finally:
            os.close(fd)

    # -- inside a transaction ------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self, db: sqlite3.Connection) -> Iterator[None]:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _add(self, db: sqlite3.Connection, added: Sequence[Addition]) -> list[int]:
        """Ids of those that came up before something was forgotten."""
        epoch, late = self.epoch, []
        for addition in added:
            entry = addition.entry
            if addition.epoch != epoch:
                late.append(entry.id)
                continue
            db.execute("DELETE FROM entries WHERE space = ? AND digest = ?", (entry.space, entry.digest))
            db.execute(
                f"INSERT INTO entries ({_ENTRY}, used_at, vector) VALUES ({_marks(range(12))})",
                (
                    entry.id,
                    entry.space,
                    entry.digest,
                    entry.key,
                    entry.text,
                    entry.tenant,
                    entry.model,
                    _tags(entry.tags),
                    entry.stored_at_s,
                    entry.expires_at_s,
                    entry.stored_at_s,
                    addition.vector,
                ),
            )
        return late

    def _note(self, db: sqlite3.Connection, noted: Sequence[Noted]) -> None:
        epoch = self.epoch
        tenants = set()
        for what in (note.what for note in noted if note.epoch == epoch):
            about = (what.tenant, what.model, _tags(what.tags), _encode(what))
            if isinstance(what, Labelled):
                sql = "INSERT INTO labels (tenant, model, tags, content, writer) VALUES (?, ?, ?, ?, ?)"
                db.execute(sql, (*about, self._writer))
            else:
                sql = "INSERT INTO decisions (tenant, model, tags, content, request_id, answer_id) VALUES (?, ?, ?, ?, ?, ?)"
                db.execute(sql, (*about, what.request_id, what.answer_id))
                tenants.add(what.tenant)
        if noted:
            db.execute("DELETE FROM labels WHERE number <= (SELECT MAX(number) FROM labels) - ?", (MAX_LABELS,))
        oldest = "SELECT number FROM decisions WHERE tenant = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2"
        for tenant in tenants:
            db.execute(f"DELETE FROM decisions WHERE tenant = ?1 AND number <= ({oldest})", (tenant, DECISIONS_PER_TENANT))

    def _make_room(self, db: sqlite3.Connection, now_s: float) -> list[int]:
        gone = [row[0] for row in db.execute("DELETE FROM entries WHERE expires_at <= ? RETURNING id", (now_s,)).fetchall()]
        excess = _integer(db, "SELECT num_entries FROM meta") - self._max_entries
        if excess > 0:
            sql = "DELETE FROM entries WHERE id IN (SELECT id FROM entries ORDER BY used_at LIMIT ?) RETURNING id"
            gone += [row[0] for row in db.execute(sql, (excess,)).fetchall()]
        db.execute("DELETE FROM removals WHERE number <= (SELECT MAX(number) FROM removals) - ?", (MAX_REMOVALS,))
        return gone


def _news(db: sqlite3.Connection, since: Position, num: int, writer: bytes) -> News:
    db.execute("BEGIN")  # all of it from one moment
    try:
        (identity,) = db.execute("SELECT identity FROM meta").fetchone()
        oldest = _integer(db, "SELECT COALESCE(MIN(number), 0) FROM removals")
        anew = identity != since.identity or oldest > since.removal + 1
        if anew:
            latest = _integer(db, "SELECT COALESCE(MAX(number), 0) FROM removals")
            since = Position(identity, 0, latest, since.label if identity == since.identity else 0)
        sql = f"SELECT {_ENTRY}, number FROM entries WHERE number > ? ORDER BY number LIMIT ?"
        rows = db.execute(sql, (since.entry, num)).fetchall()
        removals = db.execute("SELECT number, id FROM removals WHERE number > ? ORDER BY number", (since.removal,)).fetchall()
        sql = "SELECT number, writer, content FROM labels WHERE number > ? ORDER BY number"
        labels = db.execute(sql, (since.label,)).fetchall()
    finally:
        db.execute("COMMIT")
    position = Position(
        identity,
        rows[-1][-1] if rows else since.entry,
        removals[-1][0] if removals else since.removal,
        labels[-1][0] if labels else since.label,
    )
    heard = _decoded(((content,) for _, by, content in labels if by != writer), Labelled)
    return News(position, [_entry(row) for row in rows], [row[1] for row in removals], heard, anew, len(rows) < num)


def _decoded(rows: Iterable[tuple[bytes]], kind: type[T]) -> list[T]:
    """Without those that another version of Anaphora wrote, and this one cannot read."""
    found = []
    for (content,) in rows:
        with suppress(msgspec.MsgspecError):
            found.append(msgspec.msgpack.decode(content, type=kind))
    return found


def _entry(row: Sequence[Any]) -> Entry:
    identity, space, digest, key, text, tenant, model, tags, stored_at_s, expires_at_s = row[:-1]
    return Entry(
        id=identity,
        space=space,
        digest=digest,
        key=Key(key),
        text=text,
        tenant=Tenant(tenant),
        model=model,
        tags=tuple(msgspec.json.decode(tags)),
        stored_at_s=stored_at_s,
        expires_at_s=expires_at_s,
    )


class _Unreadable(sqlite3.DatabaseError):
    """SQLite reads it, but it is not what this module writes."""


def _is_damage(error: sqlite3.Error) -> bool:
    if isinstance(error, _Unreadable | sqlite3.IntegrityError):  # no statement here breaks a constraint of sound data
        return True
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _integer(db: sqlite3.Connection, sql: str, values: Sequence[object] = ()) -> int:
    """The first value of the first row."""
    row = db.execute(sql, values).fetchone()
    if row is None or not isinstance(row[0], int):
        raise _Unreadable(f"no number: {sql}")
    return row[0]


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def _tags(tags: Sequence[str]) -> str:
    return msgspec.json.encode(tags).decode()


def _where(scope: Scope) -> tuple[str, list[str]]:
    conditions = {
        "tenant = ?": scope.tenant,
        "model = ?": scope.model,
        "EXISTS (SELECT 1 FROM json_each(tags) WHERE value = ?)": scope.tag,
    }
    chosen = {condition: value for condition, value in conditions.items() if value is not None}
    return " AND ".join(chosen) or "TRUE", list(chosen.values())


def _inode(path: Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino
