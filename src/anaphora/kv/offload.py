"""KV blocks in slower tiers: written there behind the answers, and brought back where that beats computing them.

The engine's thread owns the pool's index (`cache`) and never waits here. A thread of its own runs an event loop with the
`Store`; between the two go jobs, each with physical blocks that a lease protects:

- `save(lease, ...)`: the lease's blocks are read, encoded and put into the store; the lease comes back with the job.
- `seek(fetch)`: which blocks of a prompt lie in which tier, and how many are worth loading (`estimates`); then
  `load(fetch, ...)`: they are read, checked and decoded straight into blocks that were allocated for them.

Finished jobs are handed back by `finished()`; it is the engine's thread that commits and releases.

What is stored (`kv.stored`) says by itself what it is: the parent's hash and the block's tokens, from which its key follows,
beside the frame of `codecs.frame` with codec, shape, type and checksum. Whatever does not fit is a counted miss (invariant 8),
and is removed. Blocks encoded with a loss have keys of their own, so an engine that wants exact ones never meets them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from anaphora.codecs import frame
from anaphora.codecs.base import Codec
from anaphora.errors import DamagedBlock
from anaphora.events import Forgotten
from anaphora.kv.cache import Lease
from anaphora.kv.estimates import Estimates
from anaphora.kv.pool import KVPool
from anaphora.kv.stored import Header, pack, storage_key, unpack
from anaphora.store import Store
from anaphora.tiers.base import TierStats
from anaphora.types import BlockHash, Key, Scope, Tenant

log = logging.getLogger(__name__)

_BATCH_BYTES = 16 << 20
"""Of KV in the pool: how much is read or written at once. While one batch is decoded the next is read."""


class Saving:
    """Blocks on their way to the slower tiers. `lease` covers them, and is the job's until it is `finished`."""

    def __init__(self, lease: Lease, tenant: Tenant, blocks: Sequence[NewBlock]) -> None:
        self.lease = lease
        self.tenant = tenant
        self.blocks = blocks


class NewBlock(msgspec.Struct, frozen=True):
    """A block that was computed here."""

    id: int
    parent: bytes
    hash: BlockHash
    tokens: tuple[int, ...]
    cost_s: float
    start: int = 0
    """How many tokens of the prompt stand before it."""


class Fetch:
    """The blocks behind what the pool has of a prompt: first sought, then loaded."""

    def __init__(
        self,
        tenant: Tenant,
        before: Sequence[BlockHash],
        parent: bytes,
        hashes: Sequence[BlockHash],
        tokens: Sequence[int],
        start: int,
    ) -> None:
        """`hashes` hold `tokens` and follow `before`, whose last is `parent` (or the namespace); `start` tokens stand before
        them."""
        self.tenant = tenant
        self.before = before
        self.parent = parent
        self.hashes = hashes
        self.tokens = tokens
        self.start = start
        self.num_found: int | None = None
        """How many of them are worth loading. None: still sought."""
        self.lease: Lease | None = None
        self.first = 0
        self.block_ids: Sequence[int] = ()
        self.num_loaded: int | None = None
        """How many of `block_ids` hold their content now. None: not yet."""
        self.cost_s = 0.0
        """What computing one of them once took, on average."""


class OffloadCounters:
    """Totals since the start."""

    def __init__(self) -> None:
        self.saved_blocks = 0
        self.saved_bytes = 0
        self.known_blocks = 0
        """Not saved because a tier had them already."""
        self.dropped_blocks = 0
        """Not saved because too many were waiting, or something was forgotten meanwhile."""
        self.damaged_blocks = 0
        self.loaded_blocks: Counter[str] = Counter()
        """By tier."""
        self.load_seconds = 0.0


class Offload:
    """See the module. `pool` is where blocks are read from and decoded into; `model` is what entries are filed under."""

    def __init__(
        self,
        store: Store,
        codec: Codec,
        pool: KVPool,
        *,
        model: str,
        max_saving_blocks: int,
        readable: Mapping[str, Codec] | None = None,
    ) -> None:
        """Blocks are written by `codec`, and read if it or one of `readable` (by name) wrote them. With more than
        `max_saving_blocks` waiting to be written, further ones are not."""
        self._store = store
        self._codec = codec
        self._codecs = {**(readable or {}), codec.name: codec}
        self._pool = pool
        self._model = model
        self._max_saving = max_saving_blocks
        self._num_saving = 0
        self._num_waiting = 0
        """Fetches that the engine waits for."""
        self._batch = max(1, _BATCH_BYTES // pool.block_bytes)
        self.estimates = Estimates(pool.block_size)
        self.counters = OffloadCounters()
        self._tier_stats: dict[str, TierStats] = {}
        self._num_forgets = 0
        self._finished: deque[Saving | Fetch] = deque()
        self._news = threading.Condition()
        self._saves: asyncio.Lock
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="kv-offload", daemon=True)
        self._thread.start()

    # -- from the engine's thread --------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    def save(self, saving: Saving) -> bool:
        """Write the blocks behind. False: too many wait already, the lease stays the caller's."""
        if self._num_saving and self._num_saving + len(saving.blocks) > self._max_saving:
            self.counters.dropped_blocks += len(saving.blocks)
            return False
        self._num_saving += len(saving.blocks)
        num_forgets = self._num_forgets
        self._start(lambda: self._save(saving, num_forgets))
        return True

    def used(self, hashes: Sequence[BlockHash], num_kept: int = 0, kept_until_s: float = 0.0) -> None:
        """A sequence stood on these blocks, wherever they were: a tier that knew only of what it is asked for would take those
        that are always found in the pool for unused. The first `num_kept` of them no tier evicts before `kept_until_s`
        (seconds since the epoch). Comes after what `save` was asked for earlier.
        """
        self._start(lambda: self._used([self._key(block_hash) for block_hash in hashes], num_kept, kept_until_s))

    def seek(self, fetch: Fetch) -> None:
        """Find out how many of its blocks are worth loading; it is `finished` when `num_found` says so."""
        self._num_waiting += 1
        self._start(lambda: self._seek(fetch))

    def load(self, fetch: Fetch, lease: Lease, first: int, block_ids: Sequence[int]) -> None:
        """Fill `block_ids`, pending under `lease`, with its blocks from number `first` on; it is `finished` when `num_loaded`
        says how far that went."""
        fetch.lease, fetch.first, fetch.block_ids = lease, first, block_ids
        self._num_waiting += 1
        self._start(lambda: self._load(fetch))

    def finished(self) -> list[Saving | Fetch]:
        """Jobs that came to their end (or, a fetch, to what it has found) since the last call."""
        jobs: list[Saving | Fetch] = []
        while self._finished:
            job = self._finished.popleft()
            if isinstance(job, Saving):
                self._num_saving -= len(job.blocks)
            else:
                self._num_waiting -= 1
            jobs.append(job)
        return jobs

    def wait(self, timeout_s: float) -> None:
        """Until a job is finished."""
        with self._news:
            self._news.wait_for(lambda: bool(self._finished), timeout_s)

    def forget(self, scope: Scope) -> Future[Forgotten]:
        """Erase `scope` from all tiers; what is being saved now is not kept."""
        self._num_forgets += 1
        return asyncio.run_coroutine_threadsafe(self._forget(scope), self._loop)

    def flush(self, timeout_s: float) -> None:
        """Wait until what is to be saved is in the tiers, at most for so long. From any thread."""
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._idle(), self._loop).result(timeout_s)

    def close(self) -> None:
        """Let go of the tiers, when everything that is under way has ended."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def stats(self) -> dict[str, int | float | str]:
        counters = self.counters
        figures: dict[str, int | float | str] = {
            "kv_offload_codec": self._codec.name,
            "kv_offload_blocks_saved": counters.saved_blocks,
            "kv_offload_bytes_saved": counters.saved_bytes,
            "kv_offload_blocks_known": counters.known_blocks,
            "kv_offload_blocks_dropped": counters.dropped_blocks,
            "kv_offload_blocks_damaged": counters.damaged_blocks,
            "kv_offload_load_seconds": round(counters.load_seconds, 4),
        }
        for name, tier in self._tier_stats.items():
            figures[f"kv_{name}_entries"] = tier.num_entries
            figures[f"kv_{name}_bytes"] = tier.used_bytes
            figures[f"kv_{name}_capacity_bytes"] = tier.capacity_bytes
            figures[f"kv_{name}_kept_bytes"] = tier.kept_bytes
            figures[f"kv_{name}_blocks_loaded"] = counters.loaded_blocks[name]
            figures[f"kv_{name}_blocks_declined"] = self.estimates.declined[name]
            if (bandwidth := self.estimates.bandwidth(name)) is not None:
                figures[f"kv_{name}_bytes_per_second"] = round(bandwidth)
            pays = self.estimates.pays(name, self._pool.block_bytes)
            figures[f"kv_{name}_pays"] = "unknown" if pays is None else "yes" if pays else "no: computing is faster"
        return figures

    def _key(self, block_hash: BlockHash) -> Key:
        return storage_key(block_hash, lossy=self._codec.lossy)

    # -- on the loop's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._saves = asyncio.Lock()
        self._start(self._look)
        self._loop.run_forever()

    def _start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        def start() -> None:
            task = self._loop.create_task(work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(start)

    def _finish(self, job: Saving | Fetch) -> None:
        with self._news:
            self._finished.append(job)
            self._news.notify_all()

    async def _idle(self) -> None:
        while others := self._tasks - {asyncio.current_task()}:
            await asyncio.wait(others)

    async def _close(self) -> None:
        await self._idle()
        await self._store.aclose()

    async def _look(self) -> None:
        self._tier_stats = await self._store.stats()

    async def _save(self, saving: Saving, num_forgets: int) -> None:
        try:
            async with self._saves:  # one after the other: memory for one batch only
                keys = [self._key(block.hash) for block in saving.blocks]
                known = await self._store.locate(keys)
                new = [block for block in saving.blocks if self._key(block.hash) not in known]
                self.counters.known_blocks += len(known)
                for first in range(0, len(new), self._batch):
                    if num_forgets != self._num_forgets:
                        self.counters.dropped_blocks += len(new) - first
                        break
                    await self._save_batch(saving.tenant, new[first : first + self._batch], num_forgets)
                await self._look()
        except Exception:  # the answer was given long ago; nothing but the copy is lost
            log.exception("KV blocks could not be saved")
        finally:
            self._finish(saving)

    async def _used(self, keys: list[Key], num_kept: int, kept_until_s: float) -> None:
        async with self._saves:
            self._store.touch(reversed(keys))  # what more prompts share leaves last
            if num_kept:
                await self._store.keep(keys[:num_kept], kept_until_s)
                await self._look()

    async def _save_batch(self, tenant: Tenant, blocks: Sequence[NewBlock], num_forgets: int) -> None:
        mark = self._store.mark()
        values = await asyncio.to_thread(self._encode, blocks)
        block_s = self.estimates.block_s()
        for block, value in zip(blocks, values, strict=True):
            if num_forgets == self._num_forgets and self._store.put(
                self._key(block.hash),
                value,
                cost_s=block.cost_s if block_s is None else block_s,
                tenant=tenant,
                model=self._model,
                since=mark,
            ):
                self.counters.saved_blocks += 1
                self.counters.saved_bytes += len(value)
            else:
                self.counters.dropped_blocks += 1
        await self._store.flush()

    def _encode(self, blocks: Sequence[NewBlock]) -> list[bytes]:
        content = self._pool.read_blocks([block.id for block in blocks])
        payloads = self._codec.encode(content)
        return [
            pack(
                Header(block.parent, block.tokens, block.start),
                frame.pack(self._codec, content[0], payload, bound_to=self._key(block.hash)),
            )
            for block, payload in zip(blocks, payloads, strict=True)
        ]

    async def _seek(self, fetch: Fetch) -> None:
        num_found = 0
        try:
            where = await self._store.locate([self._key(block_hash) for block_hash in fetch.hashes])
            there: list[tuple[str, int]] = []
            for block_hash in fetch.hashes:
                place = where.get(self._key(block_hash))
                if place is None:
                    break
                there.append(place)
            num_found = self.estimates.worth(fetch.start, there, time.monotonic()) if there else 0
        except Exception:  # whatever breaks here, the prompt is computed
            log.exception("KV blocks could not be looked for")
        finally:
            fetch.num_found = num_found
            self._finish(fetch)

    async def _load(self, fetch: Fetch) -> None:
        num_loaded, costs = 0, 0.0
        hashes = fetch.hashes[fetch.first : fetch.first + len(fetch.block_ids)]
        batches = [hashes[at : at + self._batch] for at in range(0, len(hashes), self._batch)]
        ahead: asyncio.Task[_Batch] | None = None
        try:
            for number, batch in enumerate(batches):
                read = await (ahead or self._read(batch))
                more = number + 1 < len(batches) and len(read.values) == len(batch)
                ahead = self._loop.create_task(self._read(batches[number + 1])) if more else None
                started_s = time.monotonic()
                num = await asyncio.to_thread(self._decode, fetch, num_loaded, read.values)
                num_loaded += num
                costs += sum(read.costs[:num])
                self._count(read, num, read.seconds + time.monotonic() - started_s)
                if num < len(batch):
                    break
        except Exception:  # likewise
            log.exception("KV blocks could not be loaded")
        finally:
            if ahead is not None:
                ahead.cancel()
            fetch.cost_s = costs / num_loaded if num_loaded else 0.0
            fetch.num_loaded = num_loaded
            self._finish(fetch)

    def _count(self, read: _Batch, num_loaded: int, seconds: float) -> None:
        self.counters.loaded_blocks[read.tier] += num_loaded
        self.counters.load_seconds += seconds
        if read.values:
            self.estimates.loaded(read.tier, read.num_bytes, seconds)

    async def _read(self, hashes: Sequence[BlockHash]) -> _Batch:
        """The values of the leading ones of `hashes` that are there."""
        keys = [self._key(block_hash) for block_hash in hashes]
        where = await self._store.locate(keys)
        started_s = time.monotonic()
        entries = await self._store.get_many(keys[::-1])  # the head of a chain is used last: it leaves last
        seconds = time.monotonic() - started_s
        present = list(itertools.takewhile(lambda entry: entry is not None, map(entries.get, keys)))
        tiers = Counter(where[key][0] for key in keys if key in where)
        return _Batch(
            values=[entry.value for entry in present if entry is not None],
            costs=[entry.cost_s for entry in present if entry is not None],
            tier=tiers.most_common(1)[0][0] if tiers else "",
            num_bytes=sum(len(entry.value) for entry in present if entry is not None),
            seconds=seconds,
        )

    def _decode(self, fetch: Fetch, done: int, values: Sequence[bytes]) -> int:
        """Into the fetch's blocks from number `done` on; how many of them were sound, one after the other."""
        payloads: list[tuple[str, memoryview]] = []
        for number, value in enumerate(values, fetch.first + done):
            try:
                payloads.append(self._payload(fetch, number, value))
            except DamagedBlock as error:
                self.counters.damaged_blocks += 1
                log.warning("a stored KV block is of no use and is computed again: %s", error)
                self._start(functools.partial(self._remove, fetch.hashes[number]))
                break
        at = done
        for codec, run in itertools.groupby(payloads, key=lambda item: item[0]):
            some = [payload for _, payload in run]
            content = self._pool.empty_blocks(len(some))
            self._codecs[codec].decode(some, content)
            self._pool.write_blocks(fetch.block_ids[at : at + len(some)], content)
            at += len(some)
        return len(payloads)

    def _payload(self, fetch: Fetch, number: int, value: bytes) -> tuple[str, memoryview]:
        """The codec's name, and what it made. Raises DamagedBlock unless `value` is the block that its key and its place in the
        prompt say."""
        header, framed = unpack(value)
        size = self._pool.block_size
        parent = fetch.hashes[number - 1] if number else fetch.parent
        if header.parent != parent or list(header.tokens) != list(fetch.tokens[number * size : (number + 1) * size]):
            raise DamagedBlock("it is another block than its key says")
        name = frame.codec_of(framed)
        if name not in self._codecs:
            raise DamagedBlock(f"it was encoded as {name!r}, which is not known here")
        key = self._key(fetch.hashes[number])
        return name, frame.unpack(self._codecs[name], self._pool.block_like, framed, bound_to=key)

    async def _remove(self, block_hash: BlockHash) -> None:
        await self._store.delete((self._key(block_hash),))

    async def _forget(self, scope: Scope) -> Forgotten:
        receipt = await self._store.forget(scope)
        await self._look()
        return receipt


class _Batch(msgspec.Struct, frozen=True):
    values: list[bytes]
    costs: list[float]
    tier: str
    """Where most of it came from."""
    num_bytes: int
    seconds: float
