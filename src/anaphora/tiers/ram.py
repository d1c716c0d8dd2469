"""Memory of this process. Everything happens at once, without awaiting: no lock is needed on an event loop."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

from anaphora.clock import Clock
from anaphora.events import Emit, Evicted, ignore
from anaphora.policies.base import Policy
from anaphora.tiers.base import EVERYTHING, Entry, TierStats
from anaphora.types import Key, Scope


class RamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    capacity_bytes: int = 256 << 20


class RamTier:
    """Entries in a dict, eviction by `policy`. For one event loop's thread."""

    name = "ram"

    def __init__(self, options: RamOptions, *, policy: Policy[Key], clock: Clock, emit: Emit = ignore) -> None:
        self._capacity = options.capacity_bytes
        self._policy = policy
        self._clock = clock
        self._emit = emit
        self._entries: dict[Key, Entry] = {}
        self._used = 0
        self._num_evicted = 0

    @property
    def capacity_bytes(self) -> int:
        return self._capacity

    def get_now(self, key: Key) -> Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expired(self._clock.now_s()):
            self._remove(key)
            return None
        self._policy.touch(key)
        return entry

    def put_now(self, key: Key, entry: Entry) -> bool:
        """Store `entry`; False if it is larger than the whole tier."""
        if key in self._entries:
            self._remove(key)
        size = entry.size
        if size > self._capacity:
            return False
        self._make_room(size)
        self._entries[key] = entry
        self._policy.insert(key, size, entry.cost_s)
        self._used += size
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

    async def stats(self) -> TierStats:
        return TierStats(len(self._entries), self._used, self._capacity, self._num_evicted)

    async def aclose(self) -> None:
        self.forget_now(EVERYTHING)

    def _within(self, scope: Scope) -> list[Key]:
        if scope == EVERYTHING:
            return list(self._entries)
        return [key for key, entry in self._entries.items() if entry.within(scope)]

    def _remove(self, key: Key) -> None:
        self._used -= self._entries.pop(key).size
        self._policy.remove(key)

    def _make_room(self, size: int) -> None:
        """Evict until `size` more bytes fit. The caller has made sure that they can."""
        need = self._used + size - self._capacity
        if need <= 0:
            return
        victims: list[Key] = []
        freed = 0
        for key in self._policy.victims():
            victims.append(key)
            freed += self._entries[key].size
            if freed >= need:
                break
        for key in victims:
            self._remove(key)
        self._num_evicted += len(victims)
        self._emit(Evicted(self.name, len(victims), freed))
