from pathlib import Path

import pytest

from anaphora.clock import Clock
from anaphora.policies.gdsf import GDSF
from anaphora.policies.lru import LRU
from anaphora.testing.tiers import TierContract
from anaphora.tiers.base import Tier
from anaphora.tiers.disk import DiskOptions, DiskTier
from anaphora.tiers.ram import RamOptions, RamTier


class TestRamByLru(TierContract):
    def make(self, *, capacity_bytes: int, clock: Clock) -> Tier:
        return RamTier(RamOptions(capacity_bytes), policy=LRU(), clock=clock)


class TestRamByGdsf(TierContract):
    def make(self, *, capacity_bytes: int, clock: Clock) -> Tier:
        return RamTier(RamOptions(capacity_bytes), policy=GDSF(), clock=clock)


class TestDisk(TierContract):
    inline_bytes = 16 << 10

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make(self, *, capacity_bytes: int, clock: Clock) -> Tier:
        return DiskTier(DiskOptions(str(self.folder), capacity_bytes, inline_bytes=self.inline_bytes), clock=clock)


class TestDiskWithEveryValueInAFile(TestDisk):
    inline_bytes = 0


class TestDiskWithSomeValuesInFiles(TestDisk):
    inline_bytes = 1000


class TestDiskWithFsync(TestDisk):
    def make(self, *, capacity_bytes: int, clock: Clock) -> Tier:
        return DiskTier(DiskOptions(str(self.folder), capacity_bytes, inline_bytes=1000, fsync=True), clock=clock)
