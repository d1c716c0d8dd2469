"""The disk tier's asynchronous face. SQLite and files are only ever touched on its two worker threads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from anaphora.clock import Clock
from anaphora.errors import TierFailed
from anaphora.events import Damaged, Emit, Evicted, ignore
from anaphora.tiers.base import EVERYTHING, Entry, Eviction, Examined, TierStats
from anaphora.tiers.disk.index import DiskIndex, Found, Written
from anaphora.tiers.pieces import Uses, batches
from anaphora.types import Key, Scope

T = TypeVar("T")

_MAX_USES = 1 << 16
_RETRY_OPENING_S = 5.0


class DiskOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    """The folder. Made if it is missing; may be shared by processes of one machine (not over a network file system)."""
    capacity_bytes: int = 4 << 30
    inline_bytes: int = 16 << 10
    """Values of this size and more get a file of their own."""
    fsync: bool = False
    """Wait for the device at every write: entries survive a power cut too, not only a killed process."""
    busy_timeout_s: float = 5.0
    """How long to wait for another process's write before giving up on this one."""
    eviction: Eviction = Eviction()
    """Processes that share the folder should say the same. `index` tells what happens if they do not."""


class DiskTier:
    """Entries in a folder (`index` says how).

    The order of leaving is in the index and not a `Policy` object, because all processes that share the folder must agree on
    it. Uses are noted in memory and written along with the next put, so that reading does not write: several of one entry
    before that count as one.

    Reads have a thread of their own: they need not wait while a write waits for another process.
    """

    name = "disk"

    def __init__(self, options: DiskOptions, *, clock: Clock, emit: Emit = ignore) -> None:
        self._capacity = options.capacity_bytes
        self._clock = clock
        self._emit = emit
        self._writer, self._reader = (
            DiskIndex(
                Path(options.path).expanduser(),
                capacity=options.capacity_bytes,
                eviction=options.eviction,
                inline_bytes=options.inline_bytes,
                fsync=options.fsync,
                busy_timeout_s=options.busy_timeout_s,
                clock=clock,
            )
            for _ in range(2)
        )
        self._write_thread = ThreadPoolExecutor(1, "anaphora-disk-write")
        self._read_thread = ThreadPoolExecutor(1, "anaphora-disk-read")
        self._uses = Uses(_MAX_USES)
        self._num_evicted = 0
        self._num_damaged = 0
        self._opened = False
        self._closed = False
        self._retry_at_s = float("-inf")
        self._opening_error = ""
        try:
            self._writer.open_epoch()
        except TierFailed as error:
            self._opening_failed(error)

    @property
    def capacity_bytes(self) -> int:
        return self._capacity

    async def get_many(self, keys: Collection[Key]) -> dict[Key, Entry]:
        await self._open()
        candidates = self._writer.candidates(keys)
        if not candidates:
            return {}  # no thread, no wait: so it is with nearly every question that is new
        found = await self._read(lambda: self._reader.get(candidates))
        self.touch(found.entries)
        if found.damaged:
            await self._drop(found)
        return found.entries

    def lacks(self, keys: Collection[Key]) -> bool:
        return not self._writer.candidates(keys)

    async def sizes(self, keys: Collection[Key]) -> dict[Key, int]:
        return await self._read(lambda: self._reader.sizes(keys))

    async def examine(self, keys: Collection[Key], *, num_bytes: int | None = None) -> dict[Key, Examined]:
        return await self._read(lambda: self._reader.examine(keys, num_bytes))

    async def put_many(self, entries: Mapping[Key, Entry], *, epoch: int | None = None) -> frozenset[Key]:
        stored: set[Key] = set()
        for batch in batches(entries):
            touched = self._uses.take()
            written = await self._write(partial(self._writer.put, batch, epoch=epoch, touched=touched))
            stored |= written.stored
            self._count_evicted(written)
        return frozenset(stored)

    async def delete_many(self, keys: Collection[Key]) -> int:
        return await self._write(lambda: self._writer.delete(keys))

    async def forget(self, scope: Scope) -> int:
        return await self._write(lambda: self._writer.forget(scope))

    async def keys(self, scope: Scope = EVERYTHING) -> list[Key]:
        return await self._read(lambda: self._reader.keys(scope))

    def touch(self, keys: Iterable[Key]) -> None:
        self._uses.note(keys)

    async def keep(self, keys: Collection[Key], until_s: float) -> int:
        return await self._write(lambda: self._writer.keep(keys, until_s))

    def epoch(self) -> int:
        epoch = self._writer.epoch
        return 0 if epoch is None else epoch.read()

    async def stats(self) -> TierStats:
        num_entries, used_bytes, kept_bytes = await self._read(self._reader.totals)
        return TierStats(num_entries, used_bytes, self._capacity, kept_bytes, self._num_evicted, self._num_damaged)

    async def aclose(self) -> None:
        if self._closed:
            return
        if self._opened and self._uses:
            touched = self._uses.take()
            with contextlib.suppress(TierFailed):  # only the order of use is lost
                await self._write(lambda: self._writer.touch(touched))
        self._closed = True
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._read_thread, self._reader.close)
        await loop.run_in_executor(self._write_thread, self._writer.close)
        self._read_thread.shutdown()
        self._write_thread.shutdown()

    def _count_evicted(self, written: Written) -> None:
        if written.num_evicted:
            self._num_evicted += written.num_evicted
            self._emit(Evicted(self.name, written.num_evicted, written.evicted_bytes))

    async def _drop(self, found: Found) -> None:
        """Remove damaged rows, counting them. A row that went away in the meantime was evicted, not damaged."""
        try:
            count = await self._write(lambda: self._writer.drop_damaged(found.damaged))
        except TierFailed:
            count = len(found.damaged)
        if count:
            self._num_damaged += count
            self._emit(Damaged(self.name, count))

    async def _read(self, work: Callable[[], T]) -> T:
        await self._open()
        return await asyncio.get_running_loop().run_in_executor(self._read_thread, work)

    async def _write(self, work: Callable[[], T]) -> T:
        await self._open()
        return await asyncio.get_running_loop().run_in_executor(self._write_thread, work)

    async def _open(self) -> None:
        """The first use opens the folder. Where that fails, the tier is out of use for a while, without trying again."""
        if self._opened and not self._closed:
            return
        if self._closed:
            raise TierFailed("the disk tier is closed")
        if self._clock.monotonic_s() < self._retry_at_s:
            raise TierFailed(self._opening_error)
        try:
            written = await asyncio.get_running_loop().run_in_executor(self._write_thread, self._writer.open)
        except TierFailed as error:
            self._opening_failed(error)
            raise
        self._opened = True
        self._count_evicted(written)

    def _opening_failed(self, error: TierFailed) -> None:
        self._opening_error = str(error)
        self._retry_at_s = self._clock.monotonic_s() + _RETRY_OPENING_S
