"""The tables of the semantic level's file: what is read from them and written to them. When, `entry_file` knows."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from anaphora.levels.semantic.records import Decision, Entry, Labelled
from anaphora.sqlite import integer
from anaphora.types import Key, Scope, Tenant

FORMAT = 2
"""SQLite's `user_version`. A file of a later format is put aside like a damaged one; one of an earlier format becomes one of
this."""
MAX_REMOVALS = 100_000
"""Numbers that are kept of what was removed. Whoever has fallen behind further reads everything again."""
DECISIONS_PER_TENANT = 10_000
MAX_LABELS = 200_000

SCHEMA = f"""
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 0), identity BLOB NOT NULL, encoder TEXT NOT NULL, num_entries INTEGER NOT NULL
);
CREATE TABLE entries (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id INTEGER NOT NULL UNIQUE, space BLOB NOT NULL, digest BLOB NOT NULL,
    key BLOB NOT NULL, text TEXT NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, tags TEXT NOT NULL,
    stored_at REAL NOT NULL, expires_at REAL, used_at REAL NOT NULL, vector BLOB NOT NULL,
    form BLOB NOT NULL DEFAULT x'', UNIQUE (space, digest)
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
FROM_1 = """
ALTER TABLE entries ADD COLUMN form BLOB NOT NULL DEFAULT x'';
PRAGMA user_version = 2
"""
_ENTRY = "id, space, digest, key, text, tenant, model, tags, form, stored_at, expires_at"
_encode = msgspec.msgpack.encode

T = TypeVar("T")


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


# -- inside a transaction ----------------------------------------------------------------------------------------------


def add(db: sqlite3.Connection, added: Sequence[Addition], epoch: int) -> list[int]:
    """Ids of those that came up before something was forgotten."""
    late = []
    for addition in added:
        entry = addition.entry
        if addition.epoch != epoch:
            late.append(entry.id)
            continue
        db.execute("DELETE FROM entries WHERE space = ? AND digest = ?", (entry.space, entry.digest))
        db.execute(
            f"INSERT INTO entries ({_ENTRY}, used_at, vector) VALUES ({marks(range(13))})",
            (
                entry.id,
                entry.space,
                entry.digest,
                entry.key,
                entry.text,
                entry.tenant,
                entry.model,
                _tags(entry.tags),
                entry.form,
                entry.stored_at_s,
                entry.expires_at_s,
                entry.stored_at_s,
                addition.vector,
            ),
        )
    return late


def note(db: sqlite3.Connection, noted: Sequence[Noted], epoch: int, writer: bytes) -> None:
    tenants = set()
    for what in (note.what for note in noted if note.epoch == epoch):
        about = (what.tenant, what.model, _tags(what.tags), _encode(what))
        if isinstance(what, Labelled):
            sql = "INSERT INTO labels (tenant, model, tags, content, writer) VALUES (?, ?, ?, ?, ?)"
            db.execute(sql, (*about, writer))
        else:
            sql = "INSERT INTO decisions (tenant, model, tags, content, request_id, answer_id) VALUES (?, ?, ?, ?, ?, ?)"
            db.execute(sql, (*about, what.request_id, what.answer_id))
            tenants.add(what.tenant)
    if noted:
        db.execute("DELETE FROM labels WHERE number <= (SELECT MAX(number) FROM labels) - ?", (MAX_LABELS,))
    oldest = "SELECT number FROM decisions WHERE tenant = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2"
    for tenant in tenants:
        db.execute(f"DELETE FROM decisions WHERE tenant = ?1 AND number <= ({oldest})", (tenant, DECISIONS_PER_TENANT))


def make_room(db: sqlite3.Connection, max_entries: int, now_s: float) -> list[int]:
    gone = [row[0] for row in db.execute("DELETE FROM entries WHERE expires_at <= ? RETURNING id", (now_s,)).fetchall()]
    excess = integer(db, "SELECT num_entries FROM meta") - max_entries
    if excess > 0:
        sql = "DELETE FROM entries WHERE id IN (SELECT id FROM entries ORDER BY used_at LIMIT ?) RETURNING id"
        gone += [row[0] for row in db.execute(sql, (excess,)).fetchall()]
    db.execute("DELETE FROM removals WHERE number <= (SELECT MAX(number) FROM removals) - ?", (MAX_REMOVALS,))
    return gone


# -- reading -----------------------------------------------------------------------------------------------------------


def news(db: sqlite3.Connection, since: Position, num: int, writer: bytes) -> News:
    db.execute("BEGIN")  # all of it from one moment
    try:
        (identity,) = db.execute("SELECT identity FROM meta").fetchone()
        oldest = integer(db, "SELECT COALESCE(MIN(number), 0) FROM removals")
        anew = identity != since.identity or oldest > since.removal + 1
        if anew:
            latest = integer(db, "SELECT COALESCE(MAX(number), 0) FROM removals")
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
    heard = decoded(((content,) for _, by, content in labels if by != writer), Labelled)
    return News(position, [_entry(row) for row in rows], [row[1] for row in removals], heard, anew, len(rows) < num)


def decoded(rows: Iterable[tuple[bytes]], kind: type[T]) -> list[T]:
    """Without those that another version of Anaphora wrote, and this one cannot read."""
    found = []
    for (content,) in rows:
        with suppress(msgspec.MsgspecError):
            found.append(msgspec.msgpack.decode(content, type=kind))
    return found


def _entry(row: Sequence[Any]) -> Entry:
    identity, space, digest, key, text, tenant, model, tags, form, stored_at_s, expires_at_s = row[:-1]
    return Entry(
        id=identity,
        space=space,
        digest=digest,
        key=Key(key),
        text=text,
        form=form,
        tenant=Tenant(sys.intern(tenant)),  # few names, many entries
        model=sys.intern(model),
        tags=tuple(msgspec.json.decode(tags)),
        stored_at_s=stored_at_s,
        expires_at_s=expires_at_s,
    )


def marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def _tags(tags: Sequence[str]) -> str:
    return msgspec.json.encode(tags).decode()


def where_within(scope: Scope) -> tuple[str, list[str]]:
    conditions = {
        "tenant = ?": scope.tenant,
        "model = ?": scope.model,
        "EXISTS (SELECT 1 FROM json_each(tags) WHERE value = ?)": scope.tag,
    }
    chosen = {condition: value for condition, value in conditions.items() if value is not None}
    return " AND ".join(chosen) or "TRUE", list(chosen.values())
