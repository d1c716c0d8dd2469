"""What SQLite files need that several processes share (WAL): transactions, a lock beside the file, and what to do with a
damaged one."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_LOG_BYTES = 4 << 20
"""To which a write-ahead log shrinks when it has been written back."""


class Unreadable(sqlite3.DatabaseError):
    """SQLite reads it, but it is not what we write."""


def prepare(db: sqlite3.Connection, *, synchronous: str = "NORMAL", patience_s: float = 5.0) -> None:
    """The settings of a connection that writes."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            # Two that do this to a new file at once do not wait for each other.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)  # on a worker thread
    db.execute(f"PRAGMA synchronous = {synchronous}")
    db.execute("PRAGMA secure_delete = ON")  # what was forgotten is not left in free pages
    db.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")


def execute_all(db: sqlite3.Connection, statements: str) -> None:
    """In the transaction that is open, which `executescript` would commit. A semicolon at a line's end ends a statement."""
    for statement in filter(None, map(str.strip, statements.split(";\n"))):
        db.execute(statement)


@contextmanager
def transaction(db: sqlite3.Connection, undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Under the write lock from the beginning, so that nobody's write comes between its reading and its writing. `undo` is
    called where it fails, before the lock is given up."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        undo()
        if db.in_transaction:  # SQLite rolls back by itself where a disk is full
            db.execute("ROLLBACK")
        raise


@contextmanager
def locked(path: Path, patience_s: float) -> Iterator[None]:
    """Hold the lock file `path`. Raises BlockingIOError after `patience_s`: whoever holds it may have been stopped."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline_s = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)  # on a worker thread
        yield
    finally:
        os.close(fd)


def integer(db: sqlite3.Connection, sql: str, values: Sequence[object] = ()) -> int:
    """The one integer of a one-row result. Raises Unreadable."""
    rows = db.execute(sql, values).fetchall()
    if len(rows) != 1 or not isinstance(rows[0][0], int):
        raise Unreadable(f"{sql} gives no number")
    return int(rows[0][0])


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file is to be put aside for it."""
    if isinstance(error, Unreadable | sqlite3.IntegrityError):  # no statement here breaks a constraint of sound data
        return True
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def put_aside(path: Path, aside: Path) -> None:
    """With its log."""
    for suffix in ("-shm", "-wal", ""):
        part = Path(f"{path}{suffix}")
        if part.exists():
            part.rename(f"{aside}{suffix}")


def inode(path: Path) -> tuple[int, int]:
    """Of which file it is the name: another one, and somebody put another file there."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino
