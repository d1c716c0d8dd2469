"""What a KV block is stored as, in any tier: a payload, behind what is needed to trust it.

    magic 4 | version 1 | flags 1 | codec name | type name | number of dimensions 1, each 4 | payload length 8 | checksum 16 |
    payload

Names are a length byte and UTF-8; numbers are little-endian. The checksum is XXH3-128 over everything else. It is made for
damage (a frame cut short, flipped bits, another frame's end), not against forgery: who may write to a tier is trusted.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from anaphora.errors import DamagedBlock

if TYPE_CHECKING:
    import torch

    from anaphora.codecs.base import Codec, Payload

MAGIC = b"AnKV"
VERSION = 1
"""Raise it when frames, or the payloads of any codec of ours, change their meaning: what was stored before is then damaged."""
_LOSSY = 1
_LENGTH = struct.Struct("<Q")
_CHECKSUM_BYTES = 16


class Frame(msgspec.Struct, frozen=True):
    """A frame that was opened: intact, whatever is in it."""

    codec: str
    lossy: bool
    dtype: str
    """As torch calls it, without the `torch.`."""
    shape: tuple[int, ...]
    """Of the block: [layers, 2, kv_heads, block_size, head_dim]."""
    payload: memoryview
    """Into the bytes that were opened."""


def pack(codec: Codec, block: torch.Tensor, payload: Payload, *, bound_to: bytes = b"") -> bytes:
    """The frame of `payload`, which `codec` made of a block of `block`'s shape and type.

    `bound_to`: anything that has to be known when the frame is opened, such as the block's key; it is part of the checksum
    alone, so that a sound frame in a wrong place is damage, too.
    """
    shape = block.shape
    head = b"".join(
        (
            MAGIC,
            bytes((VERSION, _LOSSY if codec.lossy else 0)),
            _named(codec.name),
            _named(_dtype_name(block)),
            struct.pack(f"<B{len(shape)}I", len(shape), *shape),
            _LENGTH.pack(len(payload)),
        )
    )
    return b"".join((head, _checksum(head, payload, bound_to), payload))


def unpack(codec: Codec, block: torch.Tensor, framed: Payload, *, bound_to: bytes = b"") -> memoryview:
    """The payload for `codec` in a frame that holds a block of `block`'s shape and type. Raises DamagedBlock."""
    opened = check(framed, bound_to=bound_to)
    if opened.codec != codec.name:
        raise DamagedBlock(f"it was encoded as {opened.codec!r}, not {codec.name!r}")
    expected = (_dtype_name(block), tuple(block.shape))
    if (opened.dtype, opened.shape) != expected:
        raise DamagedBlock(f"it holds {opened.dtype} {list(opened.shape)}, not {expected[0]} {list(expected[1])}")
    return opened.payload


def codec_of(framed: Payload) -> str:
    """The name of the codec that a frame says it was made by. Raises DamagedBlock where it says none; no more is checked."""
    whole = memoryview(framed).cast("B")
    try:
        return _name_at(whole, 6)[0]
    except (IndexError, UnicodeDecodeError) as error:
        raise DamagedBlock("its beginning is damaged") from error


def check(framed: Payload, *, bound_to: bytes = b"") -> Frame:
    """What is in a frame, made sure that it is all there and as it was packed. Raises DamagedBlock."""
    whole = memoryview(framed).cast("B").toreadonly()
    if whole[:4] != MAGIC:
        raise DamagedBlock("it is no KV block")
    if whole[4:5] != bytes((VERSION,)):
        raise DamagedBlock("it is of another version")
    try:
        codec, at = _name_at(whole, 6)
        dtype, at = _name_at(whole, at)
        num_dimensions = whole[at]
        shape = struct.unpack_from(f"<{num_dimensions}I", whole, at + 1)
        at += 1 + 4 * num_dimensions
        (length,) = _LENGTH.unpack_from(whole, at)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise DamagedBlock("its beginning is damaged") from error
    head, start = whole[: at + _LENGTH.size], at + _LENGTH.size + _CHECKSUM_BYTES
    if len(whole) != start + length:
        raise DamagedBlock(f"it is {len(whole)} bytes long, not {start + length}")
    payload = whole[start:]
    if whole[len(head) : start] != _checksum(head, payload, bound_to):
        raise DamagedBlock("its checksum does not match")
    return Frame(codec, bool(whole[5] & _LOSSY), dtype, shape, payload)


def _checksum(head: Payload, payload: Payload, bound_to: bytes) -> bytes:
    import xxhash

    seen = xxhash.xxh3_128(head)
    seen.update(payload)
    seen.update(bound_to)
    seen.update(_LENGTH.pack(len(bound_to)))
    return seen.digest()


def _dtype_name(block: torch.Tensor) -> str:
    return str(block.dtype).removeprefix("torch.")


def _named(name: str) -> bytes:
    encoded = name.encode()
    return bytes((len(encoded),)) + encoded


def _name_at(whole: memoryview, at: int) -> tuple[str, int]:
    end = at + 1 + whole[at]
    if end > len(whole):
        raise IndexError(end)
    return str(whole[at + 1 : end], "utf-8"), end
