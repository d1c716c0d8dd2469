"""The book of a ledger: one SQLite file (WAL), one row for each request, written by all gateway processes of a server.

Amounts are whole numbers, so that sums are exact whatever they are taken over. A `Book` is for one thread.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import msgspec

from anaphora.errors import AnaphoraError
from anaphora.ledger.entry import REFRESH, Entry
from anaphora.ledger.query import DIMENSIONS, Group, Query, Sums
from anaphora.sqlite import execute_all, prepare, transaction

FORMAT = 1
"""SQLite's `user_version`."""
BUSY_S = 5.0
"""How long a writer waits for another process's."""

_TEXT = {"request_id", "tenant", "workspace", "tag", "asked", "model", "upstream", "level", "outcome"}
_COLUMNS = Entry.__struct_fields__
_SCHEMA = f"""
CREATE TABLE requests (
    id INTEGER PRIMARY KEY,
    {", ".join(f"{name} {'TEXT NOT NULL' if name in _TEXT else 'INTEGER'}" for name in _COLUMNS)}
);
CREATE INDEX requests_by_time ON requests (at_us);
CREATE INDEX requests_by_tenant ON requests (tenant, at_us);
PRAGMA user_version = {FORMAT};
"""
_INSERT = f"INSERT INTO requests ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"

_COUNTED = {
    "num_requests": f"SUM(level != '{REFRESH}')",
    "num_failed": "SUM(outcome = 'failed')",
    "num_left": "SUM(outcome = 'left')",
    "num_unpriced": "SUM(priced = 0)",
    "num_estimated": "SUM(estimated)",
    "num_off": "SUM(off != 0)",
    "off": "SUM(ABS(off))",
    "num_first": "COUNT(first_us)",
}
_MONEY = ("paid", "saved_answers", "saved_prompts")
_HALF = 10**9
"""SQLite's integers end at nine million dollars' worth of our units, so amounts are summed in two halves."""


class BookProblem(AnaphoraError):
    """The book cannot be read or written; says which and why."""


class Book:
    """Opened when it is first used. Without `writes` a file that is not there has no rows, and is not made."""

    def __init__(self, path: Path, *, writes: bool = False) -> None:
        self.path = path
        self._writes = writes
        self._connection: sqlite3.Connection | None = None

    def append(self, entries: Iterable[Entry]) -> None:
        """All of them or none."""
        rows = [msgspec.structs.astuple(entry) for entry in entries]
        with self._transaction() as connection:
            connection.executemany(_INSERT, rows)

    def amend(self, entry: Entry) -> Entry | None:
        """Put `entry` in the place of the one of the same request and time, and return that one. None: there is none."""
        names = ", ".join(f"{name} = ?" for name in _COLUMNS)
        which = (entry.at_us, entry.request_id)
        with self._transaction() as connection:
            found = connection.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM requests WHERE at_us = ? AND request_id = ?", which
            ).fetchone()
            if found is None:
                return None
            connection.execute(
                f"UPDATE requests SET {names} WHERE at_us = ? AND request_id = ?", (*msgspec.structs.astuple(entry), *which)
            )
        return Entry(*found)

    def anonymise(self, tenant: str | None, model: str | None, tag: str | None = None) -> None:
        """Drop labels and ids of the requests of a forget, in the file's old pages too; amounts stay."""
        conditions = {"tenant = ?": tenant, "(model = ? OR asked = ?)": model, "tag = ?": tag}
        wanted = {text: value for text, value in conditions.items() if value is not None}
        values = [value for text, value in wanted.items() for _ in range(text.count("?"))]
        where = " AND ".join(["(tag != '' OR request_id != '')", *wanted])
        with self._transaction() as connection:
            connection.execute(f"UPDATE requests SET tag = '', request_id = '' WHERE {where}", values)
        with suppress(sqlite3.Error):  # else a later one does it
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def prune(self, before_us: int) -> None:
        with self._transaction() as connection:
            connection.execute("DELETE FROM requests WHERE at_us < ?", (before_us,))

    def groups(self, by: Sequence[str], query: Query) -> list[Group]:
        """One for each combination of the dimensions `by` that there is, in their order. Without any: at most one, of all."""
        summed = [_COUNTED.get(name, f"SUM({name})") for name in Sums.__struct_fields__ if name not in _MONEY]
        summed += [f"SUM({name} / {_HALF}), SUM({name} % {_HALF})" for name in _MONEY]
        keys = [DIMENSIONS[name] for name in by]
        where, values = _where(query)
        order = ", ".join(str(place + 1) for place in range(len(by)))
        ordered = f"GROUP BY {order} ORDER BY {order}" if by else "HAVING COUNT(*) > 0"
        groups = []
        for row in self._select(f"SELECT {', '.join([*keys, *summed])} FROM requests {where} {ordered}", values):
            key, rest = row[: len(by)], row[len(by) :]
            counts, halves = rest[: -2 * len(_MONEY)], rest[-2 * len(_MONEY) :]
            money = [high * _HALF + low for high, low in zip(halves[::2], halves[1::2], strict=True)]
            groups.append(Group(dict(zip(by, map(str, key), strict=True)), Sums(*[count or 0 for count in counts], *money)))
        return groups

    def rows(self, query: Query, *, after: int = 0, limit: int = -1) -> list[tuple[int, Entry]]:
        """(number, entry), in the order they were written, beginning behind number `after`; -1: all."""
        where, values = _where(query)
        where = f"{where} AND id > ?" if where else "WHERE id > ?"
        text = f"SELECT id, {', '.join(_COLUMNS)} FROM requests {where} ORDER BY id LIMIT ?"
        return [(row[0], Entry(*row[1:])) for row in self._select(text, (*values, after, limit))]

    def identity(self) -> int:
        """A number that no other book has, as long as there is this one."""
        with self._transaction() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS identity (place INTEGER PRIMARY KEY, number INTEGER NOT NULL)")
            connection.execute("INSERT OR IGNORE INTO identity VALUES (1, ?)", (secrets.randbits(62),))
            number: int = connection.execute("SELECT number FROM identity").fetchone()[0]
        return number

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the file ------------------------------------------------------------------------------------------------------

    def _select(self, text: str, values: Sequence[object]) -> list[Any]:
        if not self._writes and not self.path.exists():
            return []
        try:
            connection = self._open()
            if not self._writes and not self._version(connection):  # whoever makes it has not finished
                return []
            return connection.execute(text, values).fetchall()
        except sqlite3.Error as error:
            raise self._problem(error) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Holds the file's write lock. Raises BookProblem."""
        try:
            connection = self._open()
            with transaction(connection):
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise self._problem(error) from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        if self._writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        mode = "rwc" if self._writes else "rw"  # whoever reads a WAL file may have to make its index
        address = f"{self.path.resolve().as_uri()}?mode={mode}"
        connection = sqlite3.connect(address, uri=True, timeout=BUSY_S, isolation_level=None)
        try:
            if self._writes:
                self.path.chmod(0o600)
                prepare(connection, patience_s=BUSY_S)
                self._make(connection)
            else:
                connection.execute("PRAGMA query_only = ON")
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _make(self, connection: sqlite3.Connection) -> None:
        with transaction(connection):
            if not self._version(connection):
                execute_all(connection, _SCHEMA)

    def _version(self, connection: sqlite3.Connection) -> int:
        """0: there is nothing in the file yet."""
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > FORMAT:
            raise BookProblem(f"the ledger {self.path} is of a later version of Anaphora")
        return version

    def _problem(self, error: Exception) -> BookProblem:
        self.close()  # and open it again the next time: it may have been put there again
        return BookProblem(f"the ledger {self.path} cannot be used: {error}")


def _where(query: Query) -> tuple[str, list[object]]:
    conditions = {"at_us >= ?": query.from_us, "at_us < ?": query.to_us, "tenant = ?": query.tenant}
    wanted = {text: value for text, value in conditions.items() if value is not None}
    return (f"WHERE {' AND '.join(wanted)}" if wanted else ""), list(wanted.values())
