"""Memory of this process. Everything happens at once, without awaiting: no lock is needed on an event loop."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import msgspec

from anaphora.clock import Clock
from anaphora.events import Emit, Evicted, ignore
from anaphora.policies.base import Policy
from anaphora.tiers.base import ALL_KEPT_SHARE, EVERYTHING, Entry, Eviction, TierStats
from anaphora.types import Key, Scope, Tenant


class RamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    capacity_bytes: int = 256 << 20
    eviction: Eviction = Eviction()
    """Its order is that of the policy the tier is given."""


class RamTier:
    """Entries in a dict, eviction by `policy`. For one event loop's thread."""

    name = "ram"

    def __init__(self, options: RamOptions, *, policy: Policy[Key], clock: Clock, emit: Emit = ignore) -> None:
        self._capacity = options.capacity_bytes
        self._eviction = options.eviction
        self._policy = policy
        self._clock = clock
        self._emit = emit
        self._entries: dict[Key, Entry] = {}
        self._used = 0
        self._used_by: Counter[Tenant] = Counter()
        self._kept: dict[Key, float] = {}
        """What is not to be evicted, and until when."""
        self._kept_by: Counter[Tenant] = Counter()
        """Bytes of it."""
        self._kept_ends: list[tuple[float, Key]] = []
        """A heap. An end that is not the one in `_kept` is passed over."""
        self._num_evicted = 0

    @property
    def capacity_bytes(self) -> int:
        return self._capacity

    def get_now(self, key: Key) -> Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires_at_s is not None and entry.expired(self._clock.now_s()):
            self._remove(key)
            return None
        self._policy.touch(key)
        return entry

    def put_now(self, key: Key, entry: Entry) -> bool:
        """Store `entry`; False if there is no room for it that may be made."""
        if key in self._entries:
            self._remove(key)
        if not self._make_room(entry.size, entry.tenant):
            return False
        self._entries[key] = entry
        self._policy.insert(key, entry.size, entry.cost_s)
        self._used += entry.size
        self._used_by[entry.tenant] += entry.size
        return True

    def delete_now(self, keys: Iterable[Key]) -> int:
        present = [key for key in keys if key in self._entries]
        for key in present:
            self._remove(key)
        return len(present)

    def forget_now(self, scope: Scope) -> int:
        return self.delete_now(self._within(scope))

    async def get_many(self, keys: Collection[Key]) -> dict[Key, Entry]:
        return {key: entry for key in keys if (entry := self.get_now(key)) is not None}

    async def sizes(self, keys: Collection[Key]) -> dict[Key, int]:
        now_s = self._clock.now_s()
        found = ((key, self._entries[key]) for key in keys if key in self._entries)
        return {key: entry.size for key, entry in found if not entry.expired(now_s)}

    async def put_many(self, entries: Mapping[Key, Entry], *, epoch: int | None = None) -> frozenset[Key]:
        return frozenset([key for key, entry in entries.items() if self.put_now(key, entry)])

    async def delete_many(self, keys: Collection[Key]) -> int:
        return self.delete_now(keys)

    async def forget(self, scope: Scope) -> int:
        return self.forget_now(scope)

    async def keys(self, scope: Scope = EVERYTHING) -> list[Key]:
        now_s = self._clock.now_s()
        return [key for key in self._within(scope) if not self._entries[key].expired(now_s)]

    def touch(self, keys: Iterable[Key]) -> None:
        for key in keys:
            if key in self._entries:
                self._policy.touch(key)

    def epoch(self) -> int:
        return 0

    async def keep(self, keys: Collection[Key], until_s: float) -> int:
        now_s = self._clock.now_s()
        self._let_go(now_s)
        num_kept = 0
        for key in dict.fromkeys(keys):
            entry = self._entries.get(key)
            if entry is None or entry.expired(now_s):
                continue
            if until_s <= now_s:
                self._no_longer_kept(key)
            elif key in self._kept or self._may_be_kept(entry):
                self._keep(key, entry, until_s)
                num_kept += 1
        return num_kept

    async def stats(self) -> TierStats:
        self._let_go(self._clock.now_s())
        return TierStats(len(self._entries), self._used, self._capacity, self._kept_by.total(), self._num_evicted)

    async def aclose(self) -> None:
        self.forget_now(EVERYTHING)

    def _within(self, scope: Scope) -> list[Key]:
        if scope == EVERYTHING:
            return list(self._entries)
        return [key for key, entry in self._entries.items() if entry.within(scope)]

    def _remove(self, key: Key) -> None:
        self._no_longer_kept(key)
        entry = self._entries.pop(key)
        self._used -= entry.size
        self._used_by[entry.tenant] -= entry.size
        if not self._used_by[entry.tenant]:
            del self._used_by[entry.tenant]
        self._policy.remove(key)

    # -- what is kept --------------------------------------------------------------------------------------------------

    def _may_be_kept(self, entry: Entry) -> bool:
        return (
            self._kept_by[entry.tenant] + entry.size <= self._eviction.keep_share * self._capacity
            and self._kept_by.total() + entry.size <= ALL_KEPT_SHARE * self._capacity
        )

    def _keep(self, key: Key, entry: Entry, until_s: float) -> None:
        if key not in self._kept:
            self._kept_by[entry.tenant] += entry.size
        if until_s > self._kept.get(key, 0.0):
            self._kept[key] = until_s
            heapq.heappush(self._kept_ends, (until_s if entry.expires_at_s is None else min(until_s, entry.expires_at_s), key))

    def _no_longer_kept(self, key: Key) -> None:
        if self._kept.pop(key, None) is not None:
            entry = self._entries[key]
            self._kept_by[entry.tenant] -= entry.size
            if not self._kept_by[entry.tenant]:
                del self._kept_by[entry.tenant]

    def _let_go(self, now_s: float) -> None:
        """Of what is kept no longer."""
        ends = self._kept_ends
        while ends and ends[0][0] <= now_s:
            _, key = heapq.heappop(ends)
            if self._kept.get(key, now_s) <= now_s or self._entries[key].expired(now_s):
                self._no_longer_kept(key)

    # -- room ----------------------------------------------------------------------------------------------------------

    def _make_room(self, size: int, tenant: Tenant) -> bool:
        """Evict until `size` more bytes of `tenant` fit; False, and nothing was evicted, where they cannot."""
        self._let_go(self._clock.now_s())
        share = self._eviction.tenant_share * self._capacity
        if size > self._capacity - self._kept_by.total() or size > share - self._kept_by[tenant]:
            return False
        if share < self._capacity and (excess := self._used_by[tenant] + size - share) > 0:
            self._evict(excess, tenant)
        if (excess := self._used + size - self._capacity) > 0:
            self._evict(excess)
        return True

    def _evict(self, num_bytes: float, tenant: Tenant | None = None) -> None:
        """At least so many, of `tenant` alone if one is given. The caller has made sure that they are there."""
        victims: list[Key] = []
        freed = 0
        for key in self._policy.victims():
            if key in self._kept or (tenant is not None and self._entries[key].tenant != tenant):
                continue
            victims.append(key)
            freed += self._entries[key].size
            if freed >= num_bytes:
                break
        for key in victims:
            self._remove(key)
        self._num_evicted += len(victims)
        self._emit(Evicted(self.name, len(victims), freed))
