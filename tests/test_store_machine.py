"""The store against a plain dict: any sequence of its verbs, over memory and a folder, and over memory and a server.

The machines are only worth what they catch, so they are run on broken stores too: `MUTANTS`. Each must die.

| mutant | what it breaks |
|---|---|
| memory_forgets_to_subtract | used bytes are the sum of the sizes |
| memory_makes_no_room | used bytes never pass the capacity |
| memory_leaves_keys_in_the_policy | index and policy change together |
| memory_keeps_the_older_value | a put replaces |
| memory_evicts_what_is_kept | what is kept is not evicted |
| nothing_expires | an expired entry is absent |
| promotion_renews | the TTL counts from the put |
| erasures_elsewhere_are_not_heeded | what another process forgot is not served from memory |
| closing_does_not_flush | what was put is there after a restart |
| forgetting_ignores_tags | forget takes what matches and nothing else |
| disk_makes_no_room | used bytes never pass the capacity |
| disk_leaves_no_traces | what another process put is found |
| disk_leaves_files | no byte lies in the medium that the index does not know |
| disk_expires_the_wrong_half | an entry that lives is there |
| disk_ignores_the_key | an entry is found under its own key only |
| disk_stores_what_was_erased | what another process forgot does not come back |
| disk_stores_nothing_from_before_an_erasure | forget takes what matches and nothing else |
| what_waits_is_served_whatever_was_erased | what another process forgot is not served from memory |
| disk_evicts_what_is_kept | what is kept is not evicted |
| disk_keeps_whatever_it_is_told | what is kept stays within the shares |
| valkey_makes_no_room | used bytes never pass the capacity |
| valkey_forgets_to_subtract | used bytes are the sum of the sizes |
| valkey_leaves_values | no byte lies in the medium that the index does not know |
| valkey_keeps_the_older_metadata | a put replaces |
| valkey_expires_the_wrong_half | an entry that lives is there |
| valkey_ignores_the_key | an entry is found under its own key only |
| valkey_forgetting_ignores_tags | forget takes what matches and nothing else |
| valkey_does_not_tell_of_erasures | what another process forgot is not served from memory |
| valkey_evicts_what_is_kept | what is kept is not evicted |
| valkey_keeps_forever | what is kept may be evicted once its time is over |
| valkey_keeps_what_was_replaced | a put ends what keep said |
| valkey_keeps_whatever_it_is_told | what is kept stays within the shares |
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from anaphora.clock import ManualClock
from anaphora.policies.base import Policy
from anaphora.registry import POLICIES
from anaphora.store import Store, StoreOptions, _Behind
from anaphora.testing.tiers import make_key
from anaphora.testing.valkey import ValkeyServer, server_program
from anaphora.tiers.base import ALL_KEPT_SHARE, ENTRY_OVERHEAD, Entry, Eviction, Tier
from anaphora.tiers.disk import DiskOptions, DiskTier, erased, index, rows
from anaphora.tiers.disk.leaving import Leaving
from anaphora.tiers.disk.traces import SharedTraces
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.tiers.valkey import ValkeyOptions, ValkeyTier, scripts
from anaphora.tiers.valkey.framing import unpacked
from anaphora.types import Key, Scope, Tenant

T = TypeVar("T")

NAMES = st.sampled_from("abcde")
SOME_NAMES = st.sampled_from(["a", "b", "ad", "abc", "cc", "cde", "abcde", "edcba"])
# Who a name belongs to does not change: a key covers the tenant.
OWNERS: dict[str, tuple[Tenant, tuple[str, ...]]] = {
    "a": (Tenant("a"), ()),
    "b": (Tenant("a"), ("x",)),
    "c": (Tenant("a"), ("x", "y")),
    "d": (Tenant("b"), ()),
    "e": (Tenant("b"), ("x",)),
    "z": (Tenant("b"), ("x", "y")),
}
SCOPES = st.sampled_from(
    [
        Scope(),
        Scope(tenant=Tenant("a")),
        Scope(tenant=Tenant("b"), model="m"),
        Scope(tag="x"),
        Scope(tag="y"),
        Scope(tenant=Tenant("a"), tag="x"),
        Scope(tenant=Tenant("b"), tag="y"),
        Scope(model="other"),
    ]
)
SMALL, ROOMY = 3_000, 1_000_000
EVICTIONS = st.sampled_from([Eviction(keep_share=0.5), Eviction("gdsf", tenant_share=0.6, keep_share=0.5)])


class StoreMachine(RuleBasedStateMachine):
    """Over memory and a slower tier, which `begin` prepares and `open_tier` opens, as any process could."""

    unit_s = 1.0
    """How long a second is."""

    def begin(self) -> None:
        raise NotImplementedError

    def open_tier(self) -> Tier:
        raise NotImplementedError

    def used_bytes(self) -> int:
        """Of the slower tier, whatever happens to it at this moment."""
        raise NotImplementedError

    def check_medium(self) -> None:
        """From outside, while the tier is closed."""
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError

    @initialize(roomy=st.booleans(), eviction=EVICTIONS)
    def start(self, roomy: bool, eviction: Eviction) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.roomy = roomy
        self.eviction = eviction
        self.ram_capacity = 2_000
        self.capacity = ROOMY if roomy else SMALL
        self.model: dict[Key, Entry] = {}
        self.lost: set[Key] = set()
        """What the slower tier may have lost."""
        self.kept: dict[str, dict[Key, float]] = {}
        """By each tier, and until when."""
        self.begin()
        self.open()

    def open(self) -> None:
        self.policy: Policy[Key] = POLICIES.load(self.eviction.order)()
        self.ram = RamTier(RamOptions(self.ram_capacity, self.eviction), policy=self.policy, clock=self.clock)
        self.slower = self.open_tier()
        self.kept["ram"] = {}
        self.kept.setdefault(self.slower.name, {})
        # A machine that stands still for a second must not look like a tier that hangs.
        options = StoreOptions(lookup_timeout_s=60)
        self.store = Store([self.ram, self.slower], clock=self.clock, options=options)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def expected(self, key: Key) -> Entry | None:
        entry = self.model.get(key)
        if entry is None or (entry.expires_at_s is not None and entry.expires_at_s <= self.clock.now_s()):
            return None
        return entry

    def kept_by(self, tier: Tier) -> dict[Key, Entry]:
        kept = self.kept[tier.name]
        entries = {key: self.expected(key) for key, until_s in kept.items() if until_s > self.clock.now_s()}
        return {key: entry for key, entry in entries.items() if entry is not None}

    def check(self, key: Key, found: Entry | None) -> None:
        if found is None and (key in self.lost or not self.roomy) and key not in self.kept_by(self.slower):
            return  # evicted, or lost
        assert found == self.expected(key)

    def replaced(self, key: Key, entry: Entry) -> None:
        self.model[key] = entry
        self.lost.discard(key)
        for kept in self.kept.values():
            kept.pop(key, None)

    def erased(self, scope: Scope) -> None:
        self.model = {key: entry for key, entry in self.model.items() if not entry.within(scope)}
        self.kept["ram"].clear()  # an erasure costs all copies

    # -- verbs -----------------------------------------------------------------------------------------------------

    @rule(
        names=SOME_NAMES,
        size=st.sampled_from([0, 100, 599, 600, 1100, 2000]),
        fill=st.integers(0, 255),
        ttl_s=st.sampled_from([None, 5.0, 50.0]),
        steps=st.integers(0, 3),
        keep_s=st.sampled_from([None, None, 2.0]),
    )
    def put(
        self,
        names: str,
        size: int,
        fill: int,
        ttl_s: float | None,
        steps: int,
        keep_s: float | None,
    ) -> None:
        """`steps` of the event loop: how far the write to the slower tier has come when the next verb begins."""
        value = bytes([fill]) * size
        now_s = self.clock.now_s()
        if ttl_s is not None:
            ttl_s *= self.unit_s

        async def put() -> None:
            for name in names:
                tenant, tags = OWNERS[name]
                assert self.store.put(make_key(name), value, tenant=tenant, model="m", tags=tags, ttl_s=ttl_s)
            for _ in range(steps):
                await asyncio.sleep(0)

        self.run(put())
        expires_at_s = None if ttl_s is None else now_s + ttl_s
        for name in names:
            self.replaced(make_key(name), Entry(value, now_s, expires_at_s, 0.0, OWNERS[name][0], "m", OWNERS[name][1]))
        if keep_s is not None:
            self.keep(names=names, seconds=keep_s)

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
        self.erased(scope)
        assert receipt.complete
        for key in [make_key(name) for name in OWNERS]:
            assert key in self.model or self.store.get_now(key) is None

    @rule(scope=SCOPES, flush=st.booleans())
    def forget_in_another_process(self, scope: Scope, flush: bool) -> None:
        """`flush`: or some of it, and of what stays, has yet to be written here."""

        async def elsewhere() -> None:
            if flush:
                await self.store.flush()
            neighbour = self.open_tier()
            await neighbour.forget(scope)
            await neighbour.aclose()
            await self.hear()

        self.run(elsewhere())
        self.erased(scope)

    @rule(name=NAMES)
    def put_in_another_process(self, name: str) -> None:
        """Of what this one has just seen not to be there: of anything else it may have an older copy."""
        key, (tenant, tags) = make_key(name), OWNERS[name]
        if self.expected(key) is not None:
            return
        entry = Entry(b"from elsewhere", self.clock.now_s(), None, 0.0, tenant, "m", tags)

        async def elsewhere() -> None:
            await self.store.flush()
            assert await self.store.get(key) is None
            neighbour = self.open_tier()
            if await neighbour.put_many({key: entry}):
                self.replaced(key, entry)
            await neighbour.aclose()

        self.run(elsewhere())
        self.get(name)

    async def hear(self) -> None:
        """Wait until what others have erased is known here."""

    @rule(names=SOME_NAMES, seconds=st.sampled_from([-1.0, 2.0, 30.0]))
    def keep(self, names: str, seconds: float) -> None:
        keys = [make_key(name) for name in dict.fromkeys(names)]
        now_s = self.clock.now_s()
        until_s = now_s + seconds * self.unit_s
        self.run(self.store.flush())
        self.store.mark()  # drops what was erased elsewhere
        expected: dict[str, int] = {}
        for tier in (self.ram, self.slower):
            there = self.run(tier.sizes(keys))
            expected[tier.name] = 0
            for key in keys:
                if until_s <= now_s:
                    self.kept[tier.name].pop(key, None)
                elif key in there and self.may_be_kept(key, tier):
                    self.kept[tier.name][key] = max(until_s, self.kept[tier.name].get(key, until_s))
                    expected[tier.name] += 1
        assert self.run(self.store.keep(keys, until_s)) == expected
        stats = self.run(self.store.stats())
        for tier in (self.ram, self.slower):
            assert stats[tier.name].kept_bytes == sum(entry.size for entry in self.kept_by(tier).values())

    def may_be_kept(self, key: Key, tier: Tier) -> bool:
        kept, entry = self.kept_by(tier), self.model[key]
        together = sum(other.size for other in kept.values())
        of_tenant = sum(other.size for other in kept.values() if other.tenant == entry.tenant)
        return key in kept or (
            together + entry.size <= ALL_KEPT_SHARE * tier.capacity_bytes
            and of_tenant + entry.size <= self.eviction.keep_share * tier.capacity_bytes
        )

    @rule(seconds=st.sampled_from([1.0, 4.0, 20.0]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds * self.unit_s)

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
            self.replaced(make_key(letter), Entry(b"last words", self.clock.now_s(), None, 0.0, tenant, "m", tags))
        self.run(write_and_close())
        self.check_medium()
        self.open()

    # -- invariants ------------------------------------------------------------------------------------------------

    @invariant()
    def capacities_are_kept(self) -> None:
        if not hasattr(self, "store"):
            return
        stats = self.run(self.ram.stats())
        entries = self.ram._entries
        assert stats.used_bytes == sum(entry.size for entry in entries.values()) <= self.ram_capacity
        assert set(self.policy.victims()) == set(entries)
        assert self.kept_by(self.ram).keys() <= entries.keys()
        assert self.used_bytes() <= self.capacity

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self.run(self.store.flush())
            self.get_all()
            self.run(self.store.aclose())
            self.check_medium()
        finally:
            self.run(self.slower.aclose())
            self.loop.close()
            self.end()


class FolderMachine(StoreMachine):
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="anaphora-store-"))

    def open_tier(self) -> Tier:
        options = DiskOptions(str(self.folder), self.capacity, inline_bytes=600, eviction=self.eviction)
        return DiskTier(options, clock=self.clock)

    def used_bytes(self) -> int:
        return self.run(self.slower.stats()).used_bytes

    def check_medium(self) -> None:
        if not (self.folder / "index.db").exists():
            return
        db = sqlite3.connect(self.folder / "index.db")
        used, total = db.execute("SELECT used, (SELECT COALESCE(SUM(size), 0) FROM entries) FROM meta").fetchone()
        rows = db.execute("SELECT key, file FROM entries").fetchall()
        db.close()
        assert used == total <= self.capacity
        assert set(os.listdir(self.folder / "values")) == {file for _, file in rows if file is not None}
        assert {key for key, _ in rows} <= set(self.model)

    def end(self) -> None:
        shutil.rmtree(self.folder)


class ServerMachine(StoreMachine):
    unit_s = 1000.0  # the server's own clock, by which values expire as well, does not stand still

    server: ValkeyServer

    def begin(self) -> None:
        from redis import Redis

        self.server.command("FLUSHALL")
        self.outside: Any = Redis(port=self.server.port)

    def open_tier(self) -> Tier:
        options = ValkeyOptions(
            self.server.url, self.capacity, eviction=self.eviction, timeout_s=60, connect_timeout_s=60, poll_s=3600, rest_s=0
        )
        return ValkeyTier(options, clock=self.clock)

    def open(self) -> None:
        super().open()
        self.run(self.hear())  # while no time has passed: whether something was erased since is told by the time

    async def hear(self) -> None:
        assert isinstance(self.slower, ValkeyTier)
        await self.slower.erasures(0)  # any reply tells

    @precondition(lambda self: bool(self.model))
    @rule(how=st.sampled_from(["emptied", "without its index", "restarted"]))
    def lose(self, how: str) -> None:
        """Everything, with a write under way perhaps."""
        if how == "emptied":
            self.server.command("FLUSHALL")
        elif how == "without its index":
            self.server.command("DEL", "anaphora:{00}:index")
            self.run(self.slower.stats())  # finds out
        else:
            self.server.kill()
            self.server.start()
        self.lost = set(self.model)
        self.kept[self.slower.name].clear()

    def used_bytes(self) -> int:
        return int(self.outside.hget("anaphora:{00}:state", "used") or 0)

    def check_medium(self) -> None:
        about = {key: unpacked(data) for key, data in self.outside.hgetall("anaphora:{00}:index").items()}
        lengths = {key: fields.size - ENTRY_OVERHEAD for key, fields in about.items() if fields is not None}
        place = b"anaphora:{00}:v:"
        assert {key: self.outside.strlen(place + key) for key in about} == lengths
        assert {name[len(place) :] for name in self.outside.keys(place + b"*")} == about.keys() <= self.model.keys()
        assert self.used_bytes() == sum(lengths.values()) + ENTRY_OVERHEAD * len(lengths) <= self.capacity

    def end(self) -> None:
        self.outside.close()


@pytest.fixture(scope="module")
def server_machine() -> Iterator[type[ServerMachine]]:
    """With a server of its own, which is restarted now and then."""
    pytest.importorskip("redis")
    if server_program() is None:
        pytest.skip("no Valkey server is installed: run make setup")
    with ValkeyServer() as ServerMachine.server:
        yield ServerMachine


SETTINGS = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_the_store_is_a_dict_that_may_lose_what_it_has_no_room_for() -> None:
    run_state_machine_as_test(FolderMachine, settings=SETTINGS)


def test_over_a_server_it_is_one_that_may_lose_everything_besides(server_machine: type[ServerMachine]) -> None:
    run_state_machine_as_test(server_machine, settings=SETTINGS)


# -- mutants -----------------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def memory_forgets_to_subtract(patch: Patch) -> None:
    original = RamTier._remove

    def remove(self: RamTier, key: Key) -> None:
        size = self._entries[key].size
        original(self, key)
        self._used += size

    patch.setattr(RamTier, "_remove", remove)


def memory_makes_no_room(patch: Patch) -> None:
    patch.setattr(RamTier, "_make_room", lambda self, size, tenant: True)


def memory_leaves_keys_in_the_policy(patch: Patch) -> None:
    original = RamTier._remove

    def remove(self: RamTier, key: Key) -> None:
        original(self, key)
        self._policy.insert(key, 1, 0.0)

    patch.setattr(RamTier, "_remove", remove)


def memory_keeps_the_older_value(patch: Patch) -> None:
    original = RamTier.put_now
    patch.setattr(RamTier, "put_now", lambda self, key, entry: key in self._entries or original(self, key, entry))


def memory_evicts_what_is_kept(patch: Patch) -> None:
    original = RamTier._evict

    def evict(self: RamTier, num_bytes: float, tenant: Tenant | None = None) -> None:
        for key in list(self._kept):
            self._remove(key)
        original(self, num_bytes, tenant)

    patch.setattr(RamTier, "_evict", evict)


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
    original = rows.within
    patch.setattr(index, "within", lambda scope: original(msgspec.structs.replace(scope, tag=None)))


def disk_makes_no_room(patch: Patch) -> None:
    patch.setattr(Leaving, "make_room", lambda self, db, entry: [])


def disk_leaves_no_traces(patch: Patch) -> None:
    patch.setattr(SharedTraces, "add", lambda self, key: None)


def disk_leaves_files(patch: Patch) -> None:
    patch.setattr(rows, "remove_file", lambda values_folder, name: None)


def disk_expires_the_wrong_half(patch: Patch) -> None:
    def end_times(self: Leaving, db: sqlite3.Connection) -> float:
        now_s = self._clock.now_s()
        rows.remove(db, self._values, "expires_at > ?", (now_s,))
        return now_s

    patch.setattr(Leaving, "end_times", end_times)


def disk_ignores_the_key(patch: Patch) -> None:
    original = index.DiskIndex._get

    def get(self: index.DiskIndex, db: sqlite3.Connection, keys: list[Key]) -> index.Found:
        everything = original(self, db, [make_key(name) for name in OWNERS]).entries.values()
        return index.Found(dict.fromkeys(keys, next(iter(everything))) if everything else {})

    patch.setattr(index.DiskIndex, "_get", get)


def disk_stores_what_was_erased(patch: Patch) -> None:
    patch.setattr(erased, "not_erased", lambda db, entries, epoch, now: entries)


def disk_stores_nothing_from_before_an_erasure(patch: Patch) -> None:
    patch.setattr(erased, "not_erased", lambda db, entries, epoch, now: entries if epoch == now else {})


def what_waits_is_served_whatever_was_erased(patch: Patch) -> None:
    patch.setattr(_Behind, "doubts", lambda self, key: False)


def disk_evicts_what_is_kept(patch: Patch) -> None:
    original = Leaving.make_room

    def make_room(self: Leaving, db: sqlite3.Connection, entry: Entry) -> Any:
        db.execute("UPDATE entries SET kept_until = NULL")
        return original(self, db, entry)

    patch.setattr(Leaving, "make_room", make_room)


def disk_keeps_whatever_it_is_told(patch: Patch) -> None:
    patch.setattr(Leaving, "_may_keep", lambda self, num_bytes, of_one_tenant: True)


def rewrite(patch: Patch, old: str, new: str) -> None:
    """In every script that has it."""
    found = {name: script for name, script in vars(scripts).items() if isinstance(script, str) and old in script}
    assert found
    for name, script in found.items():
        patch.setattr(scripts, name, script.replace(old, new))


def valkey_makes_no_room(patch: Patch) -> None:
    rewrite(patch, "  local mended = false\n", "  do return true end\n")


def valkey_forgets_to_subtract(patch: Patch) -> None:
    rewrite(patch, "  add('used', -1, fields)\n", "")


def valkey_leaves_values(patch: Patch) -> None:
    rewrite(patch, "  redis.call('UNLINK', place .. key)\n  return unindex(key)", "  return unindex(key)")


def valkey_keeps_the_older_metadata(patch: Patch) -> None:
    rewrite(patch, "  redis.call('HDEL', index, key)\n  if not (fields and use)", "  if not (fields and use)")
    rewrite(patch, "redis.call('HSET', index, key, ARGV[at + 3])", "redis.call('HSETNX', index, key, ARGV[at + 3])")


def valkey_expires_the_wrong_half(patch: Patch) -> None:
    rewrite(patch, "'ZRANGEBYSCORE', expiry, '-inf', now", "'ZRANGEBYSCORE', expiry, now, '+inf'")


def valkey_ignores_the_key(patch: Patch) -> None:
    original = ValkeyTier._get

    async def get(self: ValkeyTier, bucket: int, keys: list[Key]) -> dict[Key, Entry]:
        everything = (await original(self, bucket, [make_key(name) for name in OWNERS])).values()
        return dict.fromkeys(keys, next(iter(everything))) if everything else {}

    patch.setattr(ValkeyTier, "_get", get)


def valkey_forgetting_ignores_tags(patch: Patch) -> None:
    rewrite(patch, "  return false\nend\n\nif ARGV[2]", "  return true\nend\n\nif ARGV[2]")


def valkey_does_not_tell_of_erasures(patch: Patch) -> None:
    rewrite(patch, "redis.call('HSET', state, 'epoch', string.format('%.0f', epoch))\n", "")


def valkey_evicts_what_is_kept(patch: Patch) -> None:
    rewrite(patch, "  local mended = false\n", "  now = math.huge\n  sweep()\n")


def valkey_keeps_forever(patch: Patch) -> None:
    rewrite(patch, "'ZRANGEBYSCORE', kept, '-inf', now", "'ZRANGEBYSCORE', kept, '-inf', '-inf'")


def valkey_keeps_what_was_replaced(patch: Patch) -> None:
    rewrite(patch, "{rank = rank(fields, 1),", "{kept_until = were_kept[key], rank = rank(fields, 1),")
    rewrite(patch, "  for at = 9, last, 4 do unindex(ARGV[at]) end", "  for at = 9, last, 4 do note(ARGV[at]) end")
    rewrite(
        patch,
        "local function work()\n",
        "local were_kept = {}\n"
        "local function note(key) were_kept[key] = redis.call('ZSCORE', kept, key) unindex(key) end\n"
        "local function work()\n",
    )


def valkey_keeps_whatever_it_is_told(patch: Patch) -> None:
    rewrite(patch, "elseif number('kept') + fields[1] <= most_kept and", "elseif true or")


MUTANTS: list[Callable[[Patch], None]] = [
    memory_forgets_to_subtract,
    memory_makes_no_room,
    memory_leaves_keys_in_the_policy,
    memory_keeps_the_older_value,
    memory_evicts_what_is_kept,
    nothing_expires,
    promotion_renews,
    erasures_elsewhere_are_not_heeded,
    closing_does_not_flush,
    forgetting_ignores_tags,
    disk_makes_no_room,
    disk_leaves_no_traces,
    disk_leaves_files,
    disk_expires_the_wrong_half,
    disk_ignores_the_key,
    disk_stores_what_was_erased,
    disk_stores_nothing_from_before_an_erasure,
    what_waits_is_served_whatever_was_erased,
    disk_evicts_what_is_kept,
    disk_keeps_whatever_it_is_told,
]
SERVER_MUTANTS: list[Callable[[Patch], None]] = [
    valkey_makes_no_room,
    valkey_forgets_to_subtract,
    valkey_leaves_values,
    valkey_keeps_the_older_metadata,
    valkey_expires_the_wrong_half,
    valkey_ignores_the_key,
    valkey_forgetting_ignores_tags,
    valkey_does_not_tell_of_erasures,
    valkey_evicts_what_is_kept,
    valkey_keeps_forever,
    valkey_keeps_what_was_replaced,
    valkey_keeps_whatever_it_is_told,
]


def kills(machine: type[StoreMachine]) -> None:
    hasty = settings(SETTINGS, phases=[Phase.generate], max_examples=400, report_multiple_bugs=False)
    with pytest.raises((AssertionError, KeyError, Flaky)):  # a thread may be faster the second time
        run_state_machine_as_test(machine, settings=hasty)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_machine_kills(mutant: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    kills(FolderMachine)


@pytest.mark.parametrize("mutant", SERVER_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_machine_over_a_server_kills(
    mutant: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch, server_machine: type[ServerMachine]
) -> None:
    mutant(monkeypatch)
    kills(server_machine)
