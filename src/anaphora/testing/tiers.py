"""What every storage tier owes the store, as tests to inherit.

class TestMyTier(TierContract):
    def make(self, *, capacity_bytes: int, eviction: Eviction, clock: Clock) -> Tier:
        return MyTier(..., clock=clock)
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
import pytest

from anaphora.clock import Clock, ManualClock
from anaphora.keys import digest
from anaphora.policies.base import Policy
from anaphora.policies.gdsf import GDSF
from anaphora.policies.lru import LRU
from anaphora.tiers.base import ENTRY_OVERHEAD, EVERYTHING, Entry, Eviction, Tier
from anaphora.types import Key, Scope, Tenant


def make_key(name: object) -> Key:
    return Key(digest((b"testing", str(name).encode())))


def make_entry(size: int = 100, *, fill: bytes = b"x", expires_at_s: float | None = None, tenant: str = "a") -> Entry:
    """An entry that counts `size` bytes more than an empty one."""
    return Entry((fill * size)[:size], 1.0, expires_at_s, 0.5, Tenant(tenant), "model", ("tag", f"of-{tenant}"))


class TierContract:
    """Inherit, and say how an empty tier is made."""

    capacity_bytes = 10_000

    def make(self, *, capacity_bytes: int, eviction: Eviction, clock: Clock) -> Tier:
        raise NotImplementedError

    def run(self, body: Callable[[Tier, ManualClock], Awaitable[None]], eviction: Eviction | None = None) -> None:
        """`body` with an empty tier, on an event loop of its own."""

        async def main() -> None:
            clock = ManualClock()
            tier = self.make(capacity_bytes=self.capacity_bytes, eviction=eviction or Eviction(), clock=clock)
            try:
                await body(tier, clock)
            finally:
                await tier.aclose()

        asyncio.run(main())

    def test_what_was_put_is_found_with_all_its_metadata(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            entries = {
                make_key(1): Entry(b"", 5.0),
                make_key(2): Entry(b"\x00\xff" * 50, 1.5, clock.now_s() + 9, 0.25, Tenant("ü"), "m/x", ("a b", "")),
            }
            assert await tier.put_many(entries) == frozenset(entries)
            assert await tier.get_many([*entries, make_key(3)]) == entries

        self.run(body)

    def test_sizes_tell_what_is_there_and_are_no_use_of_it(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            size = self.capacity_bytes // 4 - ENTRY_OVERHEAD
            await tier.put_many({make_key(number): make_entry(size) for number in range(3)})
            await tier.put_many({make_key(3): make_entry(10, expires_at_s=clock.now_s() + 1)})
            clock.advance(1)
            asked = [make_key(number) for number in range(5)]
            assert await tier.sizes(asked) == {make_key(number): size + ENTRY_OVERHEAD for number in range(3)}
            assert await tier.sizes([]) == {}
            await tier.put_many({make_key(4): make_entry(size), make_key(5): make_entry(size)})
            assert make_key(0) not in await tier.keys()

        self.run(body)

    def test_a_put_replaces_what_was_there(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            await tier.put_many({make_key(1): make_entry(2000)})
            await tier.put_many({make_key(1): make_entry(10)})
            assert await tier.get_many([make_key(1)]) == {make_key(1): make_entry(10)}
            stats = await tier.stats()
            assert (stats.num_entries, stats.used_bytes) == (1, 10 + ENTRY_OVERHEAD)

        self.run(body)

    def test_an_entry_larger_than_the_tier_is_not_stored_and_hides_nothing_older(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            await tier.put_many({make_key(1): make_entry(10), make_key(2): make_entry(10)})
            assert await tier.put_many({make_key(1): make_entry(self.capacity_bytes)}) == frozenset()
            assert await tier.get_many([make_key(1), make_key(2)]) == {make_key(2): make_entry(10)}

        self.run(body)

    def test_the_capacity_is_never_passed_and_used_bytes_are_the_sum_of_sizes(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            assert tier.capacity_bytes == self.capacity_bytes
            for number in range(40):
                await tier.put_many({make_key(number): make_entry(number * 97 % 3000)})
                stats = await tier.stats()
                left = await tier.get_many(await tier.keys())
                assert stats.used_bytes == sum(entry.size for entry in left.values()) <= self.capacity_bytes
                assert stats.num_entries == len(left)
            assert stats.num_evicted == 40 - stats.num_entries

        self.run(body)

    def test_one_batch_larger_than_the_tier_keeps_what_it_says_it_stored(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            entries = {make_key(number): make_entry(1000) for number in range(20)}
            await tier.put_many(entries)
            stats = await tier.stats()
            assert 0 < stats.num_entries < 20
            assert stats.used_bytes <= self.capacity_bytes

        self.run(body)

    def test_an_entry_is_absent_from_the_moment_it_expires(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            key = make_key(1)
            await tier.put_many({key: make_entry(expires_at_s=clock.now_s() + 10)})
            clock.advance(9.5)
            assert key in await tier.get_many([key])
            clock.advance(0.5)
            assert await tier.get_many([key]) == {}
            assert await tier.keys() == []

        self.run(body)

    def test_what_is_put_again_after_it_expired_is_there(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            key = make_key(1)
            await tier.put_many({key: make_entry(fill=b"old", expires_at_s=clock.now_s() + 10)})
            clock.advance(10)
            await tier.put_many({key: make_entry(fill=b"new")})
            assert await tier.get_many([key]) == {key: make_entry(fill=b"new")}

        self.run(body)

    def test_delete_says_how_many_were_there(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            await tier.put_many({make_key(number): make_entry() for number in range(3)})
            assert await tier.delete_many([make_key(0), make_key(1), make_key(9)]) == 2
            assert await tier.keys() == [make_key(2)]
            assert (await tier.stats()).used_bytes == make_entry().size

        self.run(body)

    def test_forgetting_a_scope_takes_what_matches_all_its_fields_and_nothing_else(self) -> None:
        scopes = {
            Scope(): 4,
            Scope(tenant=Tenant("a")): 2,
            Scope(tenant=Tenant("nobody")): 0,
            Scope(model="model"): 3,
            Scope(tag="tag"): 3,
            Scope(tag="of-a"): 2,
            Scope(tag="of"): 0,
            Scope(tenant=Tenant("b"), tag="of-a"): 0,
            Scope(tenant=Tenant("b"), model="model", tag="of-b"): 1,
        }

        async def body(tier: Tier, clock: ManualClock) -> None:
            entries = {
                make_key(1): make_entry(tenant="a"),
                make_key(2): make_entry(tenant="a"),
                make_key(3): make_entry(tenant="b"),
                make_key(4): Entry(b"", 1.0, tenant=Tenant("c"), model="other"),
            }
            for scope, count in scopes.items():
                await tier.put_many(entries)
                matching = {key for key, entry in entries.items() if entry.within(scope)}
                assert set(await tier.keys(scope)) == matching
                assert await tier.forget(scope) == count == len(matching)
                assert await tier.keys(scope) == []
                assert set(await tier.keys()) == set(entries) - matching

        self.run(body)

    def test_what_was_used_last_outlives_what_was_not(self) -> None:
        """Whatever the policy: between entries of one size and cost, a use counts, in this tier or (`touch`) a faster one."""

        async def body(tier: Tier, clock: ManualClock) -> None:
            size = self.capacity_bytes // 4 - ENTRY_OVERHEAD
            await tier.put_many({make_key(number): make_entry(size) for number in range(4)})
            await tier.get_many([make_key(0)])
            tier.touch([make_key(1), make_key("unknown")])
            await tier.put_many({make_key(4): make_entry(size), make_key(5): make_entry(size)})
            assert set(await tier.keys()) == {make_key(number) for number in (0, 1, 4, 5)}

        self.run(body)

    def test_a_shared_tier_changes_its_epoch_at_every_erasure_and_refuses_what_was_prepared_before(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            await tier.put_many({make_key(1): make_entry()})
            before = tier.epoch()
            await tier.put_many({make_key(2): make_entry()}, epoch=before)
            assert len(await tier.keys()) == 2
            assert tier.epoch() == before
            await tier.forget(Scope(tenant=Tenant("nobody")))
            if tier.epoch() == before == 0:
                return  # not shared
            prepared = {
                make_key(3): make_entry(),
                make_key(4): msgspec.structs.replace(make_entry(), tenant=Tenant("nobody")),
            }
            assert await tier.put_many(prepared, epoch=before) == {make_key(3)}
            after = tier.epoch()
            await tier.delete_many([make_key(1)])
            assert len({before, after, tier.epoch()}) == 3
            prepared = {make_key(number): make_entry() for number in range(3)}
            assert await tier.put_many(prepared, epoch=after) == {make_key(0), make_key(2)}
            assert await tier.put_many(prepared, epoch=before) == {make_key(0), make_key(2)}
            await tier.forget(EVERYTHING)
            assert await tier.put_many(prepared, epoch=after) == frozenset()

        self.run(body)

    @pytest.mark.parametrize("order", ["lru", "gdsf"])
    @pytest.mark.parametrize("seed", range(5))
    def test_the_order_of_leaving_is_that_of_the_policy_of_this_name(self, order: Literal["lru", "gdsf"], seed: int) -> None:
        policies: dict[str, type[Policy[Key]]] = {"lru": LRU, "gdsf": GDSF}

        async def body(tier: Tier, clock: ManualClock) -> None:
            chance = random.Random(seed)
            policy = policies[order]()
            sizes: dict[Key, int] = {}
            for number in range(120):
                key = make_key(number)
                entry = msgspec.structs.replace(make_entry(chance.randrange(1500)), cost_s=chance.choice([0.01, 0.5, 2.0, 9.0]))
                while sum(sizes.values()) + entry.size > self.capacity_bytes:
                    victim = next(policy.victims())
                    policy.remove(victim)
                    del sizes[victim]
                policy.insert(key, entry.size, entry.cost_s)
                sizes[key] = entry.size
                await tier.put_many({key: entry})
                assert set(await tier.keys()) == set(sizes)
                used = chance.sample(sorted(sizes), k=min(len(sizes), chance.randrange(3)))
                tier.touch(used)
                for one in used:
                    policy.touch(one)

        self.run(body, Eviction(order))

    def test_a_tenant_beyond_its_share_makes_room_for_itself(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            size = self.capacity_bytes // 10 - ENTRY_OVERHEAD
            await tier.put_many({make_key(("b", number)): make_entry(size, tenant="b") for number in range(4)})
            await tier.put_many({make_key(("a", number)): make_entry(size, tenant="a") for number in range(9)})
            assert set(await tier.keys()) == {
                *(make_key(("b", number)) for number in range(4)),
                *(make_key(("a", number)) for number in range(4, 9)),
            }
            too_large = make_entry(self.capacity_bytes * 6 // 10, tenant="a")
            assert await tier.put_many({make_key("large"): too_large}) == frozenset()
            assert len(await tier.keys()) == 9, "nothing was evicted for what does not fit"
            await tier.put_many({make_key(("c", number)): make_entry(size, tenant="c") for number in range(3)})
            assert len(await tier.keys(Scope(tenant=Tenant("c")))) == 3
            assert len(await tier.keys(Scope(tenant=Tenant("b")))) == 2, "beyond the capacity, whoever's entry is oldest goes"

        self.run(body, Eviction(tenant_share=0.5))

    def test_what_is_kept_is_not_evicted_until_its_time_is_over(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            size = self.capacity_bytes // 10 - ENTRY_OVERHEAD
            kept = [make_key(0), make_key(1)]
            await tier.put_many({key: make_entry(size) for key in kept})
            assert await tier.keep([*kept, make_key("unknown")], clock.now_s() + 100) == 2
            assert await tier.keep(kept[:1], clock.now_s() + 10) == 1, "a shorter time changes nothing"
            assert (await tier.stats()).kept_bytes == 2 * self.capacity_bytes // 10
            clock.advance(10)
            for number in range(2, 30):
                await tier.put_many({make_key(number): make_entry(size)})
            assert set(kept) <= set(await tier.keys())
            assert len(await tier.keys()) == 10
            clock.advance(90)
            assert (await tier.stats()).kept_bytes == 0
            await tier.put_many({make_key(number): make_entry(size) for number in range(30, 32)})
            assert not set(kept) & set(await tier.keys())

        self.run(body)

    def test_keeping_can_be_ended_and_ends_with_the_entry(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            key, later = make_key(0), clock.now_s() + 100
            size = self.capacity_bytes // 10
            for end in ("told", "replaced", "deleted", "forgotten"):
                await tier.put_many({key: make_entry(size - ENTRY_OVERHEAD)})
                assert await tier.keep([key], later) == 1
                assert (await tier.stats()).kept_bytes == size
                if end == "told":
                    assert await tier.keep([key], clock.now_s()) == 0
                elif end == "replaced":
                    await tier.put_many({key: make_entry(10)})
                elif end == "deleted":
                    await tier.delete_many([key])
                else:
                    await tier.forget(Scope())
                assert (await tier.stats()).kept_bytes == 0, end
            await tier.put_many({key: make_entry(10, expires_at_s=later - 50)})
            await tier.keep([key], later)
            clock.advance(50)
            assert await tier.keys() == []
            assert (await tier.stats()).kept_bytes == 0

        self.run(body)

    def test_what_is_kept_stays_within_the_shares_and_leaves_room_for_others(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            size, later = self.capacity_bytes // 10 - ENTRY_OVERHEAD, clock.now_s() + 100
            num_kept = []
            for tenant in "abc":
                keys = [make_key((tenant, number)) for number in range(4)]
                await tier.put_many({key: make_entry(size, tenant=tenant) for key in keys})
                num_kept.append(await tier.keep(keys, later))
                assert await tier.keep(keys[:1], later + 1) == min(1, num_kept[-1]), "what is kept already may be kept longer"
            assert num_kept == [3, 3, 1]
            assert (await tier.stats()).kept_bytes == 7 * self.capacity_bytes // 10
            larger_than_what_is_left = make_entry(self.capacity_bytes * 4 // 10, tenant="d")
            before = set(await tier.keys())
            assert await tier.put_many({make_key("d"): larger_than_what_is_left}) == frozenset()
            assert set(await tier.keys()) == before
            assert await tier.put_many({make_key("e"): make_entry(size, tenant="e")}) == {make_key("e")}

        self.run(body, Eviction(keep_share=0.3))

    def test_keeping_is_no_use(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            size = self.capacity_bytes // 4 - ENTRY_OVERHEAD
            await tier.put_many({make_key(number): make_entry(size) for number in range(4)})
            await tier.keep([make_key(0)], clock.now_s() + 1)
            clock.advance(1)
            await tier.put_many({make_key(4): make_entry(size)})
            assert make_key(0) not in await tier.keys()

        self.run(body)

    def test_closing_twice_is_harmless(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            await tier.put_many({make_key(1): make_entry()})
            await tier.aclose()

        self.run(body)
