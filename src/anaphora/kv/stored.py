"""A KV block as it lies in a tier outside the pool: what it says of itself, before its frame. Needs no torch.

    length of the header 4 | header (MessagePack) | frame (`codecs.frame`)

A block's key follows from its parent's hash and its tokens, so whoever reads it can tell whether it is what its key says.
"""

from __future__ import annotations

import msgspec

from anaphora.codecs import frame
from anaphora.errors import DamagedBlock
from anaphora.keys import block_hashes, digest
from anaphora.types import BlockHash, Key

_HEADER_LENGTH = 4


class Header(msgspec.Struct, frozen=True, array_like=True):
    """What a stored block says of itself before its frame."""

    parent: bytes
    """The hash of the block before it; of the first one, its namespace."""
    tokens: tuple[int, ...]
    start: int = 0
    """How many tokens of the prompt stand before it. Not in its key: for looking at blocks, not for using them."""


def pack(header: Header, framed: bytes) -> bytes:
    encoded = msgspec.msgpack.encode(header)
    return b"".join((len(encoded).to_bytes(_HEADER_LENGTH, "little"), encoded, framed))


def unpack(value: bytes) -> tuple[Header, memoryview]:
    """The header, and the frame behind it. Of a value that was cut, as much of the frame as there is. Raises DamagedBlock."""
    end = _HEADER_LENGTH + int.from_bytes(value[:_HEADER_LENGTH], "little")
    try:
        return msgspec.msgpack.decode(value[_HEADER_LENGTH:end], type=Header), memoryview(value)[end:]
    except msgspec.MsgspecError as error:
        raise DamagedBlock(f"no header: {error}") from error


def storage_key(block_hash: BlockHash, *, lossy: bool) -> Key:
    """The key of a block in the slower tiers."""
    return Key(digest((b"lossy", block_hash)) if lossy else block_hash)


def identified(key: Key, header: Header) -> tuple[BlockHash, bool]:
    """The hash of the block with this header, and whether `key` is that of a lossy one. Raises DamagedBlock where the key does
    not follow from the header."""
    hashes = block_hashes(header.parent, header.tokens, len(header.tokens)) if header.tokens else []
    for block_hash in hashes:
        for lossy in (False, True):
            if storage_key(block_hash, lossy=lossy) == key:
                return block_hash, lossy
    raise DamagedBlock("its key does not follow from its tokens")


def verified(key: Key, value: bytes) -> tuple[Header, frame.Frame]:
    """What lies under `key`, if it is, whole and unaltered, the block that the key says. Raises DamagedBlock."""
    header, framed = unpack(value)
    content = frame.check(framed, bound_to=key)
    _, lossy = identified(key, header)
    if lossy != content.lossy:
        raise DamagedBlock("its key says otherwise than its frame whether it was encoded with a loss")
    return header, content
