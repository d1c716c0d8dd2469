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

import logging
import os
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import msgspec

from anaphora import vectors
from anaphora.errors import AnaphoraError
from anaphora.levels.semantic.entry_rows import (
    FORMAT,
    FROM_1,
    SCHEMA,
    Changes,
    News,
    Position,
    add,
    decoded,
    make_room,
    marks,
    news,
    note,
    where_within,
)
from anaphora.levels.semantic.records import Decision, Labelled
from anaphora.sqlite import Unreadable, execute_all, inode, integer, is_damage, locked, prepare, put_aside, transaction
from anaphora.tiers.disk.epoch import SharedEpoch
from anaphora.types import Scope
from anaphora.vectors import Vectors

log = logging.getLogger(__name__)

BUSY_S = 5.0
"""How long to wait for another process's write."""
_IDS_PER_QUERY = 500
_MAKING = {0: SCHEMA, 1: FROM_1}
"""What makes a file of this format of a new one, and of an earlier one."""

T = TypeVar("T")


class EntriesFailed(AnaphoraError):
    """The file cannot be read or written; says which and why."""


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
        return self._run(lambda db: (self._num_opened, integer(db, "PRAGMA data_version")))

    def news(self, since: Position, num: int) -> News:
        """With at most `num` entries, and without the labels that this object wrote."""
        return self._run(lambda db: news(db, since, num, self._writer))

    def vectors(self, ids: Sequence[int]) -> dict[int, bytes]:
        def work(db: sqlite3.Connection) -> dict[int, bytes]:
            found: dict[int, bytes] = {}
            for start in range(0, len(ids), _IDS_PER_QUERY):
                some = ids[start : start + _IDS_PER_QUERY]
                found.update(db.execute(f"SELECT id, vector FROM entries WHERE id IN ({marks(some)})", some).fetchall())
            return found

        return self._run(work)

    def decisions(self, tenant: str | None = None, *, request: str = "", limit: int = -1) -> list[Decision]:
        """The latest first. `request`: only those that are known by this id, the request's or the answer's."""
        conditions = {"tenant = :tenant": tenant is not None, "(request_id = :id OR answer_id = :id)": bool(request)}
        where = " AND ".join(text for text, holds in conditions.items() if holds) or "TRUE"
        sql = f"SELECT content FROM decisions WHERE {where} ORDER BY number DESC LIMIT :limit"
        values = {"tenant": tenant, "id": request, "limit": limit}
        return self._run(lambda db: decoded(db.execute(sql, values), Decision))

    def labels(self) -> list[Labelled]:
        """All, the oldest first."""
        sql = "SELECT content FROM labels ORDER BY number"
        return self._run(lambda db: decoded(db.execute(sql), Labelled))

    def count(self, scope: Scope) -> int:
        where, values = where_within(scope)
        return self._run(lambda db: integer(db, f"SELECT COUNT(*) FROM entries WHERE {where}", values))

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, changes: Changes, now_s: float) -> list[int]:
        """All or nothing, but without what came up before something was forgotten. Ids of entries that were not written, or had
        to go."""

        def work(db: sqlite3.Connection) -> list[int]:
            with transaction(db):
                gone = add(db, changes.added, self.epoch)
                db.executemany("DELETE FROM entries WHERE id = ?", [(identity,) for identity in changes.removed])
                used = [(at_s, identity) for identity, at_s in changes.used.items()]
                db.executemany("UPDATE entries SET used_at = ? WHERE id = ?", used)
                note(db, changes.noted, self.epoch, self._writer)
                return gone + make_room(db, self._max_entries, now_s)

        return self._run(work)

    def forget(self, scope: Scope) -> int:
        """Erase entries, labels and decisions within `scope`, in old pages too, and what was made of them; how many entries."""
        where, values = where_within(scope)

        def work(db: sqlite3.Connection) -> int:
            with transaction(db):
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
        busy = integer(db, "PRAGMA wal_checkpoint(TRUNCATE)")
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
                if not is_damage(error) or not self._writes:
                    raise
                self._put_aside(str(error))
            return work(self._connection())
        except (sqlite3.Error, OSError, msgspec.MsgspecError) as error:
            self.close()
            raise EntriesFailed(f"{self.path}: {error}") from error

    def _connection(self) -> sqlite3.Connection:
        if self._db is not None:
            try:
                if inode(self.path) == self._inode:
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
                prepare(db, patience_s=BUSY_S)
                self._make(db)
            else:
                db.execute("PRAGMA query_only = ON")
            if not 0 < integer(db, "PRAGMA user_version") <= FORMAT:
                raise Unreadable(f"not of format {FORMAT}")
            self._inode = inode(self.path)
        except BaseException:
            db.close()
            raise
        self._db = db
        self._num_opened += 1
        return db

    def _make(self, db: sqlite3.Connection) -> None:
        with transaction(db):
            execute_all(db, _MAKING.get(integer(db, "PRAGMA user_version"), ""))
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
        before = self._inode if self._db is not None else inode(self.path)
        self.close()
        with self._locked():
            if inode(self.path) != before:
                return
            aside = self._folder / "semantic.damaged.db"
            log.warning("%s cannot be read (%s): put aside as %s, starting empty", self.path, reason, aside.name)
            put_aside(self.path, aside)
            self._change_epoch()

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self._folder / "semantic.lock", BUSY_S)
