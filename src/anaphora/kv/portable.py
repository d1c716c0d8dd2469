"""One prefix as one file: its blocks from the first to the leaf, to be carried to another machine.

    magic 4 | version 1 | length 4, Manifest | for each block: length 8, Record | SHA-256 of all that, 32

Lengths are little-endian; manifest and records are MessagePack. A file is used as a whole or not at all: `inspect` reads all of
it and believes nothing that does not fit, before `bring_in` stores the first block. The digest is made for damage, not against
forgery: whoever gives you a prefix is trusted as much as whoever may write to the tier.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from anaphora.errors import DamagedBlock, TierFailed
from anaphora.kv.inventory import Block, Seen, block_of
from anaphora.kv.stored import verified
from anaphora.tiers.base import Entry, ExaminableTier, Tier
from anaphora.types import Key, Tenant

_Kind = TypeVar("_Kind")

MAGIC = b"AnKX"
VERSION = 1
_DIGEST_BYTES = 32
_SHORT, _LONG = 4, 8
"""Bytes of the manifest's length, and of a record's."""
_BATCH_BYTES = 16 << 20


class Manifest(msgspec.Struct, frozen=True):
    """What is in the file, said before it comes."""

    model: str
    tenant: Tenant
    codecs: tuple[str, ...]
    num_blocks: int
    num_tokens: int
    namespace: bytes
    """What the first block stands on. It covers the tenant, the request's salt, and the model's fingerprint."""
    written_by: str = ""


class Record(msgspec.Struct, frozen=True, array_like=True):
    """One block."""

    key: Key
    value: bytes
    stored_at_s: float
    cost_s: float


class BroughtIn(msgspec.Struct, frozen=True):
    num_new: int
    num_known: int
    """Blocks that the tier had already: they stay as they are."""


async def carry_out(
    tier: Tier, chain: Sequence[Block], path: Path, *, written_by: str = "", seen: Seen = lambda count: None
) -> int:
    """Write `chain`, as `Inventory.chain` gives it, to `path`; the file's size in bytes. It is there whole, or not at all.

    Raises DamagedBlock where a block is missing or not sound, OSError, TierFailed.
    """
    if chain[0].start:
        raise DamagedBlock(f"its first {chain[0].start} tokens are not there any more, so the rest is of no use")
    manifest = Manifest(
        model=chain[0].model,
        tenant=chain[0].tenant,
        codecs=tuple(sorted({block.codec for block in chain})),
        num_blocks=len(chain),
        num_tokens=chain[-1].end,
        namespace=chain[0].parent,
        written_by=written_by,
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("xb") as file:
            writer = _Writer(file)
            encoded = msgspec.msgpack.encode(manifest)
            writer.write(MAGIC + bytes((VERSION,)) + len(encoded).to_bytes(_SHORT, "little"))
            writer.write(encoded)
            for batch in _batches(chain):
                entries = await _entries(tier, [block.key for block in batch])
                for block in batch:
                    writer.record(_record(block, entries.get(block.key)))
                seen(len(batch))
            file.write(writer.digest())
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return size


def inspect(path: Path, seen: Seen = lambda count: None) -> Manifest:
    """Read all of it. Raises DamagedBlock unless it is what `carry_out` wrote: whole, unaltered, and one chain of sound blocks;
    OSError."""
    with path.open("rb") as file:
        reader = _Reader(file)
        manifest = reader.manifest()
        parent, start = manifest.namespace, 0
        for _ in range(manifest.num_blocks):
            record = reader.record()
            header, _ = verified(record.key, record.value)
            block = block_of(record.key, _entry(record, manifest), 0)
            if header.parent != parent or header.start != start:
                raise DamagedBlock(f"the block behind {start} tokens does not continue the one before it")
            parent, start = block.hash, block.end
            seen(1)
        if start != manifest.num_tokens:
            raise DamagedBlock(f"it holds {start} tokens, and says {manifest.num_tokens}")
        reader.end()
    return manifest


async def bring_in(tier: Tier, path: Path, manifest: Manifest, seen: Seen = lambda count: None) -> BroughtIn:
    """Put the blocks of a file that was inspected into `tier`: all of them, or none.

    Raises TierFailed where they do not fit or the medium fails; what had been put by then is removed again.
    """
    put: list[Key] = []
    chain: list[Key] = []
    try:
        with path.open("rb") as file:
            reader = _Reader(file)
            if reader.manifest() != manifest:
                raise DamagedBlock("the file is another one than a moment ago")
            for records in reader.batches(manifest.num_blocks):
                known = await tier.sizes([record.key for record in records])
                new = {record.key: _entry(record, manifest) for record in records if record.key not in known}
                stored = await tier.put_many(new)
                put += stored
                chain += [record.key for record in records]
                if len(stored) < len(new):
                    raise TierFailed("there is no room for it")
                seen(len(records))
            reader.end()
        there = await tier.sizes(chain)
        if len(there) < len(chain):
            raise TierFailed("there is no room for all of it: its end drove out its beginning")
    except BaseException:
        await tier.delete_many(put)
        raise
    tier.touch(reversed(chain))  # what more prompts share leaves last
    return BroughtIn(num_new=len(put), num_known=len(chain) - len(put))


async def _entries(tier: Tier, keys: Sequence[Key]) -> dict[Key, Entry]:
    if isinstance(tier, ExaminableTier):
        found = await tier.examine(keys)
        return {key: each.entry for key, each in found.items() if each.entry is not None}
    return await tier.get_many(keys)


def _record(block: Block, entry: Entry | None) -> Record:
    if entry is None:
        raise DamagedBlock(f"the block behind {block.start} tokens is gone or damaged: see `anaphora kv verify`")
    verified(block.key, entry.value)
    return Record(block.key, entry.value, entry.stored_at_s, entry.cost_s)


def _entry(record: Record, manifest: Manifest) -> Entry:
    return Entry(record.value, record.stored_at_s, None, record.cost_s, manifest.tenant, manifest.model)


def _batches(chain: Sequence[Block]) -> Iterator[list[Block]]:
    batch: list[Block] = []
    for block in chain:
        batch.append(block)
        if sum(one.size for one in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


class _Writer:
    """Writes, and takes the digest of it all."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sum = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sum.update(data)

    def record(self, record: Record) -> None:
        encoded = msgspec.msgpack.encode(record)
        self.write(len(encoded).to_bytes(_LONG, "little"))
        self.write(encoded)

    def digest(self) -> bytes:
        return self._sum.digest()


class _Reader:
    """Reads what a `_Writer` wrote. Raises DamagedBlock for anything else."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
        self._sum = hashlib.sha256()

    def manifest(self) -> Manifest:
        if self._read(len(MAGIC)) != MAGIC:
            raise DamagedBlock("it is no exported prefix")
        if self._read(1) != bytes((VERSION,)):
            raise DamagedBlock("it was exported by a version of Anaphora that writes another format")
        return self._decode(self._read(self._length(_SHORT)), Manifest)

    def record(self) -> Record:
        return self._decode(self._read(self._length(_LONG)), Record)

    def batches(self, num_blocks: int) -> Iterator[list[Record]]:
        batch: list[Record] = []
        for _ in range(num_blocks):
            batch.append(self.record())
            if sum(len(record.value) for record in batch) >= _BATCH_BYTES:
                yield batch
                batch = []
        if batch:
            yield batch

    def end(self) -> None:
        """Make sure that this was all, and that it is as it was written."""
        if self._left:
            raise DamagedBlock(f"{self._left} bytes follow its last block")
        if self._file.read() != self._sum.digest():
            raise DamagedBlock("its checksum does not match")

    def _length(self, num_bytes: int) -> int:
        return int.from_bytes(self._read(num_bytes), "little")

    def _read(self, size: int) -> bytes:
        if size > self._left:
            raise DamagedBlock("it is cut short")
        data = self._file.read(size)
        self._left -= size
        self._sum.update(data)
        return data

    def _decode(self, data: bytes, kind: type[_Kind]) -> _Kind:
        try:
            return msgspec.msgpack.decode(data, type=kind)
        except msgspec.MsgspecError as error:
            raise DamagedBlock(f"a part of it cannot be read: {error}") from error
