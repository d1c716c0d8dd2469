"""The store against a plain dict: any sequence of its verbs, over memory and a folder.

The machine is only worth what it catches, so it is run on broken stores too: `MUTANTS`. Each must die.

| mutant | what it breaks |
|---|---|
| memory_forgets_to_subtract | used bytes are the sum of the sizes |
| memory_makes_no_room | used bytes never pass the capacity |
| memory_leaves_keys_in_the_policy | index and policy change together |
| memory_keeps_the_older_value | a put replaces |
| nothing_expires | an expired entry is absent |
| promotion_renews | the TTL counts from the put |
| erasures_elsewhere_are_not_heeded | what another process forgot is not served from memory |
| closing_does_not_flush | what was put is there after a restart |
| forgetting_ignores_tags | forget takes what matches and nothing else |
| disk_makes_no_room | used bytes never pass the capacity |
| disk_leaves_files | no byte lies in the medium that the index does not know |
| disk_expires_the_wrong_half | an entry that lives is there |
| disk_ignores_the_key | an entry is found under its own key only |
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from anaphora.clock import ManualClock
from anaphora.policies.lru import LRU
from anaphora.store import Store, StoreOptions
from anaphora.testing.tiers import make_key
from anaphora.tiers.base import Entry
from anaphora.tiers.disk import DiskOptions, DiskTier, index
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import Key, Scope, Tenant

T = TypeVar("T")

NAMES = st.sampled_from("abcde")
TENANTS = st.sampled_from([Tenant("a"), Tenant("b")])
# Who a name belongs to does not change: a key covers the tenant.
OWNERS: dict[str, tuple[Tenant, tuple[str, ...]]] = {
    "a": (Tenant("a"), ()),
    "b": (Tenant("a"), ("x",)),
    "c": (Tenant("a"), ("x", "y")),
    "d": (Tenant("b"), ()),
    "e": (Tenant("b"), ("x",)),
    "z": (Tenant("b"), ("x", "y")),
}
SCOPES = st.builds(
    Scope, tenant=st.none() | TENANTS, tag=st.none() | st.sampled_from(["x", "y"]), model=st.none() | st.just("m")
)
SMALL, ROOMY = 5_000, 1_000_000


class StoreMachine(RuleBasedStateMachine):
    @initialize(roomy=st.booleans())
    def start(self, roomy: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="anaphora-store-"))
        self.clock = ManualClock()
        self.roomy = roomy
        self.ram_capacity = 3_000
        self.disk_capacity = ROOMY if roomy else SMALL
        self.model: dict[Key, Entry] = {}
        self.open()

    def open(self) -> None:
        self.policy: LRU[Key] = LRU()
        self.ram = RamTier(RamOptions(self.ram_capacity), policy=self.policy, clock=self.clock)
        self.disk = self.new_disk()
        # A machine that stands still for a second must not look like a tier that hangs.
        options = StoreOptions(lookup_timeout_s=60)
        self.store = Store([self.ram, self.disk], clock=self.clock, options=options)

    def new_disk(self) -> DiskTier:
        return DiskTier(DiskOptions(str(self.folder), self.disk_capacity, inline_bytes=600), clock=self.clock)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def expected(self, key: Key) -> Entry | None:
        entry = self.model.get(key)
        return None if entry is None or entry.expired(self.clock.now_s()) else entry

    def check(self, key: Key, found: Entry | None) -> None:
        expected = self.expected(key)
        if found is None and not self.roomy:
            return  # evicted
        assert found == expected

    # -- verbs -----------------------------------------------------------------------------------------------------

    @rule(
        names=st.lists(NAMES, min_size=1, max_size=4),
        size=st.sampled_from([0, 100, 599, 600, 1100, 4000]),
        fill=st.integers(0, 255),
        ttl_s=st.sampled_from([None, 5.0, 50.0]),
        steps=st.integers(0, 3),
    )
    def put(
        self,
        names: list[str],
        size: int,
        fill: int,
        ttl_s: float | None,
        steps: int,
    ) -> None:
        """`steps` of the event loop: how far the write to the folder has come when the next verb begins."""
        value = bytes([fill]) * size
        now_s = self.clock.now_s()

        async def put() -> None:
            for name in names:
                tenant, tags = OWNERS[name]
                assert self.store.put(make_key(name), value, tenant=tenant, model="m", tags=tags, ttl_s=ttl_s)
            for _ in range(steps):
                await asyncio.sleep(0)

        self.run(put())
        expires_at_s = None if ttl_s is None else now_s + ttl_s
        for name in names:
            self.model[make_key(name)] = Entry(value, now_s, expires_at_s, 0.0, OWNERS[name][0], "m", OWNERS[name][1])

    @rule(name=NAMES)
    def get(self, name: str) -> None:
        self.check(make_key(name), self.run(self.store.get(make_key(name))))

    @rule()
    def get_all(self) -> None:
        keys = [make_key(name) for name in OWNERS]
        found = self.run(self.store.get_many(keys))
        for key in keys:
            self.check(key, found.get(key))

    @rule(scope=SCOPES)
    def forget(self, scope: Scope) -> None:
        receipt = self.run(self.store.forget(scope))
        self.model = {key: entry for key, entry in self.model.items() if not entry.within(scope)}
        assert receipt.complete
        for key in [make_key(name) for name in OWNERS]:
            assert key in self.model or self.store.get_now(key) is None

    @rule(scope=SCOPES)
    def forget_in_another_process(self, scope: Scope) -> None:
        async def elsewhere() -> None:
            await self.store.flush()
            neighbour = self.new_disk()
            await neighbour.forget(scope)
            await neighbour.aclose()

        self.run(elsewhere())
        self.model = {key: entry for key, entry in self.model.items() if not entry.within(scope)}

    @rule(seconds=st.sampled_from([1.0, 4.0, 20.0]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @precondition(lambda self: bool(self.model))
    @rule(name=NAMES)
    def reopen_amid_writes(self, name: str) -> None:
        async def write_and_close() -> None:
            for letter in (name, "z"):
                tenant, tags = OWNERS[letter]
                self.store.put(make_key(letter), b"last words", tenant=tenant, model="m", tags=tags)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            await self.store.aclose()

        for letter in (name, "z"):
            tenant, tags = OWNERS[letter]
            self.model[make_key(letter)] = Entry(b"last words", self.clock.now_s(), None, 0.0, tenant, "m", tags)
        self.run(write_and_close())
        self.check_folder()
        self.open()

    # -- invariants ------------------------------------------------------------------------------------------------

    @invariant()
    def capacities_are_kept(self) -> None:
        if not hasattr(self, "ram"):
            return
        stats = self.run(self.ram.stats())
        entries = self.ram._entries
        assert stats.used_bytes == sum(entry.size for entry in entries.values()) <= self.ram_capacity
        assert set(self.policy.victims()) == set(entries)
        assert self.run(self.disk.stats()).used_bytes <= self.disk_capacity

    def check_folder(self) -> None:
        db = sqlite3.connect(self.folder / "index.db")
        used, total = db.execute("SELECT used, (SELECT COALESCE(SUM(size), 0) FROM entries) FROM meta").fetchone()
        rows = db.execute("SELECT key, file FROM entries").fetchall()
        db.close()
        assert used == total <= self.disk_capacity
        assert set(os.listdir(self.folder / "values")) == {file for _, file in rows if file is not None}
        assert {key for key, _ in rows} <= set(self.model)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self.run(self.store.flush())
            self.get_all()
            self.run(self.store.aclose())
            if (self.folder / "index.db").exists():
                self.check_folder()
        finally:
            self.run(self.disk.aclose())
            self.loop.close()
            shutil.rmtree(self.folder)


SETTINGS = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_the_store_is_a_dict_that_may_lose_what_it_has_no_room_for() -> None:
    run_state_machine_as_test(StoreMachine, settings=SETTINGS)


# -- mutants -----------------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def memory_forgets_to_subtract(patch: Patch) -> None:
    def remove(self: RamTier, key: Key) -> None:
        del self._entries[key]
        self._policy.remove(key)

    patch.setattr(RamTier, "_remove", remove)


def memory_makes_no_room(patch: Patch) -> None:
    patch.setattr(RamTier, "_make_room", lambda self, size: None)


def memory_leaves_keys_in_the_policy(patch: Patch) -> None:
    def remove(self: RamTier, key: Key) -> None:
        self._used -= self._entries.pop(key).size

    patch.setattr(RamTier, "_remove", remove)


def memory_keeps_the_older_value(patch: Patch) -> None:
    original = RamTier.put_now
    patch.setattr(RamTier, "put_now", lambda self, key, entry: key in self._entries or original(self, key, entry))


def nothing_expires(patch: Patch) -> None:
    patch.setattr(Entry, "expired", lambda self, now_s: False)


def promotion_renews(patch: Patch) -> None:
    original = Store._promoted

    def promoted(self: Store, key: Key, entry: Entry, position: int) -> Entry:
        later = None if entry.expires_at_s is None else entry.expires_at_s + 10
        original(self, key, msgspec.structs.replace(entry, expires_at_s=later), position)
        return entry

    patch.setattr(Store, "_promoted", promoted)


def erasures_elsewhere_are_not_heeded(patch: Patch) -> None:
    patch.setattr(Store, "_heed_erasures", lambda self: None)


def closing_does_not_flush(patch: Patch) -> None:
    async def aclose(self: Store) -> None:
        for tier in self._tiers:
            await tier.aclose()

    patch.setattr(Store, "aclose", aclose)


def forgetting_ignores_tags(patch: Patch) -> None:
    original = index._where
    patch.setattr(index, "_where", lambda scope: original(msgspec.structs.replace(scope, tag=None)))


def disk_makes_no_room(patch: Patch) -> None:
    patch.setattr(index.DiskIndex, "_make_room", lambda self, db, size: [])


def disk_leaves_files(patch: Patch) -> None:
    patch.setattr(index.DiskIndex, "_unlink", lambda self, name: None)


def disk_expires_the_wrong_half(patch: Patch) -> None:
    original = index.DiskIndex._delete

    def delete(self: index.DiskIndex, db: sqlite3.Connection, where: str, values: Any) -> list[tuple[Key, int]]:
        return original(self, db, where.replace("expires_at <=", "expires_at >"), values)

    patch.setattr(index.DiskIndex, "_delete", delete)


def disk_ignores_the_key(patch: Patch) -> None:
    original = index.DiskIndex._get

    def get(self: index.DiskIndex, db: sqlite3.Connection, keys: list[Key]) -> index.Found:
        everything = original(self, db, [make_key(name) for name in OWNERS]).entries.values()
        return index.Found(dict.fromkeys(keys, next(iter(everything))) if everything else {})

    patch.setattr(index.DiskIndex, "_get", get)


MUTANTS: list[Callable[[Patch], None]] = [
    memory_forgets_to_subtract,
    memory_makes_no_room,
    memory_leaves_keys_in_the_policy,
    memory_keeps_the_older_value,
    nothing_expires,
    promotion_renews,
    erasures_elsewhere_are_not_heeded,
    closing_does_not_flush,
    forgetting_ignores_tags,
    disk_makes_no_room,
    disk_leaves_files,
    disk_expires_the_wrong_half,
    disk_ignores_the_key,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_machine_kills(mutant: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    hasty = settings(SETTINGS, phases=[Phase.generate], max_examples=200, report_multiple_bugs=False)
    with pytest.raises((AssertionError, KeyError, Flaky)):  # a thread may be faster the second time
        run_state_machine_as_test(StoreMachine, settings=hasty)
