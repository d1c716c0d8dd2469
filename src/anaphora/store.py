"""Bytes under keys, over an ordered list of tiers: the fastest first.

Reading asks tier after tier and copies what it finds into the faster ones. Writing fills the first tier at once and the
others behind the answer. A tier that fails or hangs makes this a smaller store, never a failed request (invariant 8).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from anaphora.clock import Clock
from anaphora.errors import TierFailed
from anaphora.events import Dropped, Emit, Failed, Forgotten, ignore
from anaphora.patience import Patience
from anaphora.tiers.base import EVERYTHING, Entry, ImmediateTier, KnowingTier, Tier, TierStats
from anaphora.types import Key, Scope, Tenant

log = logging.getLogger(__name__)

T = TypeVar("T")

Mark = tuple[int, ...]
"""What had been erased at a moment, as numbers to compare: equal marks, and nothing was erased in between."""

_BATCH_ENTRIES = 64
_WRITE_EVERY_S = 0.2
"""Of small entries that come thick and fast, those of so long are written at once: a write costs more than what is in it."""
_SMALL_BYTES = 4 << 20
"""More than that waits for nothing."""
_LOG_EVERY_S = 60.0


class StoreOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ttl_s: float | None = None
    """Seconds an entry lives unless its put says otherwise. None: until it is evicted."""
    max_pending_bytes: int = 32 << 20
    """Of entries that wait to be written to one slower tier. What does not fit is not written there."""
    lookup_timeout_s: float = 1.0
    """How long a request waits for one tier's answer before it goes on without."""
    rest_s: float = 5.0
    """For how long a tier that did not answer in time is not asked again."""


class Store:
    """For one event loop.

    What keeps it right (invariant 4): the first tier and the queues of pending writes change only between awaits, so each
    change is one step for everybody else. Whoever awaited a slower tier compares `mark` before and after: if anything was
    erased meanwhile, by this process or another, what was read may be just that, and is not used. Likewise whoever computed
    something gives `put` the mark from when the question was asked.

    An entry that is lost on its way to a slower tier may leave an older one under the same key there, which then is found
    again: an earlier answer to the same question, and no less valid.
    """

    def __init__(
        self, tiers: Sequence[Tier], *, clock: Clock, options: StoreOptions | None = None, emit: Emit = ignore
    ) -> None:
        self._tiers = tuple(tiers)
        self._clock = clock
        self._options = options or StoreOptions()
        self._emit = emit
        fastest = self._tiers[0]
        self._first: ImmediateTier | None = fastest if isinstance(fastest, ImmediateTier) else None
        behind = self._tiers if self._first is None else self._tiers[1:]
        self._slower = tuple(_Behind(tier, self._options.max_pending_bytes, self._failed, emit) for tier in behind)
        self._epochs = [tier.epoch for tier in behind]
        self._seen = self._epoch()
        self._num_erasures = 0
        self._rest_until_s: dict[str, float] = {}
        self._logged_at_s: dict[tuple[str, str], float] = {}

    def get_now(self, key: Key) -> Entry | None:
        """The entry, if it is in memory: no thread, no await. None says nothing about the slower tiers."""
        self._heed_erasures()
        if self._first is not None and (entry := self._first.get_now(key)) is not None:
            for behind in self._slower:
                behind.tier.touch((key,))  # or the hottest entries would look unused there
            return entry
        return self._unwritten(key)

    async def get(self, key: Key) -> Entry | None:
        return self.get_now(key) or (await self.get_many((key,))).get(key)

    async def get_many(self, keys: Collection[Key]) -> dict[Key, Entry]:
        """Those of `keys` that some tier has."""
        found = self._many_now(keys)
        missing = [key for key in keys if key not in found]
        for position, behind in enumerate(self._slower):
            if not missing:
                break
            if behind.lacks(missing):
                continue  # no task switch, no timer: so it is with nearly every question that is new
            for key, entry in (await self._ask(behind, missing)).items():
                found[key] = self._promoted(key, entry, position)
            missing = [key for key in missing if key not in found]
        return found

    def _many_now(self, keys: Collection[Key]) -> dict[Key, Entry]:
        """`get_now` of each of `keys`, in one step."""
        self._heed_erasures()
        found: dict[Key, Entry] = {}
        if (first := self._first) is not None:
            found = {key: entry for key in keys if (entry := first.get_now(key)) is not None}
            for behind in self._slower:
                behind.tier.touch(found)
        if len(found) < len(keys):
            found |= {key: entry for key in keys if key not in found and (entry := self._unwritten(key)) is not None}
        return found

    def _unwritten(self, key: Key) -> Entry | None:
        """The entry, if it is waiting to be written to a slower tier."""
        for behind in self._slower:
            pending = behind.pending.get(key)
            if pending is not None and not behind.doubts(key) and not pending.entry.expired(self._clock.now_s()):
                return pending.entry
        return None

    async def locate(self, keys: Collection[Key]) -> dict[Key, tuple[str, int]]:
        """Where each of `keys` lies: the name of the fastest tier that has it, and its size there. Nothing is read or used."""
        found: dict[Key, tuple[str, int]] = {}
        for tier in self._tiers:
            missing = [key for key in keys if key not in found]
            if not missing:
                break
            sizes = await self._asked(tier, "sizes", tier.sizes(missing))
            found.update((key, (tier.name, size)) for key, size in sizes.items())
        for behind in self._slower:
            for key in keys:
                if key not in found and not behind.doubts(key) and (pending := behind.pending.get(key)) is not None:
                    found[key] = behind.tier.name, pending.entry.size
        return found

    def put(
        self,
        key: Key,
        value: bytes,
        *,
        cost_s: float = 0.0,
        tenant: Tenant,
        model: str = "",
        tags: tuple[str, ...] = (),
        ttl_s: float | None = None,
        since: Mark | None = None,
    ) -> bool:
        """Keep `value`, at once in memory and soon (see `flush`) in the slower tiers. False: no tier is large enough, or
        something was erased since the mark `since`.

        `cost_s` is what computing it took. It expires `ttl_s` (default: the store's) seconds from now in all tiers. Must be
        called on the event loop.
        """
        mark = self.mark()
        if since is not None and since != mark:
            return False
        now_s = self._clock.now_s()
        ttl_s = self._options.ttl_s if ttl_s is None else ttl_s
        entry = Entry(value, now_s, None if ttl_s is None else now_s + ttl_s, cost_s, tenant, model, tags)
        fits = self._first is not None and self._first.put_now(key, entry)
        for behind, epoch in zip(self._slower, mark[1:], strict=True):
            fits |= entry.size <= behind.tier.capacity_bytes
            behind.put(key, entry, epoch)
        return fits

    def touch(self, keys: Iterable[Key]) -> None:
        """`keys` were used, in this order. Immediate; unknown keys are fine."""
        used = list(keys)
        for tier in self._tiers:
            tier.touch(used)

    async def keep(self, keys: Collection[Key], until_s: float) -> dict[str, int]:
        """Do not evict these before `until_s` (seconds since the epoch): tier name → how many of them it keeps. `flush` first:
        what is not written yet is not there."""
        kept: dict[str, int] = {}
        for tier in self._tiers:
            try:
                kept[tier.name] = await tier.keep(keys, until_s)
            except TierFailed as error:
                self._failed(tier, "keep", error)
        return kept

    async def delete(self, keys: Collection[Key]) -> None:
        """Remove `keys` from every tier that can be reached: their values are of no use. For what must go, see `forget`."""
        self._num_erasures += 1
        for behind in self._slower:
            behind.drop(keys)
            try:
                async with behind.writing:
                    await behind.tier.delete_many(keys)
            except TierFailed as error:
                self._failed(behind.tier, "delete", error)
        if self._first is not None:
            self._first.delete_now(keys)

    def mark(self) -> Mark:
        """What has been erased up to now, by this process or by one that shares a slower tier. Immediate."""
        self._heed_erasures()
        return self._num_erasures, *self._seen

    def drop(self, scope: Scope) -> None:
        """Another process is forgetting `scope` in the tiers that it shares with this one: drop what only this one has of it.

        Immediate. What is being computed now counts as forgotten (see `put`).
        """
        self._num_erasures += 1
        if self._first is not None:
            self._first.forget_now(scope)
        for behind in self._slower:
            behind.forget(scope)

    async def forget(self, scope: Scope) -> Forgotten:
        """Erase everything within `scope` from every tier (invariant 7), then sweep the tiers to see that it is gone."""
        removed: dict[str, int] = {}
        remaining: dict[str, int] = {}
        failed: list[str] = []
        self._num_erasures += 1
        from_first = 0 if self._first is None else self._first.forget_now(scope)
        # Slowest first: nothing can then be promoted from a tier that still has it into one that was already cleared.
        for behind in reversed(self._slower):
            behind.forget(scope)
            try:
                async with behind.writing:
                    await behind.write_waiting()  # or the tier would take it for something from before the forget
                    removed[behind.tier.name] = await behind.tier.forget(scope)
            except TierFailed as error:
                self._failed(behind.tier, "forget", error)
                failed.append(behind.tier.name)
        self._num_erasures += 1
        if self._first is not None:
            removed[self._tiers[0].name] = from_first + self._first.forget_now(scope)  # what was promoted while we waited
        self._heed_erasures()
        for tier in self._tiers:
            if tier.name not in failed:
                try:
                    remaining[tier.name] = len(await tier.keys(scope))
                except TierFailed as error:
                    self._failed(tier, "keys", error)
                    failed.append(tier.name)
        receipt = Forgotten(scope, removed, remaining, tuple(failed))
        self._emit(receipt)
        return receipt

    async def stats(self) -> dict[str, TierStats]:
        """Tier name → its figures; a tier that fails is left out."""
        found: dict[str, TierStats] = {}
        for tier in self._tiers:
            try:
                found[tier.name] = await tier.stats()
            except TierFailed as error:
                self._failed(tier, "stats", error)
        return found

    async def flush(self) -> None:
        """Return when everything that was put before is in the slower tiers, or has failed to get there."""
        for behind in self._slower:
            await behind.flush()

    async def aclose(self) -> None:
        await self.flush()
        for tier in self._tiers:
            await tier.aclose()

    # -- reading a slower tier -----------------------------------------------------------------------------------------

    async def _ask(self, behind: _Behind, keys: list[Key]) -> dict[Key, Entry]:
        """What a tier has of `keys`; nothing where what it read may have been erased meanwhile."""
        before = self.mark()
        found = await self._asked(behind.tier, "get", behind.get_many(keys))
        return found if self.mark() == before else {}

    async def _asked(self, tier: Tier, operation: str, answer: Coroutine[Any, Any, dict[Key, T]]) -> dict[Key, T]:
        """What `tier` answers; nothing where it fails, rests, or takes too long."""
        if self._rest_until_s and self._clock.monotonic_s() < self._rest_until_s.get(tier.name, 0.0):
            answer.close()
            return {}
        try:
            async with Patience(self._options.lookup_timeout_s):
                return await answer
        except TierFailed as error:
            self._failed(tier, operation, error)
        except TimeoutError:
            self._failed(tier, operation, TierFailed("no answer in time"))
            self._rest_until_s[tier.name] = self._clock.monotonic_s() + self._options.rest_s
        return {}

    def _promoted(self, key: Key, entry: Entry, position: int) -> Entry:
        """The entry to use, now also in the tiers above `position`. One that was put while we waited is newer and stays."""
        newer = self.get_now(key)
        if newer is not None:
            return newer
        if self._first is not None:
            self._first.put_now(key, entry)
        for faster in self._slower[:position]:
            faster.put(key, entry, faster.tier.epoch())
        return entry

    # -- erasures ------------------------------------------------------------------------------------------------------

    def _epoch(self) -> tuple[int, ...]:
        return tuple([epoch() for epoch in self._epochs])

    def _heed_erasures(self) -> None:
        """Another process that shares a slower tier may have forgotten what this one still has a copy of: use no copy.

        None, because which ones is known only there; it is rare, and they come back from the slower tier. So does what is not
        written yet: of that the tier takes what was not erased.
        """
        epoch = self._epoch()
        if epoch == self._seen:
            return
        self._seen = epoch
        if self._first is not None:
            self._first.forget_now(EVERYTHING)
        for behind in self._slower:
            behind.doubt()

    # -- failures ------------------------------------------------------------------------------------------------------

    def _failed(self, tier: Tier, operation: str, error: TierFailed) -> None:
        """Count it, and say so in the log, once a minute for each kind."""
        self._emit(Failed(tier.name, operation, str(error)))
        now_s = self._clock.monotonic_s()
        last_s = self._logged_at_s.get((tier.name, operation))
        if last_s is None or now_s - last_s >= _LOG_EVERY_S:
            self._logged_at_s[tier.name, operation] = now_s
            log.warning("cache tier %s failed to %s, going on without: %s", tier.name, operation, error)


class _Pending(msgspec.Struct, frozen=True):
    entry: Entry
    epoch: int
    """Of the tier, from before the put: what was forgotten since is not written."""


class _Behind:
    """A slower tier and what waits to be written to it. An entry stays in `pending`, readable, until it is written."""

    def __init__(self, tier: Tier, max_bytes: int, failed: Callable[[Tier, str, TierFailed], None], emit: Emit) -> None:
        self.tier = tier
        self._knowing = tier if isinstance(tier, KnowingTier) else None
        self.pending: dict[Key, _Pending] = {}
        self.writing = asyncio.Lock()
        """Held over each write and each erasure of the tier, so that no write that began before an erasure ends after it."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._doubted: set[Key] = set()
        """Of `pending`: what may have been erased. The tier knows, and will not have it then."""
        self._failed = failed
        self._emit = emit
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._rests_until_s = 0.0
        """By the event loop's clock."""

    def put(self, key: Key, entry: Entry, epoch: int) -> None:
        self.drop((key,))
        if self._bytes + entry.size > self._max_bytes:
            self._emit(Dropped(self.tier.name, 1))
            return
        self.pending[key] = _Pending(entry, epoch)
        self._bytes += entry.size
        if len(self.pending) >= _BATCH_ENTRIES or self._bytes > _SMALL_BYTES:
            self._hurry.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._write_all())

    def drop(self, keys: Iterable[Key]) -> None:
        for key in keys:
            pending = self.pending.pop(key, None)
            if pending is not None:
                self._bytes -= pending.entry.size
                self._doubted.discard(key)

    def forget(self, scope: Scope) -> None:
        self.drop([key for key, pending in self.pending.items() if pending.entry.within(scope)])

    def doubt(self) -> None:
        """Something was erased, and nobody said what."""
        self._doubted.update(self.pending)

    def doubts(self, key: Key) -> bool:
        return key in self._doubted

    def lacks(self, keys: Collection[Key]) -> bool:
        """Whether the tier certainly has none of them, nor will when what waits for it is written."""
        return self._knowing is not None and self._doubted.isdisjoint(keys) and self._knowing.lacks(keys)

    async def get_many(self, keys: Collection[Key]) -> dict[Key, Entry]:
        """What the tier has, once it has what waits for it and may have been erased."""
        if self._doubted and not self._doubted.isdisjoint(keys):
            await self.flush()
        return await self.tier.get_many(keys)

    async def flush(self) -> None:
        while self._task is not None and not self._task.done():
            self._hurry.set()
            # Shielded: giving up on waiting must not give up on writing.
            await asyncio.shield(self._task)

    async def _write_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self.pending:
            if loop.time() < self._rests_until_s:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._rests_until_s):
                        await self._hurry.wait()
            async with self.writing:
                batch = self._next_batch()
                if batch:
                    await self._write(batch)
            self._rests_until_s = loop.time() + _WRITE_EVERY_S
        self._hurry.clear()

    async def write_waiting(self) -> None:
        """What waits now, and not what comes meanwhile. Under `writing`."""
        num = len(self.pending)
        while num > 0 and (batch := self._next_batch()):
            await self._write(batch)
            num -= len(batch)

    def _next_batch(self) -> dict[Key, _Pending]:
        """The oldest entries, as many as share an epoch. Taken under `writing`: earlier ones may have been forgotten."""
        batch: dict[Key, _Pending] = {}
        epoch = 0
        for key, pending in self.pending.items():
            if len(batch) >= _BATCH_ENTRIES or (batch and pending.epoch != epoch):
                break
            epoch = pending.epoch
            batch[key] = pending
        return batch

    async def _write(self, batch: dict[Key, _Pending]) -> None:
        epoch = next(iter(batch.values())).epoch
        stored: frozenset[Key] = frozenset()
        try:
            stored = await self.tier.put_many({key: pending.entry for key, pending in batch.items()}, epoch=epoch)
        except TierFailed as error:
            self._failed(self.tier, "put", error)
        finally:
            self.drop([key for key, pending in batch.items() if self.pending.get(key) is pending])
        if len(stored) < len(batch):
            self._emit(Dropped(self.tier.name, len(batch) - len(stored)))
