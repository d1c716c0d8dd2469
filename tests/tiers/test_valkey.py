from __future__ import annotations

import asyncio
import random
import ssl
import struct
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import redis
from redis.crc import key_slot

from anaphora.clock import Clock, ManualClock, SystemClock
from anaphora.errors import ConfigError, TierFailed
from anaphora.events import Damaged, Event, Failed
from anaphora.policies.base import Policy
from anaphora.policies.gdsf import GDSF
from anaphora.policies.lru import LRU
from anaphora.store import Store, StoreOptions
from anaphora.testing.tiers import make_entry, make_key
from anaphora.testing.valkey import ValkeyServer, valkey_cluster
from anaphora.tiers.base import ENTRY_OVERHEAD, EVERYTHING, Entry, Erasure, Eviction, Tier
from anaphora.tiers.disk import DiskOptions, DiskTier
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.tiers.valkey import ValkeyOptions, ValkeyTier, scripts
from anaphora.tiers.valkey.framing import unpacked
from anaphora.types import Key, Scope, Tenant

MIB = 1 << 20
LARGE = Entry(bytes(range(256)) * 3000, 1.0)
PATIENT_S = 60.0


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


def open_tier(url: str, capacity: int = 64 * MIB, clock: Clock | None = None, **options: Any) -> ValkeyTier:
    # A machine that stands still for a second must not look like a server that does.
    patient = {"timeout_s": PATIENT_S, "connect_timeout_s": PATIENT_S, "poll_s": 0.02, "rest_s": 0.0, **options}
    return ValkeyTier(ValkeyOptions(url, capacity, **patient), clock=clock or ManualClock())


def key_of(part: str) -> str:
    return "anaphora:{00}:" + part


def value_key(key: Key) -> bytes:
    return key_of("v:").encode() + key


def number(reply: bytes) -> int:
    return int(reply[1:].split(b"\r\n")[0])


def check_server(server: ValkeyServer, capacity: int, *, knows_expiry: bool = True) -> int:
    """Invariant 4, seen from outside: the parts of the index say the same, and what is used is the sum of what lies there and
    fits. How many values lie there."""
    with redis.Redis(port=server.port) as client:
        read: Any = client
        about = {key: unpacked(data) for key, data in read.hgetall(key_of("index")).items()}
        state = {name.decode(): value for name, value in read.hgetall(key_of("state")).items()}
        zsets = {name: dict(read.zrange(key_of(name), 0, -1, withscores=True)) for name in ("order", "ranks", "kept", "expiry")}
        names = read.zrange(key_of("turns"), 0, -1)
        uses, tenants = read.hgetall(key_of("uses")), read.hgetall(key_of("tenants"))
        lengths = {key[len(key_of("v:")) :]: read.strlen(key) for key in read.keys(key_of("v:*"))}
    gdsf, limited = state.get("order") == b"gdsf", state.get("limited") == b"1"
    kept, others = set(zsets["kept"]), about.keys() - zsets["kept"].keys()
    ranked = {name[8:]: (rank, name) for name, rank in zsets["ranks"].items()}
    assert {key: fields.size - ENTRY_OVERHEAD for key, fields in about.items() if fields} == lengths
    assert kept <= about.keys()
    assert (set(ranked), set(zsets["order"])) == ((others, set()) if gdsf else (set(), others))
    assert set(uses) == (about.keys() if gdsf else kept)
    expiry = {key: fields.expires_at_s for key, fields in about.items() if fields and fields.expires_at_s}
    assert zsets["expiry"] == expiry or not knows_expiry
    turns, sums = set(), Counter[str]()
    for key, fields in about.items():
        assert fields
        sums["used"] += fields.size
        if key in kept:
            sums["kept"] += fields.size
            sums[f"kept:{fields.tenant}"] += fields.size
        elif limited:
            tick = zsets["order"].get(key, 0.0)
            rank, name = ranked.get(key, (tick, struct.pack(">d", tick) + key))
            turns.add(struct.pack(">I", len(fields.tenant.encode())) + fields.tenant.encode() + struct.pack(">d", rank) + name)
        if limited:
            sums[f"used:{fields.tenant}"] += fields.size
    assert set(names) == turns
    assert (int(state.get("used", 0)), int(state.get("kept", 0))) == (sums.pop("used", 0), sums.pop("kept", 0))
    assert {name.decode(): int(size) for name, size in tenants.items()} == sums
    assert int(state.get("used", 0)) <= capacity
    return len(about)


# -- what lies on the server -------------------------------------------------------------------------------------------


def test_hundreds_of_large_values_come_back_as_they_were(valkey: str) -> None:
    async def body() -> None:
        tier = open_tier(valkey, 512 * MIB)
        entries = {make_key(name): msgspec.structs.replace(LARGE, cost_s=float(name)) for name in range(100)}
        assert await tier.put_many(entries) == frozenset(entries)
        assert await tier.get_many(entries) == entries
        await tier.aclose()

    run(body())


def test_values_of_all_sizes_come_back_in_one_batch(valkey: str) -> None:
    """Large values are read another way than small ones, and either may begin in the other's last bytes."""

    async def body() -> None:
        tier = open_tier(valkey)
        sizes = [0, 1, 70_000, 3, 65_534, 65_535, 65_536, 65_537, 0, 2 * MIB, 10, 131_072, 1 * MIB, 65_536, 2, 3 * MIB]
        entries = {make_key(name): make_entry(size, fill=bytes([name])) for name, size in enumerate(sizes)}
        await tier.put_many(entries)
        assert await tier.get_many(entries) == entries
        many = [tier.get_many(list(entries)[name:]) for name in range(len(sizes))]
        for name, found in enumerate(await asyncio.gather(*many)):
            assert found == {make_key(later): entries[make_key(later)] for later in range(name, len(sizes))}
        await tier.aclose()

    run(body())


@pytest.mark.parametrize(
    "evictions",
    [[Eviction()], [Eviction("gdsf", 0.5, 0.3)], [Eviction(), Eviction("gdsf"), Eviction("lru", 0.5)]],
    ids=["plain", "limited", "at odds"],
)
def test_used_bytes_are_what_lies_there_whoever_puts_keeps_deletes_and_forgets_at_once(
    valkey: str, valkey_server: ValkeyServer, evictions: list[Eviction]
) -> None:
    capacity = 20_000

    def churned(name: int, expires_at_s: float) -> Entry:
        return Entry(b"%d" % name * 300, 1.0, expires_at_s if name % 2 else None, float(name), Tenant(str(name % 3)))

    async def churn(seed: int) -> None:
        clock = ManualClock()
        for life in range(2):
            tier = open_tier(valkey, capacity, clock, eviction=evictions[(seed + life) % len(evictions)])
            for step in range(20):
                names = [(seed * 31 + step * 7 + turn) % 23 for turn in range(4)]
                keys = [make_key(name) for name in names]
                match (seed + step) % 9:
                    case 0:
                        await tier.delete_many(keys)
                    case 1:
                        await tier.forget(Scope(tenant=Tenant(str(step % 3))))
                    case 2:
                        found = await tier.get_many(keys)
                        assert all(entry.value == b"%d" % name * 300 for name in names if (entry := found.get(make_key(name))))
                    case 3:
                        await tier.keep(keys, clock.now_s() + step % 4 - 1)
                    case _:
                        clock.advance(0.5)
                        await tier.put_many({make_key(name): churned(name, clock.now_s() + 4) for name in names})
            await tier.aclose()

    async def body() -> None:
        await asyncio.gather(*[churn(seed) for seed in range(4)])
        assert check_server(valkey_server, capacity) > 0

    run(body())


def test_an_entry_that_expires_leaves_the_server_and_the_index(valkey: str, valkey_server: ValkeyServer) -> None:
    async def body() -> None:
        tier = open_tier(valkey)
        clock = tier._clock
        assert isinstance(clock, ManualClock)
        await tier.put_many({make_key(1): make_entry(expires_at_s=clock.now_s() + 60), make_key(2): make_entry()})
        assert 0 < number(valkey_server.command("PTTL", value_key(make_key(1)))) <= 60_000
        assert number(valkey_server.command("PTTL", value_key(make_key(2)))) == -1
        clock.advance(60)
        assert (await tier.stats()).num_entries == check_server(valkey_server, 64 * MIB) == 1
        await tier.aclose()

    run(body())


def test_what_has_expired_is_put_again_like_anything_else(valkey: str, valkey_server: ValkeyServer) -> None:
    async def body() -> None:
        clock = ManualClock()
        tier = open_tier(valkey, 64 * MIB, clock)
        await tier.put_many({make_key(1): make_entry(expires_at_s=clock.now_s() + 60)})
        clock.advance(60)
        again = make_entry(expires_at_s=clock.now_s() + 60)
        assert await tier.put_many({make_key(1): again}) == {make_key(1)}
        assert await tier.get_many([make_key(1)]) == {make_key(1): again}
        assert check_server(valkey_server, 64 * MIB) == 1
        await tier.aclose()

    run(body())


def test_a_value_that_the_server_let_expire_is_a_plain_miss(valkey: str, valkey_server: ValkeyServer) -> None:
    async def body() -> None:
        tier = open_tier(valkey)
        await tier.put_many({make_key(1): make_entry(expires_at_s=tier._clock.now_s() + 60)})
        valkey_server.command("DEL", value_key(make_key(1)))
        assert await tier.get_many([make_key(1)]) == {}
        assert (await tier.stats()).num_damaged == 0
        await tier.aclose()

    run(body())


# -- damage ------------------------------------------------------------------------------------------------------------


def damage_one_bit(server: ValkeyServer) -> None:
    server.command("SETRANGE", value_key(make_key(1)), "50", "y")


def damage_truncate(server: ValkeyServer) -> None:
    server.command("SET", value_key(make_key(1)), "x" * 99)


def damage_lose(server: ValkeyServer) -> None:
    server.command("DEL", value_key(make_key(1)))


def damage_swap(server: ValkeyServer) -> None:
    server.command("COPY", value_key(make_key(2)), value_key(make_key(1)), "REPLACE")


def damage_swap_with_metadata(server: ValkeyServer) -> None:
    damage_swap(server)
    script = "redis.call('HSET', KEYS[1], ARGV[1], redis.call('HGET', KEYS[1], ARGV[2]))"
    server.command("EVAL", script, "1", key_of("index"), make_key(1), make_key(2))


def damage_foreign_type(server: ValkeyServer) -> None:
    server.command("DEL", value_key(make_key(1)))
    server.command("RPUSH", value_key(make_key(1)), "x")


def damage_metadata(server: ValkeyServer) -> None:
    server.command("HSET", key_of("index"), make_key(1), "\x01nonsense")


@pytest.mark.parametrize(
    "damage",
    [
        damage_one_bit,
        damage_truncate,
        damage_lose,
        damage_swap,
        damage_swap_with_metadata,
        damage_foreign_type,
        damage_metadata,
    ],
)
def test_a_damaged_entry_is_a_counted_miss_and_leaves(valkey: str, valkey_server: ValkeyServer, damage: Any) -> None:
    async def body() -> None:
        events: list[Event] = []
        tier = ValkeyTier(ValkeyOptions(valkey, MIB), clock=ManualClock(), emit=events.append)
        await tier.put_many({make_key(1): make_entry(), make_key(2): make_entry(fill=b"z")})
        damage(valkey_server)
        assert await tier.get_many([make_key(1), make_key(2)]) == {make_key(2): make_entry(fill=b"z")}
        assert events == [Damaged("valkey", 1)]
        stats = await tier.stats()
        assert (stats.num_entries, stats.num_damaged, stats.used_bytes) == (1, 1, 100 + ENTRY_OVERHEAD)
        assert check_server(valkey_server, MIB) == 1
        await tier.put_many({make_key(1): make_entry()})
        assert len(await tier.get_many([make_key(1), make_key(2)])) == 2
        await tier.aclose()

    run(body())


PARTS = ["index", "kept", "uses", "expiry", "tenants", "state", "log"]
LRU_PARTS = [*PARTS, "order"]
GDSF_PARTS = [*PARTS, "ranks", "turns"]


@pytest.mark.parametrize(
    ("order", "part"),
    [
        *(("lru", part) for part in (*LRU_PARTS, "index order", "kept uses", " ".join(LRU_PARTS))),
        *(("gdsf", part) for part in (*GDSF_PARTS, "index ranks", "kept uses", " ".join(GDSF_PARTS))),
    ],
)
@pytest.mark.parametrize("how", ["evicted", "overwritten"])
def test_a_lost_part_of_the_index_costs_entries_and_nothing_else(
    valkey: str, valkey_server: ValkeyServer, order: Literal["lru", "gdsf"], part: str, how: str
) -> None:
    """A server that is short of memory may evict any key, and anybody may write to one."""
    capacity = 10_000

    async def body() -> None:
        clock = ManualClock()
        tier = open_tier(valkey, capacity, clock, eviction=Eviction(order, 0.9 if order == "gdsf" else 1.0, 0.5))
        entries = {make_key(name): make_entry(1000, expires_at_s=clock.now_s() + 1000 + name) for name in range(6)}
        await tier.put_many(entries)
        assert await tier.keep(list(entries)[:1], clock.now_s() + 60) == 1
        for name in part.split():
            valkey_server.command("DEL", key_of(name))
            if how == "overwritten":
                valkey_server.command("SET", key_of(name), "mine")
        for _ in range(2):  # what holds something else is found once, and then removed
            try:
                await tier.put_many({make_key(9): make_entry(10), make_key(5): entries[make_key(5)]})
            except TierFailed:
                assert number(valkey_server.command("EXISTS", value_key(make_key(9)))) == 0
            with suppress(TierFailed):
                await tier.forget(Scope(tenant=Tenant("nobody")))
        assert await tier.put_many({make_key(9): make_entry(10)}) == {make_key(9)}
        check_server(valkey_server, capacity, knows_expiry=part != "expiry")
        found = await tier.get_many([*entries, make_key(9)])
        assert make_key(9) in found
        assert all(found[key] == entries[key] for key in found if key in entries)
        stats = await tier.stats()
        assert (stats.num_entries, stats.num_damaged) == (len(found), 0)
        assert noted_order(valkey_server) == order.encode()
        if part not in ("index", "order", "expiry") and " " not in part:
            assert len(found) == 7, "the rest tells what it was"
            assert stats.kept_bytes == (0 if part == "kept" else 1000 + ENTRY_OVERHEAD)
        await tier.aclose()

    run(body())


def test_where_the_servers_memory_is_full_nothing_is_stored_and_nothing_left_behind(
    valkey: str, valkey_server: ValkeyServer
) -> None:
    async def body() -> None:
        tier = open_tier(valkey)
        await tier.put_many({make_key(1): make_entry()})
        used = int(valkey_server.command("INFO", "memory").split(b"used_memory:")[1].split(b"\r\n")[0])
        valkey_server.command("CONFIG", "SET", "maxmemory", str(used + 300_000))
        try:
            with pytest.raises(TierFailed, match="memory"):
                await asyncio.gather(*[tier.put_many({make_key(name): LARGE}) for name in range(8)])
        finally:
            valkey_server.command("CONFIG", "SET", "maxmemory", "0")
        check_server(valkey_server, 64 * MIB)
        assert await tier.put_many({make_key(2): LARGE}) == {make_key(2)}
        await tier.aclose()

    run(body())


def test_where_the_servers_memory_is_full_nothing_is_evicted_either(valkey: str, valkey_server: ValkeyServer) -> None:
    capacity = 10_000

    async def body() -> None:
        clock = ManualClock()
        tier = open_tier(valkey, capacity, clock, eviction=Eviction("gdsf", 0.9, 0.5))
        entries = {make_key(name): make_entry(1000) for name in range(7)}
        await tier.put_many(entries)
        await tier.keep([make_key(0)], clock.now_s() + 60)
        valkey_server.command("CONFIG", "SET", "maxmemory", "1")
        try:
            for large in (make_entry(1000), make_entry(capacity)):  # the second is not even sent
                with pytest.raises(TierFailed, match="memory"):
                    await tier.put_many({make_key(9): large})
            with pytest.raises(TierFailed, match="memory"):
                await tier.keep([make_key(0), make_key(1)], clock.now_s() + 70)
            assert (await tier.stats()).kept_bytes == 1000 + ENTRY_OVERHEAD
            assert await tier.keep([make_key(1)], clock.now_s() + 70) == 1, "no more is needed for it"
        finally:
            valkey_server.command("CONFIG", "SET", "maxmemory", "0")
        stats = await tier.stats()
        assert (stats.num_evicted, stats.kept_bytes) == (0, 2 * (1000 + ENTRY_OVERHEAD))
        assert check_server(valkey_server, capacity) == 7
        assert await tier.put_many({make_key(9): make_entry(1000)}) == {make_key(9)}
        assert check_server(valkey_server, capacity) == 7
        await tier.aclose()

    run(body())


# -- what leaves first, and what does not ------------------------------------------------------------------------------


def noted_order(server: ValkeyServer) -> bytes:
    return server.command("HGET", key_of("state"), "order").split(b"\r\n")[1]


def part_names(server: ValkeyServer) -> set[bytes]:
    with redis.Redis(port=server.port) as client:
        read: Any = client
        return {name.split(b":")[2] for name in read.keys("*")}


@pytest.mark.parametrize("order", ["lru", "gdsf"])
def test_processes_follow_one_order_in_which_ties_go_by_the_last_use(valkey: str, order: Literal["lru", "gdsf"]) -> None:
    policies: dict[str, type[Policy[Key]]] = {"lru": LRU, "gdsf": GDSF}
    capacity = 5_000

    async def body() -> None:
        chance = random.Random(1)
        tiers = [open_tier(valkey, capacity, poll_s=PATIENT_S, eviction=Eviction(order)) for _ in range(3)]
        policy = policies[order]()
        sizes: dict[Key, int] = {}
        for name in range(300):
            tier = chance.choice(tiers)
            used = chance.sample(sorted(sizes), k=min(len(sizes), chance.randrange(3)))
            tier.touch(used)
            for key in used:
                policy.touch(key)
            key = make_key(name % 37)
            entry = Entry(bytes(chance.choice([0, 256])), 1.0, cost_s=chance.choice([0.0, 0.0, 1.0, 2.0]))
            if key in sizes:
                policy.remove(key)
                del sizes[key]
            while sum(sizes.values()) + entry.size > capacity:
                victim = next(policy.victims())
                policy.remove(victim)
                del sizes[victim]
            policy.insert(key, entry.size, entry.cost_s)
            sizes[key] = entry.size
            await tier.put_many({key: entry})
            assert set(await tier.keys()) == set(sizes)
        for tier in tiers:
            await tier.aclose()

    run(body())


def test_what_one_process_keeps_another_does_not_evict_and_may_let_go(valkey: str, valkey_server: ValkeyServer) -> None:
    capacity = 4_000

    async def body() -> None:
        clock = ManualClock()
        here, there = open_tier(valkey, capacity, clock), open_tier(valkey, capacity, clock)
        await here.put_many({make_key(0): make_entry(500)})
        assert await here.keep([make_key(0)], clock.now_s() + 60) == 1
        for name in range(1, 20):
            await there.put_many({make_key(name): make_entry(500)})
        assert make_key(0) in await there.keys()
        assert (await there.stats()).kept_bytes == 500 + ENTRY_OVERHEAD
        assert await there.keep([make_key(0)], clock.now_s() + 10) == 1
        clock.advance(10)
        assert (await there.stats()).kept_bytes == 500 + ENTRY_OVERHEAD, "it is kept longer already"
        assert await there.put_many({make_key(20): make_entry(3_000)}) == frozenset()
        assert check_server(valkey_server, capacity) == 5
        assert await there.keep([make_key(0)], clock.now_s()) == 0
        assert (await here.stats()).kept_bytes == 0
        await here.put_many({make_key(21): make_entry(500)})
        assert make_key(0) not in await here.keys()
        assert check_server(valkey_server, capacity) == 5
        for tier in (here, there):
            await tier.aclose()

    run(body())


def test_a_use_of_what_is_kept_counts_once_it_is_kept_no_longer(valkey: str, valkey_server: ValkeyServer) -> None:
    capacity = 4 * (500 + ENTRY_OVERHEAD)

    async def body(order: Literal["lru", "gdsf"]) -> None:
        clock = ManualClock()
        valkey_server.command("FLUSHALL")
        tier = open_tier(valkey, capacity, clock, eviction=Eviction(order, keep_share=0.6))
        await tier.put_many({make_key(name): make_entry(500) for name in range(4)})
        assert await tier.keep([make_key(0), make_key(1)], clock.now_s() + 60) == 2
        tier.touch([make_key(0)])
        await tier.put_many({make_key(4): make_entry(500)})
        assert set(await tier.keys()) == {make_key(name) for name in (0, 1, 3, 4)}
        clock.advance(60)
        await tier.put_many({make_key(5): make_entry(500), make_key(6): make_entry(500)})
        assert set(await tier.keys()) == {make_key(name) for name in (0, 4, 5, 6)}
        check_server(valkey_server, capacity)
        await tier.aclose()

    run(body("lru"))
    run(body("gdsf"))


def test_the_order_is_that_of_the_last_process_to_begin_and_the_others_follow(valkey: str, valkey_server: ValkeyServer) -> None:
    capacity = 5 * (500 + ENTRY_OVERHEAD)

    async def put(tier: ValkeyTier, name: int, cost_s: float) -> set[int]:
        await tier.put_many({make_key(name): msgspec.structs.replace(make_entry(500), cost_s=cost_s)})
        check_server(valkey_server, capacity)
        there = await tier.keys()
        return {name for name in range(20) if make_key(name) in there}

    async def body() -> None:
        clock = ManualClock()
        one = open_tier(valkey, capacity, clock)
        for name in range(4):
            await put(one, name, cost_s=9.0 - name)
        await one.keep([make_key(3)], clock.now_s() + 60)
        await put(one, 4, 8.0)

        other = open_tier(valkey, capacity, clock, eviction=Eviction("gdsf"))
        assert await other.get_many([make_key(2)]) != {}
        assert noted_order(valkey_server) == b"lru", "whoever only reads changes nothing"
        assert await put(other, 5, 9.5) == {0, 2, 3, 4, 5}, "1 is the cheapest: 2 has been used, and 3 is kept"
        assert noted_order(valkey_server) == b"gdsf"
        assert await put(one, 6, 9.5) == {0, 2, 3, 5, 6}, "who was there before follows"
        assert noted_order(valkey_server) == b"gdsf"

        third = open_tier(valkey, capacity, clock)
        assert await put(third, 7, 0.0) == {2, 3, 5, 6, 7}, "the last use of every entry is still known"
        assert await put(other, 8, 0.0) == {3, 5, 6, 7, 8}
        assert noted_order(valkey_server) == b"lru"
        clock.advance(60)
        assert await put(third, 9, 0.0) == {5, 6, 7, 8, 9}
        for tier in (one, other, third):
            await tier.aclose()

    run(body())


@pytest.mark.parametrize("how", ["another order", "uses lost"])
def test_what_is_kept_meanwhile_is_ranked_by_its_cost_when_that_ends(
    valkey: str, valkey_server: ValkeyServer, how: str
) -> None:
    capacity = 5 * (500 + ENTRY_OVERHEAD)

    def costs(cost_s: float) -> Entry:
        return msgspec.structs.replace(make_entry(500), cost_s=cost_s)

    async def body() -> None:
        clock = ManualClock()
        gdsf = open_tier(valkey, capacity, clock, eviction=Eviction("gdsf", keep_share=0.5))
        first = gdsf if how == "uses lost" else open_tier(valkey, capacity, clock, eviction=Eviction(keep_share=0.5))
        await first.put_many({make_key(name): costs(cost_s) for name, cost_s in enumerate([5.0, 1.0, 3.0, 2.0, 4.0])})
        await first.keep([make_key(0), make_key(1)], clock.now_s() + 10)
        if how == "uses lost":
            valkey_server.command("DEL", key_of("uses"))
        await gdsf.put_many({make_key(5): costs(9.0)})
        clock.advance(10)
        for name, gone in enumerate((1, 2, 4, 0), start=6):
            await gdsf.put_many({make_key(name): costs(99.0)})
            assert make_key(gone) not in await gdsf.keys()
            check_server(valkey_server, capacity)
        for tier in {gdsf, first}:
            await tier.aclose()

    run(body())


@pytest.mark.parametrize("eviction", [Eviction(), Eviction("gdsf"), Eviction("lru", 0.5)], ids=["lru", "gdsf", "limited"])
def test_after_a_restart_of_the_server_those_who_are_there_have_their_order_again(eviction: Eviction) -> None:
    async def body() -> None:
        with ValkeyServer() as server:
            tier = open_tier(server.url, 10_000, eviction=eviction)
            await tier.put_many({make_key(name): make_entry(1000) for name in range(3)})
            server.kill()
            server.start()
            await tier.put_many({make_key(name): make_entry(1000) for name in range(9)})
            assert noted_order(server) == eviction.order.encode()
            assert check_server(server, 10_000) == (3 if eviction.tenant_share < 1 else 7)
            await tier.aclose()

    run(body())


@pytest.mark.parametrize("eviction", [Eviction(), Eviction("gdsf", 0.8, 0.8)], ids=["lru", "gdsf"])
def test_what_was_there_before_anything_was_ranked_is_used_on(
    valkey: str, valkey_server: ValkeyServer, eviction: Eviction
) -> None:
    async def body() -> None:
        clock = ManualClock()
        tier = open_tier(valkey, 10_000, clock)
        entries = {make_key(name): make_entry(1000, expires_at_s=clock.now_s() + 60) for name in range(6)}
        await tier.put_many(entries)
        await tier.aclose()
        valkey_server.command("HDEL", key_of("state"), "order", "limited", "kept", "age")

        tier = open_tier(valkey, 10_000, clock, eviction=eviction)
        assert await tier.get_many(entries) == entries
        assert await tier.keep([make_key(0)], clock.now_s() + 30) == 1
        assert await tier.delete_many([make_key(1)]) == 1
        await tier.put_many({make_key(7): make_entry(1000)})
        assert check_server(valkey_server, 10_000) == 6
        for name in range(8, 20):
            await tier.put_many({make_key(name): make_entry(1000)})
            check_server(valkey_server, 10_000)
        assert make_key(0) in await tier.keys()
        await tier.aclose()

    run(body())


def test_who_limits_and_keeps_nothing_pays_for_nothing(valkey: str, valkey_server: ValkeyServer) -> None:
    async def body() -> None:
        clock = ManualClock()
        tier = open_tier(valkey, 10_000, clock)
        await tier.put_many({make_key(name): make_entry(1000) for name in range(12)})
        plain = {b"index", b"order", b"state", b"v"}
        assert part_names(valkey_server) == plain
        other = open_tier(valkey, 10_000, clock, eviction=Eviction("gdsf", 0.5))
        await other.put_many({make_key(0): make_entry(1000)})
        await other.keep([make_key(0)], clock.now_s() + 60)
        ranked = {b"index", b"ranks", b"turns", b"kept", b"uses", b"tenants", b"state", b"v"}
        assert part_names(valkey_server) == ranked
        await tier.put_many({make_key(1): make_entry(1000)})
        assert part_names(valkey_server) == ranked, "what one process needs another does not take away"
        await other.forget(EVERYTHING)
        assert part_names(valkey_server) == {b"state", b"log"}
        await tier.put_many({make_key(0): make_entry(1000)})
        assert part_names(valkey_server) == {*plain, b"log"}, "who comes first to what is empty says how"
        for closing in (tier, other):
            await closing.aclose()

    run(body())


def test_a_capacity_smaller_than_what_is_kept_leaves_room_for_others_all_the_same(
    valkey: str, valkey_server: ValkeyServer
) -> None:
    async def body() -> None:
        clock = ManualClock()
        size = 1000 - ENTRY_OVERHEAD
        tier = open_tier(valkey, 10_000, clock, eviction=Eviction(keep_share=0.75))
        await tier.put_many({make_key(name): make_entry(size) for name in range(10)})
        for name in range(7):
            await tier.keep([make_key(name)], clock.now_s() + 100 - name)
        await tier.aclose()

        tier = open_tier(valkey, 4_000, clock, eviction=Eviction(keep_share=0.75))
        assert await tier.put_many({make_key(11): make_entry(size)}) == {make_key(11)}
        assert set(await tier.keys()) == {make_key(name) for name in (0, 1, 2, 11)}, "those kept longest stay"
        assert (await tier.stats()).kept_bytes == 3_000
        assert check_server(valkey_server, 4_000) == 4
        await tier.aclose()

    run(body())


def test_tenants_whose_names_begin_alike_have_shares_of_their_own(valkey: str, valkey_server: ValkeyServer) -> None:
    async def body() -> None:
        size = 1000 - ENTRY_OVERHEAD
        tier = open_tier(valkey, 10_000, eviction=Eviction(tenant_share=0.3))
        tenants = ["a", "ab", "a\0", "ü"]
        for name in range(5):
            for tenant in tenants:
                await tier.put_many({make_key((tenant, name)): make_entry(size, tenant=tenant)})
                check_server(valkey_server, 10_000)
        await tier.put_many({make_key(("a", name)): make_entry(size, tenant="a") for name in range(5, 9)})
        expected = {make_key(("a", name)) for name in (6, 7, 8)}
        expected |= {make_key((tenant, name)) for tenant in tenants[1:] for name in (3, 4)}
        expected.add(make_key(("ü", 2)))
        assert set(await tier.keys()) == expected
        await tier.aclose()

    run(body())


def test_a_tenant_that_makes_room_for_itself_makes_nobody_else_look_older(valkey: str) -> None:
    async def body() -> None:
        size = 1000 - ENTRY_OVERHEAD
        tier = open_tier(valkey, 6_000, eviction=Eviction("gdsf", 0.5))

        async def put(name: int, tenant: str, cost_s: float) -> None:
            await tier.put_many({make_key(name): msgspec.structs.replace(make_entry(size, tenant=tenant), cost_s=cost_s)})

        await put(0, "b", 1.0)
        for name in range(1, 7):
            await put(name, "a", 90.0 + name)
        await put(7, "c", 2.0)
        assert set(await tier.keys()) == {make_key(name) for name in (0, 4, 5, 6, 7)}
        for name in (8, 9, 10):
            await put(name, "d", 99.0)
        assert set(await tier.keys()) == {make_key(name) for name in (4, 5, 6, 8, 9, 10)}
        await tier.aclose()

    run(body())


@pytest.mark.parametrize("order", ["lru", "gdsf"])
@pytest.mark.parametrize("seed", range(3))
def test_a_server_and_a_folder_that_are_told_the_same_hold_the_same(
    valkey: str, valkey_server: ValkeyServer, tmp_path: Path, order: Literal["lru", "gdsf"], seed: int
) -> None:
    capacity = 10_000

    async def body() -> None:
        chance, clock = random.Random(seed), ManualClock()
        eviction = Eviction(order, tenant_share=0.6, keep_share=0.3)
        tiers: list[Tier] = [
            open_tier(valkey, capacity, clock, poll_s=PATIENT_S, eviction=eviction),
            DiskTier(DiskOptions(str(tmp_path), capacity, eviction=eviction), clock=clock),
        ]
        kept_bytes = set[int]()
        for _ in range(250):
            names = chance.sample(range(30), k=3)
            keys = [make_key(name) for name in names]
            verb = chance.choice(["put"] * 5 + ["touch", "keep", "delete", "advance"])
            entry = msgspec.structs.replace(
                make_entry(chance.randrange(2500), tenant="abc"[names[0] % 3]), cost_s=chance.choice([0.0, 0.5, 4.0])
            )
            until_s = clock.now_s() + chance.choice([-1, 5, 20])
            answers: list[object] = []
            for tier in tiers:
                match verb:
                    case "put":
                        answers.append(await tier.put_many({keys[0]: entry}))
                    case "touch":
                        tier.touch(keys)
                    case "keep":
                        answers.append(await tier.keep(keys, until_s))
                    case "delete":
                        answers.append(await tier.delete_many(keys[:1]))
            if verb == "advance":
                clock.advance(3)
            stats = [await tier.stats() for tier in tiers]
            assert len(set(answers)) <= 1
            assert set(await tiers[0].keys()) == set(await tiers[1].keys())
            assert (stats[0].used_bytes, stats[0].kept_bytes) == (stats[1].used_bytes, stats[1].kept_bytes)
            kept_bytes.add(stats[0].kept_bytes)
        assert len(kept_bytes) > 5
        check_server(valkey_server, capacity)
        for tier in tiers:
            await tier.aclose()

    run(body())


def test_a_script_that_had_to_stop_half_way_leaves_no_wrong_sum(valkey: str, valkey_server: ValkeyServer) -> None:
    async def body() -> None:
        clock = ManualClock()
        tier = open_tier(valkey, 10_000, clock, eviction=Eviction("gdsf", 0.9, 0.5))
        await tier.put_many({make_key(0): make_entry(1000), make_key(1): make_entry(1000)})
        await tier.keep([make_key(0)], clock.now_s() + 10)
        valkey_server.command("SET", key_of("turns"), "mine")
        with pytest.raises(TierFailed):
            await tier.delete_many([make_key(1)])
        assert await tier.keys() == [make_key(0)]
        assert check_server(valkey_server, 10_000) == 1
        await tier.aclose()

    run(body())


def test_after_the_loss_of_its_count_a_new_use_is_later_than_all_before(valkey: str, valkey_server: ValkeyServer) -> None:
    async def body() -> None:
        tier = open_tier(valkey, 4 * (500 + ENTRY_OVERHEAD))
        await tier.put_many({make_key(name): make_entry(500) for name in range(4)})
        valkey_server.command("DEL", key_of("state"))
        for name in (4, 5):
            await tier.put_many({make_key(name): make_entry(500)})
        assert set(await tier.keys()) == {make_key(name) for name in (2, 3, 4, 5)}
        await tier.aclose()

    run(body())


# -- erasures ----------------------------------------------------------------------------------------------------------


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENT_S):
        while not condition():  # noqa: ASYNC110  # what is waited for happens in another process
            await asyncio.sleep(0.005)


def test_a_process_hears_of_an_erasure_without_asking_for_anything(valkey: str) -> None:
    async def body() -> None:
        here, there = open_tier(valkey), open_tier(valkey)
        await here.put_many({make_key(1): make_entry()})
        assert make_key(1) in await there.get_many([make_key(1)])
        before = there.epoch()
        await here.forget(Scope(tenant=Tenant("a")))
        await until(lambda: there.epoch() != before)
        for tier in (here, there):
            await tier.aclose()

    run(body())


def test_the_first_answer_of_a_server_changes_no_epoch_unless_something_was_erased_since_we_began(valkey: str) -> None:
    async def body() -> None:
        clock = SystemClock()
        other = open_tier(valkey)
        await other.forget(EVERYTHING)
        # Its clock stands still: the time that a reply takes does not make it look older than the erasure.
        later = ValkeyTier(ValkeyOptions(valkey), clock=ManualClock())
        before = later.epoch()
        assert await later.put_many({make_key(1): make_entry()}, epoch=before) == {make_key(1)}
        assert later.epoch() == before

        early = ValkeyTier(ValkeyOptions(valkey), clock=clock)
        before = early.epoch()
        await other.forget(EVERYTHING)
        assert await early.put_many({make_key(1): make_entry()}, epoch=before) == frozenset()
        assert early.epoch() != before
        for tier in (other, early, later):
            await tier.aclose()

    run(body())


def test_erasures_are_told_to_whoever_was_away_and_everything_once_it_is_too_long_ago(
    valkey: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "ERASE", scripts.ERASE.replace(str(scripts.LOG_LENGTH), "4"))

    async def body() -> None:
        tier = open_tier(valkey)
        assert await tier.erasures(0) == (0, ())
        await tier.forget(Scope(tenant=Tenant("a")))
        first, told = await tier.erasures(0)
        assert set(told) == {Erasure(Scope(tenant=Tenant("a")))}
        await tier.delete_many([make_key(1)])
        second, told = await tier.erasures(first)
        assert set(told) == {Erasure(keys=(make_key(1),))}
        assert await tier.erasures(second) == (second, ())
        await tier.forget(Scope(tag="x"))
        assert set((await tier.erasures(second))[1]) == {Erasure(Scope(tag="x"))}
        assert set((await tier.erasures(0))[1]) == {Erasure(EVERYTHING)}
        await tier.aclose()

    run(body())


def test_a_restart_of_the_server_does_not_bring_an_old_epoch_back() -> None:
    async def body() -> None:
        with ValkeyServer() as server:
            tier = open_tier(server.url)
            await tier.forget(EVERYTHING)
            epoch = tier.epoch()
            server.kill()
            server.start()
            await tier.put_many({make_key(1): make_entry()})
            assert tier.epoch() == epoch
            await tier.forget(EVERYTHING)
            assert tier.epoch() > epoch
            await tier.aclose()

    run(body())


# -- a server in trouble -----------------------------------------------------------------------------------------------


class Wire:
    """A connection to the server that a test can cut: bytes then stop on the way, and nobody is told."""

    def __init__(self, server: ValkeyServer, context: ssl.SSLContext | None = None) -> None:
        self._server = server
        self._context = context
        self._open = asyncio.Event()
        self._open.set()
        self.port = 0

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Wire]:
        self._tasks: set[asyncio.Task[None]] = set()
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, far_writer))
                group.create_task(self._carry(far_reader, writer))
        except* OSError:
            pass
        finally:
            writer.close()
            far_writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        writer.close()


@pytest.mark.parametrize("trouble", ["killed", "frozen", "cut off"])
def test_a_store_goes_on_without_a_server_in_trouble_and_uses_it_again_afterwards(trouble: str) -> None:
    async def body() -> None:
        with ValkeyServer() as server:
            async with Wire(server).laid() as wire:
                events: list[Event] = []
                clock = ManualClock()
                options = ValkeyOptions(f"redis://127.0.0.1:{wire.port}", timeout_s=0.3, connect_timeout_s=0.3, poll_s=0.02)
                tier = ValkeyTier(options, clock=clock)
                store = Store([RamTier(RamOptions(2000), policy=LRU(), clock=clock), tier], clock=clock, emit=events.append)
                assert store.put(make_key(1), b"first", tenant=Tenant("a"))
                await store.flush()
                assert make_key(1) in await tier.get_many([make_key(1)])
                begin = {"killed": server.kill, "frozen": server.stop, "cut off": wire.cut}[trouble]
                end = {"killed": server.start, "frozen": server.go_on, "cut off": wire.mend}[trouble]

                begin()
                assert await store.get(make_key(2)) is None
                assert any(isinstance(event, Failed) and event.operation == "get" for event in events)
                assert store.put(make_key(3), b"meanwhile", tenant=Tenant("a"))
                assert (await store.get(make_key(3))) is not None
                await store.flush()
                receipt = await store.forget(Scope(tenant=Tenant("b")))
                assert receipt.failed == ("valkey",)
                assert not receipt.complete

                end()
                clock.advance(60)  # the store has left it alone for long enough
                assert store.put(make_key(4), b"again", tenant=Tenant("a"))
                await store.flush()

                async def stored() -> bool:
                    try:
                        return make_key(4) in await tier.get_many([make_key(4)])
                    except TierFailed:
                        return False

                async with asyncio.timeout(PATIENT_S):
                    while not await stored():
                        clock.advance(60)
                        store.put(make_key(4), b"again", tenant=Tenant("a"))
                        await store.flush()
                assert (await store.forget(Scope(tenant=Tenant("b")))).complete
                first = await store.get(make_key(1))
                assert first is None or first.value == b"first"
                await store.aclose()

    run(body())


def test_a_slow_server_costs_a_request_no_more_than_the_store_waits() -> None:
    async def body() -> None:
        with ValkeyServer() as server:
            clock = ManualClock()
            tier = open_tier(server.url)
            store = Store([tier], clock=clock, options=StoreOptions(lookup_timeout_s=0.05))
            await tier.put_many({make_key(1): make_entry()})
            server.command("CLIENT", "PAUSE", "600000", "ALL")
            began = asyncio.get_running_loop().time()
            assert await store.get(make_key(1)) is None
            assert asyncio.get_running_loop().time() - began < PATIENT_S / 2
            assert await store.get(make_key(1)) is None  # at rest
            server.kill()
            await store.aclose()

    run(body())


def test_giving_up_on_a_read_leaves_no_reply_behind_for_the_next_one(valkey: str, valkey_server: ValkeyServer) -> None:
    async def body() -> None:
        tier = open_tier(valkey, max_connections=1)
        entries = {make_key(name): make_entry(100 + name) for name in range(20)}
        await tier.put_many(entries)
        for name in range(20):
            reading = asyncio.ensure_future(tier.get_many([make_key(name)]))
            for _ in range(name % 7):
                await asyncio.sleep(0)
            reading.cancel()
            other = (name + 1) % 20
            assert await tier.get_many([make_key(other)]) == {make_key(other): entries[make_key(other)]}
        await tier.aclose()

    run(body())


# -- ways to reach it --------------------------------------------------------------------------------------------------


async def works(url: str, **options: Any) -> None:
    tier = open_tier(url, **options)
    await tier.put_many({make_key(1): LARGE})
    assert await tier.get_many([make_key(1)]) == {make_key(1): LARGE}
    await tier.aclose()


def test_it_is_reached_over_a_unix_socket_and_in_a_numbered_database(valkey: str, valkey_server: ValkeyServer) -> None:
    run(works(valkey_server.unix_url))
    run(works(valkey.replace("/0", "/3")))
    assert number(valkey_server.command("DBSIZE")) > 0


def test_in_a_cluster_a_bucket_is_found_again_where_it_has_moved_and_missed_where_its_node_is_gone() -> None:
    async def body() -> None:
        with valkey_cluster() as nodes:
            tier = open_tier(nodes[0].url.replace("redis://", "redis+cluster://"))
            entries = {make_key(name): make_entry() for name in range(64)}
            assert await tier.put_many(entries) == frozenset(entries)
            assert await tier.get_many(entries) == entries
            moved = key_slot(b"05")
            [home] = [node for node in nodes if node.command("CLUSTER", "COUNTKEYSINSLOT", str(moved)) != b":0\r\n"]
            away = nodes[(nodes.index(home) + 1) % 3]
            for node in nodes:
                node.command("FLUSHALL")
            name = away.command("CLUSTER", "MYID").split(b"\r\n")[1]
            for node in (away, home, nodes[(nodes.index(home) + 2) % 3]):
                node.command("CLUSTER", "SETSLOT", str(moved), "NODE", name)
            assert await tier.put_many(entries) == frozenset(entries)
            assert away.command("CLUSTER", "COUNTKEYSINSLOT", str(moved)) != b":0\r\n"
            assert await tier.get_many(entries) == entries
            home.kill()
            with pytest.raises(TierFailed):
                await tier.get_many(entries)
            await tier.aclose()

    run(body())


def test_prefixes_keep_apart_what_shares_a_server(valkey: str) -> None:
    async def body() -> None:
        one, other = open_tier(valkey, prefix="one:"), open_tier(valkey, prefix="other:")
        await one.put_many({make_key(1): make_entry()})
        assert await other.get_many([make_key(1)]) == {}
        assert await other.forget(EVERYTHING) == 0
        assert await one.forget(EVERYTHING) == 1
        await one.aclose()
        await other.aclose()

    run(body())


def test_a_password_is_needed_where_there_is_one_and_no_message_tells_it() -> None:
    async def body() -> None:
        with ValkeyServer(password="s3cret-word") as server:
            await works(server.url)
            tier = open_tier(server.url.replace("s3cret-word", "wr0ng-word"))
            with pytest.raises(TierFailed) as failure:
                await tier.get_many([make_key(1)])
            assert "word" not in str(failure.value).replace("password", "")
            await tier.aclose()

    run(body())


@pytest.mark.parametrize(
    "url", ["http://u:hidden@host", "host:6379", "redis://u:hidden@host:port", "redis+cluster://u:hidden@host/1"]
)
def test_an_address_that_cannot_be_used_is_said_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as failure:
        ValkeyTier(ValkeyOptions(url), clock=ManualClock())
    assert "hidden" not in str(failure.value)


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, secret = folder / "certificate.pem", folder / "key.pem"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, secret


def test_it_is_reached_over_tls_and_only_with_a_certificate_that_is_trusted(
    valkey: str, valkey_server: ValkeyServer, tmp_path: Path
) -> None:
    pem, secret = certificate(tmp_path)

    async def body() -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(pem, secret)
        async with Wire(valkey_server, context).laid() as wire:
            url = f"rediss://127.0.0.1:{wire.port}"
            await works(url, ca_file=str(pem))
            stranger = open_tier(url)
            with pytest.raises(TierFailed, match=r"(?i)certificate"):
                await stranger.get_many([make_key(1)])
            await stranger.aclose()

    run(body())
