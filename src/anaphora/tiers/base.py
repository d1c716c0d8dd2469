"""The contract every storage tier keeps (`anaphora.testing.tiers` checks it)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, Protocol, runtime_checkable

import msgspec

from anaphora.types import Key, Scope, Tenant

EVERYTHING = Scope()
"""The scope that covers all."""

ENTRY_OVERHEAD = 256
"""Bytes that an entry is counted with beside its value: key, metadata, and its places in the index and the policy."""


class Entry(msgspec.Struct, frozen=True):
    """Bytes under a key, and what has to be known about them. Times are seconds since the Unix epoch."""

    value: bytes
    stored_at_s: float
    expires_at_s: float | None = None
    """Absolute: counted from when it was first stored, whatever tiers it has moved through since. None: never."""
    cost_s: float = 0.0
    """Seconds that computing it took: what a hit saves, and what losing it costs."""
    tenant: Tenant = Tenant("local")
    model: str = ""
    tags: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """What it counts against a tier's capacity, in bytes."""
        return len(self.value) + ENTRY_OVERHEAD

    def expired(self, now_s: float) -> bool:
        return self.expires_at_s is not None and self.expires_at_s <= now_s

    def within(self, scope: Scope) -> bool:
        """Whether `scope` covers it: every field that is set matches."""
        return (
            (scope.tenant is None or scope.tenant == self.tenant)
            and (scope.model is None or scope.model == self.model)
            and (scope.tag is None or scope.tag in self.tags)
        )


class Eviction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What leaves a tier first, and what does not. Shares are of its capacity, from 0 to 1."""

    order: Literal["lru", "gdsf"] = "lru"
    """As the policies of these names say (`policies`), the seconds and the size of an entry being `cost_s` and `size`. A tier
    that is handed a `Policy` has that one's order instead."""
    tenant_share: float = 1.0
    """One tenant's entries fill at most so much: beyond it they make room for each other."""
    keep_share: float = 0.25
    """One tenant's kept entries (`Tier.keep`) fill at most so much, and those of all tenants three quarters."""


ALL_KEPT_SHARE = 0.75


def eviction(policy: str, *, tenant_share: float = 1.0, keep_share: float = 0.25) -> Eviction:
    """As the policy of this name orders it, which is least recently used first where it is one of another package: processes
    that share a medium need an order that all of them know."""
    return Eviction("gdsf" if policy == "gdsf" else "lru", tenant_share, keep_share)


class Erasure(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was erased: everything within `scope`, or else `keys`."""

    scope: Scope | None = None
    keys: tuple[Key, ...] = ()

    def covers(self, key: Key, entry: Entry) -> bool:
        return key in self.keys if self.scope is None else entry.within(self.scope)


def left_of(entries: Mapping[Key, Entry], erasures: Collection[Erasure]) -> dict[Key, Entry]:
    """Those that none of `erasures` covers."""
    return {key: entry for key, entry in entries.items() if not any(erasure.covers(key, entry) for erasure in erasures)}


class TierStats(msgspec.Struct, frozen=True):
    num_entries: int
    used_bytes: int
    capacity_bytes: int
    kept_bytes: int = 0
    """Of entries that may not be evicted now."""
    num_evicted: int = 0
    """By this process since it started. So is the count below."""
    num_damaged: int = 0


class Examined(msgspec.Struct, frozen=True):
    """What lies under a key, as somebody sees it who only looks."""

    entry: Entry | None
    """None: it is damaged."""
    size: int
    """As it counts against the capacity, of the whole value."""


class Tier(Protocol):
    """A medium with a capacity.

    Used bytes are the sum of the sizes of the entries and never pass the capacity, not even for a moment; what an index
    does not know does not lie in the medium (invariant 4). An expired entry is absent. A medium that fails raises
    `TierFailed`, nothing else, and leaves the tier usable.
    """

    @property
    def name(self) -> str: ...

    @property
    def capacity_bytes(self) -> int: ...

    async def get_many(self, keys: Collection[Key]) -> dict[Key, Entry]:
        """The entries that are there, intact and not expired. Reading is a use, in the eyes of eviction."""
        ...

    async def sizes(self, keys: Collection[Key]) -> dict[Key, int]:
        """Which of `keys` are there and not expired, and what each counts (`Entry.size`). Nothing is read, or used."""
        ...

    async def put_many(self, entries: Mapping[Key, Entry], *, epoch: int | None = None) -> frozenset[Key]:
        """Store what fits; returns the keys that were stored. Each replaces what was under its key, fit or not, and whatever
        `keep` said about that.

        Room is made by evicting, in the order of `Eviction`, entries that are not kept: first entries of the same tenant
        while that has more than its share, then any. What would not fit even so is not stored, and nothing is evicted for it.

        With `epoch`: store nothing that was erased since `epoch()` was that, by its scope or by its key; and nothing at all if
        what was erased since then is not known any more.
        """
        ...

    async def delete_many(self, keys: Collection[Key]) -> int:
        """Remove what is there of `keys`; returns how many. Changes the epoch."""
        ...

    async def forget(self, scope: Scope) -> int:
        """Remove every entry within `scope`, from the medium itself too; returns how many. Changes the epoch."""
        ...

    async def keys(self, scope: Scope = EVERYTHING) -> list[Key]:
        """The keys of all entries within `scope`, in no particular order."""
        ...

    def touch(self, keys: Iterable[Key]) -> None:
        """`keys` were used in a faster tier. Immediate; unknown keys are fine."""
        ...

    async def keep(self, keys: Collection[Key], until_s: float) -> int:
        """Do not evict these before `until_s` (seconds since the epoch); a time that has passed: from now on they may be.

        How many of them are there and kept until then or longer. They are taken in the order of `keys`: those for which
        the shares (`Eviction.keep_share`) leave no room are not kept. What is kept may be deleted, forgotten, replaced, and
        expires. Is no use of them.
        """
        ...

    def epoch(self) -> int:
        """A number that changes whenever an entry is deleted or forgotten, by any process that shares the medium.

        Immediate (it is asked on every hit). A faster tier that holds copies must drop them when it changes. A medium that
        one process has to itself always says 0.
        """
        ...

    async def stats(self) -> TierStats: ...

    async def aclose(self) -> None:
        """Let go of the medium. Idempotent."""
        ...


@runtime_checkable
class ImmediateTier(Protocol):
    """What a tier offers besides when it answers without waiting for anything: memory of this process."""

    def get_now(self, key: Key) -> Entry | None: ...

    def put_now(self, key: Key, entry: Entry) -> bool: ...

    def delete_now(self, keys: Iterable[Key]) -> int: ...

    def forget_now(self, scope: Scope) -> int: ...


@runtime_checkable
class KnowingTier(Protocol):
    """What a tier offers besides when it knows without a look what it has not."""

    def lacks(self, keys: Collection[Key]) -> bool:
        """Whether it is certain that none of `keys` is there. Immediate."""
        ...


@runtime_checkable
class RemoteTier(Protocol):
    """What a tier offers besides when processes of other machines share it: what they have erased, for their neighbours to
    erase from tiers that only their own machine can reach."""

    async def erasures(self, since: int) -> tuple[int, tuple[Erasure, ...]]:
        """What was erased after the number `since` (0: ever), and the number to ask with the next time.

        Everything, if that is not known any more.
        """
        ...


@runtime_checkable
class ExaminableTier(Protocol):
    """What a tier offers besides when it can be looked into without a trace."""

    async def examine(self, keys: Collection[Key], *, num_bytes: int | None = None) -> dict[Key, Examined]:
        """What lies under those of `keys` that are there. Nothing is used by it, removed or counted.

        With `num_bytes` values are cut to their first so many bytes, and not checked: damage is then found only in what
        stands beside them.
        """
        ...
