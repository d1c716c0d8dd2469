"""Entries as rows of the index."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from anaphora.tiers.base import Entry
from anaphora.types import Key, Scope, Tenant

Removed = list[tuple[Key, int]]
"""What was removed, and how large each was."""

_KEYS_PER_QUERY = 500


class Row(msgspec.Struct, array_like=True):
    """`schema.COLUMNS`, typed: a damaged row may hold anything."""

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

    def entry(self, value: bytes) -> Entry:
        """Raises ValueError where the row is damaged."""
        tags = msgspec.json.decode(self.tags, type=tuple[str, ...])
        return Entry(value, self.stored_at, self.expires_at, self.cost, Tenant(self.tenant), self.model, tags)


def select(db: sqlite3.Connection, columns: str, keys: Collection[Key]) -> Iterator[tuple[Any, ...]]:
    """`columns` of those of `keys` that are there."""
    wanted = list(keys)
    for start in range(0, len(wanted), _KEYS_PER_QUERY):
        some = wanted[start : start + _KEYS_PER_QUERY]
        marks = ",".join("?" * len(some))
        yield from db.execute(f"SELECT {columns} FROM entries WHERE key IN ({marks})", some).fetchall()


def remove(db: sqlite3.Connection, values_folder: Path, where: str, values: Sequence[object]) -> Removed:
    """Rows and their files. The files go before the commit, so that room is free before it is used again."""
    rows = db.execute(f"DELETE FROM entries WHERE {where} RETURNING key, size, file", values).fetchall()
    for _, _, file in rows:
        if file is not None:
            remove_file(values_folder, file)
    return [(Key(key), size) for key, size, _ in rows]


def remove_file(values_folder: Path, name: str) -> None:
    (values_folder / name).unlink(missing_ok=True)


def checksum(key: bytes, entry: Entry) -> bytes:
    """Covers value and metadata, and binds them to the key: bytes that strayed under another key do not pass."""
    about = (entry.stored_at_s, entry.expires_at_s, entry.cost_s, entry.tenant, entry.model, entry.tags)
    check = blake2b(msgspec.msgpack.encode(about), digest_size=16, key=key)
    check.update(entry.value)
    return check.digest()


def within(scope: Scope) -> tuple[str, list[str]]:
    """A condition, and its values."""
    conditions = {
        "tenant = ?": scope.tenant,
        "model = ?": scope.model,
        "EXISTS (SELECT 1 FROM json_each(tags) WHERE value = ?)": scope.tag,
    }
    chosen = {condition: value for condition, value in conditions.items() if value is not None}
    return " AND ".join(chosen) or "TRUE", [str(value) for value in chosen.values()]
