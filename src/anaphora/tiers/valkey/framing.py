"""An entry's metadata as the server keeps it, with a checksum over it, the value and the key."""

from __future__ import annotations

import msgspec
import xxhash

from anaphora.tiers.base import Entry
from anaphora.types import Key, Tenant


class About(msgspec.Struct, frozen=True, array_like=True):
    """The scripts read the first five fields: their order is part of the format. No bytes: Lua's msgpack does not know them."""

    size: int
    """Of the entry, as it counts against the capacity."""
    expires_at_s: float
    """0.0: never."""
    tenant: str
    model: str
    tags: tuple[str, ...]
    stored_at_s: float
    cost_s: float
    checksum: str


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(About).decode


def packed(key: Key, entry: Entry) -> bytes:
    about = About(
        entry.size,
        entry.expires_at_s or 0.0,
        entry.tenant,
        entry.model,
        entry.tags,
        entry.stored_at_s,
        entry.cost_s,
        "",
    )
    return _encode(msgspec.structs.replace(about, checksum=_checksum(key, about, entry.value)))


def unpacked(data: bytes) -> About | None:
    """None: not what `packed` makes."""
    try:
        return _decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def restored(key: Key, data: bytes, value: bytes | None, now_s: float) -> Entry | None:
    """The entry, which may have expired. None: its value, or what is said about it, is not what was stored under this key."""
    about = unpacked(data)
    if about is None:
        return None
    gone = value is None and about.expires_at_s > 0  # by the server's clock it has expired
    entry = Entry(
        value or b"",
        about.stored_at_s,
        now_s if gone else about.expires_at_s or None,
        about.cost_s,
        Tenant(about.tenant),
        about.model,
        about.tags,
    )
    if gone or entry.expired(now_s):
        return entry
    intact = value is not None and entry.size == about.size and _checksum(key, about, value) == about.checksum
    return entry if intact else None


def _checksum(key: Key, about: About, value: bytes) -> str:
    """Against accidents, not against whoever may write to the server. As fast as memory: values are large."""
    sum_ = xxhash.xxh3_128(key)
    sum_.update(_encode(msgspec.structs.replace(about, checksum="")))
    sum_.update(value)
    return sum_.hexdigest()
