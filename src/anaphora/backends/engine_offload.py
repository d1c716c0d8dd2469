"""Between the scheduler and the slower tiers of KV blocks: who waits for what is brought back, and what is written behind.

Everything here runs on the engine's thread, which owns `KVCache`; `kv.offload` does the work on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from anaphora.backends.engine_sequences import Generation, Job
from anaphora.events import Forgotten
from anaphora.kv.cache import KVCache
from anaphora.kv.offload import Fetch, NewBlock, Offload, Saving
from anaphora.types import BlockHash, Scope

_LEAST_TOKENS = 64
"""A step over fewer tokens says little about what computing a token costs."""

_LASTING_S = 3000.0
"""A promise of an hour, asked for some time ago, is one for long."""


class SlowerTiers:
    """What the scheduler asks of them. With no `offload` there are none: nobody waits, and nothing is kept."""

    def __init__(self, offload: Offload | None, cache: KVCache) -> None:
        self._offload = offload
        self._cache = cache

    @property
    def awaited(self) -> bool:
        """Whether anything is on its way that a sequence waits for."""
        return self._offload is not None and self._offload.num_waiting > 0

    def wait(self, timeout_s: float) -> None:
        """Until something arrived."""
        if self._offload is not None:
            self._offload.wait(timeout_s)

    def holds(self, job: Job, sequence: Generation) -> bool:
        """Whether the sequence should wait for blocks that are being brought back. The first time, starts looking for them."""
        if self._offload is None or job.pool_only or not sequence.hashes:
            return False
        fetch = sequence.fetch
        if fetch is None:
            if sequence.sought:
                return False
            sequence.sought = True
            sequence.fetch = self._seek(job, sequence)
            return sequence.fetch is not None
        if fetch.num_loaded is None:
            return True
        sequence.fetch = None
        return False

    def settle(self) -> None:
        """Take in what arrived, and let go of what was written."""
        if self._offload is None:
            return
        for job in self._offload.finished():
            if isinstance(job, Saving):
                self._cache.release(job.lease)
            elif job.lease is None:
                self._load(job)
            else:
                assert job.num_loaded is not None
                self._cache.commit(job.lease, job.num_loaded, job.cost_s)
                self._cache.release(job.lease)

    def keep(self, job: Job, sequence: Generation) -> bool:
        """Write what this sequence computed behind. True: its lease is taken over until that is done."""
        new, sequence.new_blocks = sequence.new_blocks, []
        lasting, sequence.lasting = sequence.lasting, (0, 0.0)
        if self._offload is None or job.forgotten or job.pool_only:
            return False
        assert sequence.lease is not None
        saves = bool(new) and self._offload.save(Saving(sequence.lease, job.tenant, new))
        self._offload.used(sequence.hashes[: sequence.num_committed], *lasting)
        return saves

    def pinned(self, sequence: Generation, num_blocks: int, until_s: float, now_s: float) -> None:
        """The first `num_blocks` blocks of the sequence were pinned in the pool. What is to stay for long stays in the slower
        tiers too, where nothing leaves within minutes."""
        if self._offload is not None and until_s - now_s >= _LASTING_S:
            sequence.lasting = max(sequence.lasting, (num_blocks, until_s))

    def committed(self, sequence: Generation, first: int, block_ids: Sequence[int], cost_s: float, block_size: int) -> None:
        """The blocks from number `first` of the sequence on were computed and committed."""
        if self._offload is None:
            return
        for number, block_id in enumerate(block_ids, first):
            parent = sequence.hashes[number - 1] if number else sequence.namespace
            tokens = tuple(sequence.tokens[number * block_size : (number + 1) * block_size])
            new = NewBlock(block_id, parent, sequence.hashes[number], tokens, cost_s, number * block_size)
            sequence.new_blocks.append(new)

    def computed(self, start: int, end: int, seconds: float) -> None:
        """A step did nothing but compute the tokens `start .. end - 1` of one prompt."""
        if self._offload is not None and end - start >= _LEAST_TOKENS:
            self._offload.estimates.computed(start, end, seconds)

    def forget(self, scope: Scope) -> Future[Forgotten] | None:
        return None if self._offload is None else self._offload.forget(scope)

    def _seek(self, job: Job, sequence: Generation) -> Fetch | None:
        assert self._offload is not None
        size = self._cache.block_size
        num_cached = self._cache.num_cached(sequence.hashes, len(sequence.tokens), tenant=job.tenant)
        missing = sequence.hashes[num_cached : (len(sequence.tokens) - 1) // size]
        if not missing:
            return None
        parent = sequence.hashes[num_cached - 1] if num_cached else sequence.namespace
        start = num_cached * size
        tokens = sequence.tokens[start : start + len(missing) * size]
        fetch = Fetch(job.tenant, sequence.hashes[:num_cached], parent, missing, tokens, start)
        self._offload.seek(fetch)
        return fetch

    def _load(self, fetch: Fetch) -> None:
        """It was found what is worth loading: make room for it in the pool."""
        assert self._offload is not None
        found: Sequence[BlockHash] = fetch.hashes[: fetch.num_found]
        if not found:
            fetch.num_loaded = 0
            return
        chain = [*fetch.before, *found]
        lease = self._cache.match(chain, len(chain) * self._cache.block_size + 1, tenant=fetch.tenant)
        if lease.num_matched_blocks < len(fetch.before):  # what it stands on was evicted meanwhile
            self._cache.release(lease)
            fetch.num_loaded = 0
            return
        room = self._cache.allocate(lease, chain[lease.num_matched_blocks :])
        if not room.block_ids:
            self._cache.release(lease)
            fetch.num_loaded = 0
            return
        first = lease.num_matched_blocks + room.num_adopted - len(fetch.before)
        self._offload.load(fetch, lease, first, room.block_ids)
