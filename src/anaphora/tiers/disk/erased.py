"""What was erased from a folder in the last minute, epoch by epoch: what was prepared before, and not meant by it, need not be
lost. For use under the index's write lock.

Names are noted as digests with a salt of their own: a forgotten tenant's name is forgotten, too.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Mapping
from hashlib import blake2b

import msgspec

from anaphora.tiers.base import Entry, Erasure
from anaphora.tiers.disk.epoch import SharedEpoch
from anaphora.types import Key

SCHEMA = """
CREATE TABLE erased (epoch BLOB PRIMARY KEY, before BLOB NOT NULL, at REAL NOT NULL, note BLOB NOT NULL) WITHOUT ROWID;
"""
REMEMBERED_S = 60.0
_MOST_KEYS = 1000
"""Of an erasure that is noted: of a larger one all that is known is that there was one."""


class _Note(msgspec.Struct, frozen=True, array_like=True):
    """An `Erasure`."""

    salt: bytes
    keys: tuple[bytes, ...] | None
    """None: everything within the scope of the following fields."""
    tenant: bytes | None = None
    model: bytes | None = None
    tag: bytes | None = None

    @classmethod
    def of(cls, erasure: Erasure) -> _Note:
        salt, scope = secrets.token_bytes(16), erasure.scope
        if scope is None:
            return cls(salt, erasure.keys)
        return cls(
            salt, None, *[None if name is None else _digest(salt, name) for name in (scope.tenant, scope.model, scope.tag)]
        )

    def covers(self, key: Key, entry: Entry) -> bool:
        if self.keys is not None:
            return key in self.keys
        return (
            (self.tenant is None or self.tenant == _digest(self.salt, entry.tenant))
            and (self.model is None or self.model == _digest(self.salt, entry.model))
            and (self.tag is None or self.tag in [_digest(self.salt, tag) for tag in entry.tags])
        )


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Note).decode


def erase(db: sqlite3.Connection, epoch: SharedEpoch, erasure: Erasure, now_s: float) -> None:
    """Change the epoch, and note why. If the transaction fails, nobody knows why, and everybody supposes the worst."""
    before = epoch.read()
    epoch.change()
    if len(erasure.keys) <= _MOST_KEYS:
        row = _name(epoch.read()), _name(before), now_s, _encode(_Note.of(erasure))
        db.execute("INSERT OR REPLACE INTO erased VALUES (?, ?, ?, ?)", row)


def not_erased(db: sqlite3.Connection, entries: Mapping[Key, Entry], epoch: int, now: int) -> Mapping[Key, Entry]:
    """Those that nothing covers of what made the epoch `now`, which was `epoch`. None, if that is not known."""
    wanted, name = _name(epoch), _name(now)
    while name != wanted and entries:
        row = db.execute("SELECT before, note FROM erased WHERE epoch = ?", (name,)).fetchone()
        if row is None:
            return {}
        name, note = row[0], _decode(row[1])
        entries = {key: entry for key, entry in entries.items() if not note.covers(key, entry)}
    return entries


def _name(epoch: int) -> bytes:
    return epoch.to_bytes(8, "big")  # SQLite's integers have a sign


def _digest(salt: bytes, name: str) -> bytes:
    return blake2b(name.encode(), key=salt, digest_size=16).digest()
