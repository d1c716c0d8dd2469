"""Texts are computed once: over a real store, with an encoder that counts."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anaphora.clock import Clock, ManualClock
from anaphora.errors import BackendFailed, NotCached
from anaphora.levels.embedding import Embedded, EmbeddingLevel, EmbeddingOptions, Encoded, Space, Storage
from anaphora.levels.embedding.rows import read
from anaphora.policies.lru import LRU
from anaphora.store import Store
from anaphora.tiers.base import Tier
from anaphora.tiers.disk import DiskOptions, DiskTier
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import CacheControl, Scope, Tenant

MANN = Space(Tenant("mann"), "m", "f")
DIMENSIONS = 8


class Counting:
    """Computes vectors that depend on the text alone, and remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.hold: asyncio.Event | None = None
        self.asked = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, texts: list[str]) -> Encoded:
        self.batches.append(texts)
        self.asked.set()
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        return Encoded(np.stack([vector(text) for text in texts]), [len(text) for text in texts])


def vector(text: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    numbers = np.frombuffer(hashlib.sha256(text.encode()).digest()[:DIMENSIONS], np.int8).astype(np.float32)
    return numbers / np.linalg.norm(numbers)


def make(
    clock: Clock,
    *,
    storage: Storage = "float16",
    disk: Path | None = None,
    disk_bytes: int = 1 << 20,
    ttl_s: float | None = None,
    disk_from_s: float = 0.0,
    recent_bytes: int = 1 << 20,
) -> EmbeddingLevel:
    tiers: list[Tier] = [RamTier(RamOptions(1 << 20), policy=LRU(), clock=clock)]
    if disk is not None:
        tiers.append(DiskTier(DiskOptions(str(disk), disk_bytes), clock=clock))
    first = tiers[0]
    assert isinstance(first, RamTier)
    options = EmbeddingOptions(storage, ttl_s, disk_from_s, recent_bytes)
    return EmbeddingLevel(options, store=Store(tiers, clock=clock), memory=first, clock=clock)


def run(body: Callable[[EmbeddingLevel, Counting, ManualClock], Awaitable[None]], **how: object) -> None:
    async def main() -> None:
        clock = ManualClock()
        level = make(clock, **how)  # type: ignore[arg-type]
        try:
            await body(level, Counting(), clock)
        finally:
            await level.aclose()

    asyncio.run(main())


def origins(found: Embedded) -> tuple[int, int, int]:
    return found.num_hits, found.num_computed, found.num_shared


def test_of_a_hundred_texts_with_ninety_known_ten_are_computed() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        texts = [f"text {number}" for number in range(100)]
        await level.embed(texts[:90], space=MANN, compute=compute)
        found = await level.embed(texts[::-1], space=MANN, compute=compute)
        assert origins(found) == (90, 10, 0)
        assert compute.batches[1:] == [texts[:89:-1]]
        assert np.allclose(found.vectors, [vector(text) for text in texts[::-1]], atol=1e-3)
        assert found.num_tokens == [len(text) for text in texts[::-1]]
        assert found.computed_tokens == sum(map(len, texts[90:]))

    run(body)


def test_a_text_that_comes_twice_in_a_batch_is_computed_once() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        found = await level.embed(["a", "b", "a", "a"], space=MANN, compute=compute)
        assert compute.batches == [["a", "b"]]
        assert origins(found) == (0, 2, 2)
        assert np.array_equal(found.vectors[0], found.vectors[2])

    run(body)


def test_no_text_is_no_vector() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        found = await level.embed([], space=MANN, compute=compute)
        assert (len(found.vectors), compute.batches) == (0, [])

    run(body)


def test_requests_at_the_same_time_compute_a_text_once() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        compute.hold = asyncio.Event()
        one = asyncio.create_task(level.embed(["a", "b"], space=MANN, compute=compute))
        await compute.asked.wait()
        compute.asked.clear()
        two = asyncio.create_task(level.embed(["b", "c"], space=MANN, compute=compute))
        await compute.asked.wait()
        compute.hold.set()
        assert origins(await one) == (0, 2, 0)
        assert origins(await two) == (0, 1, 1)
        assert compute.batches == [["a", "b"], ["c"]]

    run(body)


def test_who_leaves_ends_nothing_that_another_is_waiting_for() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        compute.hold = asyncio.Event()
        one = asyncio.create_task(level.embed(["a"], space=MANN, compute=compute))
        await compute.asked.wait()
        two = asyncio.create_task(level.embed(["a"], space=MANN, compute=compute))
        await asyncio.sleep(0)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        compute.hold.set()
        assert origins(await two) == (0, 0, 1)

    run(body)


def test_where_a_shared_computation_fails_the_others_compute_for_themselves() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        compute.hold = asyncio.Event()
        compute.error = BackendFailed("no")
        one = asyncio.create_task(level.embed(["bad", "a"], space=MANN, compute=compute))
        await compute.asked.wait()
        others = Counting()
        two = asyncio.create_task(level.embed(["a"], space=MANN, compute=others))
        await asyncio.sleep(0)
        compute.hold.set()
        with pytest.raises(BackendFailed, match="no"):
            await one
        assert origins(await two) == (0, 1, 0)
        assert others.batches == [["a"]]

    run(body)


def test_what_failed_is_not_remembered() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        compute.error = BackendFailed("no")
        with pytest.raises(BackendFailed):
            await level.embed(["a"], space=MANN, compute=compute)
        compute.error = None
        assert origins(await level.embed(["a"], space=MANN, compute=compute)) == (0, 1, 0)

    run(body)


def test_fewer_vectors_than_texts_are_an_error_and_none_is_remembered() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        async def short(texts: list[str]) -> Encoded:
            return await compute(texts[1:])

        with pytest.raises(BackendFailed, match="2 texts, and 1"):
            await level.embed(["a", "b"], space=MANN, compute=short)
        assert origins(await level.embed(["b"], space=MANN, compute=compute)) == (0, 1, 0)

    run(body)


@pytest.mark.parametrize(
    "other",
    [
        Space(Tenant("other"), "m", "f"),
        Space(Tenant("mann"), "n", "f"),
        Space(Tenant("mann"), "m", "g"),
        Space(Tenant("mann"), "m", "f", dimensions=4),
        Space(Tenant("mann"), "m", "f", kind="query"),
        Space(Tenant("mann"), "m", "f", normalised=False),
    ],
)
def test_texts_of_two_spaces_never_meet(other: Space) -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        compute.hold = asyncio.Event()
        one = asyncio.create_task(level.embed(["a"], space=MANN, compute=compute))
        two = asyncio.create_task(level.embed(["a"], space=other, compute=compute))
        await compute.asked.wait()
        compute.hold.set()
        assert origins(await one) == origins(await two) == (0, 1, 0)
        assert origins(await level.embed(["a"], space=MANN, compute=compute)) == (1, 0, 0)

    run(body)


@pytest.mark.parametrize(("storage", "error"), [("float16", 5e-4), ("int8", 4.1e-3), ("float32", 0.0)])
def test_a_vector_is_the_same_bit_for_bit_whether_it_was_computed_or_remembered(storage: Storage, error: float) -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        computed = await level.embed(["a", "b"], space=MANN, compute=compute)
        remembered = await level.embed(["b", "a"], space=MANN, compute=compute)
        private = await level.embed(["a", "b"], space=MANN, compute=compute, control=CacheControl(no_store=True, no_cache=True))
        assert np.array_equal(computed.vectors, remembered.vectors[::-1])
        assert np.array_equal(computed.vectors, private.vectors)
        assert np.abs(computed.vectors - [vector("a"), vector("b")]).max() <= error

    run(body, storage=storage)


def test_every_number_that_half_a_float_can_be_is_given_back_as_it_was() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    row = halves[np.isfinite(halves)].astype(np.float32)

    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        async def all_of_them(texts: list[str]) -> Encoded:
            return Encoded(row[None], [1])

        found = await level.embed(["a"], space=MANN, compute=all_of_them)
        assert found.vectors.tobytes() == row.tobytes()

    run(body)


def test_numbers_too_large_for_half_a_float_are_kept_whole() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        async def large(texts: list[str]) -> Encoded:
            return Encoded(np.array([[1e9, 1.0], [0.5, 0.25]], np.float32), [1, 1])

        found = await level.embed(["a", "b"], space=MANN, compute=large)
        assert found.vectors.tolist() == [[1e9, 1.0], [0.5, 0.25]]

    run(body)


def test_no_cache_computes_again_and_replaces() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        await level.embed(["a"], space=MANN, compute=compute)
        found = await level.embed(["a"], space=MANN, compute=compute, control=CacheControl(no_cache=True))
        assert origins(found) == (0, 1, 0)
        clock.advance(5)
        assert (await level.embed(["a"], space=MANN, compute=compute)).age_s == 5

    run(body)


def test_no_store_leaves_nothing() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        await level.embed(["a"], space=MANN, compute=compute, control=CacheControl(no_store=True))
        assert origins(await level.embed(["a"], space=MANN, compute=compute)) == (0, 1, 0)

    run(body)


def test_only_if_cached_computes_nothing() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        await level.embed(["a"], space=MANN, compute=compute)
        wish = CacheControl(only_if_cached=True)
        with pytest.raises(NotCached):
            await level.embed(["a", "b"], space=MANN, compute=compute, control=wish)
        assert origins(await level.embed(["a"], space=MANN, compute=compute, control=wish)) == (1, 0, 0)
        assert compute.batches == [["a"]]

    run(body)


def test_what_is_older_than_max_age_is_computed_again() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        await level.embed(["a"], space=MANN, compute=compute)
        clock.advance(10)
        await level.embed(["b"], space=MANN, compute=compute)
        found = await level.embed(["a", "b"], space=MANN, compute=compute, control=CacheControl(max_age_s=9))
        assert (origins(found), compute.batches[-1]) == ((1, 1, 0), ["a"])

    run(body)


def test_it_says_how_long_the_first_of_them_still_lives() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        await level.embed(["a"], space=MANN, compute=compute)
        clock.advance(10)
        await level.embed(["b"], space=MANN, compute=compute)
        found = await level.embed(["a", "b"], space=MANN, compute=compute)
        assert (found.ttl_s, found.age_s) == (20, 10)
        clock.advance(20)
        assert origins(await level.embed(["a", "b"], space=MANN, compute=compute)) == (1, 1, 0)

    run(body, ttl_s=30)


@pytest.mark.parametrize("scope", [Scope(tenant=Tenant("mann")), Scope(model="m"), Scope()])
def test_forgetting_erases_what_is_remembered_and_what_is_being_computed(scope: Scope, tmp_path: Path) -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        await level.embed(["a"], space=MANN, compute=compute)
        compute.hold = asyncio.Event()
        compute.asked.clear()
        one = asyncio.create_task(level.embed(["b"], space=MANN, compute=compute))
        await compute.asked.wait()
        await level.flush()
        receipt = await level.forget(scope)
        assert receipt.removed == {"ram": 1, "disk": 1}
        assert receipt.complete
        late = asyncio.create_task(level.embed(["b"], space=MANN, compute=compute))  # who asks now gets nothing from before
        await asyncio.sleep(0)
        compute.hold.set()
        assert origins(await one) == origins(await late) == (0, 1, 0)
        assert origins(await level.embed(["a"], space=MANN, compute=compute)) == (0, 1, 0)
        assert compute.batches == [["a"], ["b"], ["b"], ["a"]]

    run(body, disk=tmp_path)


def test_what_is_forgotten_of_another_tenant_or_model_stays_known() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        await level.embed(["a"], space=MANN, compute=compute)
        await level.forget(Scope(tenant=Tenant("other")))
        await level.forget(Scope(model="other"))
        assert origins(await level.embed(["a"], space=MANN, compute=compute)) == (1, 0, 0)

    run(body)


def test_vectors_outlive_the_process(tmp_path: Path) -> None:
    async def main() -> None:
        compute = Counting()
        clock = ManualClock()
        for expected in [(0, 2, 0), (2, 0, 0)]:
            level = make(clock, disk=tmp_path)
            assert origins(await level.embed(["a", "b"], space=MANN, compute=compute)) == expected
            await level.aclose()

    asyncio.run(main())


def test_what_is_asked_for_again_and_again_does_not_leave_the_disk_first(tmp_path: Path) -> None:
    async def main() -> None:
        compute = Counting()
        clock = ManualClock()
        level = make(clock, disk=tmp_path, disk_bytes=5 * 300)  # five texts fit
        for text in "abcd":
            await level.embed([text], space=MANN, compute=compute)
        await level.flush()
        for text in "efgh":
            clock.advance(1.0)
            assert origins(await level.embed(["a", text], space=MANN, compute=compute)) == (1, 1, 0)
            await level.flush()
        await level.aclose()
        level = make(clock, disk=tmp_path)
        assert origins(await level.embed(["a"], space=MANN, compute=compute)) == (1, 0, 0)
        assert origins(await level.embed(["b"], space=MANN, compute=compute)) == (0, 1, 0)
        await level.aclose()

    asyncio.run(main())


def test_a_value_of_another_version_is_computed_again() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        await level.embed(["a"], space=MANN, compute=compute)
        store = level._store
        first = store._tiers[0]
        (key,) = await first.keys(Scope())
        store.put(key, b"\xff something else", tenant=MANN.tenant, model=MANN.model)
        assert origins(await level.embed(["a"], space=MANN, compute=compute)) == (0, 1, 0)

    run(body, recent_bytes=0)


def test_a_store_that_breaks_costs_only_the_saving() -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        def broken(*args: object, **kwargs: object) -> NoReturn:
            raise RuntimeError("broken")

        level._store.get_many = broken  # type: ignore[method-assign]
        level._store.put = broken  # type: ignore[method-assign]
        for _ in range(2):
            assert origins(await level.embed(["a"], space=MANN, compute=compute)) == (0, 1, 0)

    run(body)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=8), max_size=6))
def test_each_text_is_computed_exactly_once_however_requests_overlap(requests: list[list[str]]) -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        found = await asyncio.gather(*(level.embed(texts, space=MANN, compute=compute) for texts in requests))
        computed = [text for batch in compute.batches for text in batch]
        assert sorted(computed) == sorted({text for texts in requests for text in texts})
        for texts, answer in zip(requests, found, strict=True):
            assert sum(origins(answer)) == len(texts)
            for text, row in zip(texts, answer.vectors, strict=True):
                assert np.allclose(row, vector(text), atol=1e-3)

    run(body)


def test_a_vector_that_is_computed_faster_than_the_disk_keeps_it_stays_in_memory(tmp_path: Path) -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        for texts, text_s in ((["a", "b"], 0.0009), (["c"], 0.001), (["d"], None)):  # the last costs money

            async def fast(missing: list[str], text_s: float | None = text_s) -> Encoded:
                return msgspec.structs.replace(await compute(missing), text_s=text_s)

            assert origins(await level.embed(texts, space=MANN, compute=fast)) == (0, len(texts), 0)
        await level.flush()
        stats = await level.stats()
        assert (stats["ram"].num_entries, stats["disk"].num_entries) == (4, 2)
        assert origins(await level.embed(["d", "b", "c", "a"], space=MANN, compute=compute)) == (4, 0, 0)
        receipt = await level.forget(Scope(tenant=MANN.tenant))
        assert (receipt.removed, receipt.complete) == ({"ram": 4, "disk": 2}, True)
        assert origins(await level.embed(["a", "c"], space=MANN, compute=compute)) == (0, 2, 0)

    run(body, disk=tmp_path, disk_from_s=0.001)


def test_what_another_process_forgets_is_not_known_here_either_wherever_it_was_kept(tmp_path: Path) -> None:
    async def main() -> None:
        compute, clock = Counting(), ManualClock()

        async def fast(texts: list[str]) -> Encoded:
            return msgspec.structs.replace(await compute(texts), text_s=0.0)

        here, there = (make(clock, disk=tmp_path, disk_from_s=0.001) for _ in range(2))
        await here.embed(["a"], space=MANN, compute=compute)
        await here.embed(["b"], space=MANN, compute=fast)
        await here.flush()
        assert origins(await here.embed(["a", "b"], space=MANN, compute=compute)) == (2, 0, 0)
        assert (await there.forget(Scope(tenant=MANN.tenant))).complete
        assert origins(await here.embed(["a", "b"], space=MANN, compute=compute)) == (0, 2, 0)
        await here.aclose()
        await there.aclose()

    asyncio.run(main())


def test_memory_evicts_by_what_was_used_also_where_it_was_not_asked(tmp_path: Path) -> None:
    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        first = level._store._tiers[0]
        for text in "abc":
            await level.embed([text], space=MANN, compute=compute)
        await level.embed(["b"], space=MANN, compute=compute)
        await level.embed(["a"], space=MANN, compute=compute)
        await level.embed(["d"], space=MANN, compute=compute)  # the store hears of uses before it takes it
        assert isinstance(first, RamTier)
        order = [first._entries[key].value for key in first._policy.victims()]
        expected = [(await level.embed([text], space=MANN, compute=compute)).vectors for text in "cbad"]
        assert [read([row])[0].tolist() for row in order] == [some.tolist() for some in expected]

    run(body)


STEPS: st.SearchStrategy[tuple[str, str, list[str]]] = st.one_of(
    st.tuples(st.just("embed"), st.sampled_from(["mann", "other"]), st.lists(st.sampled_from("abcd"), max_size=5)),
    st.tuples(st.just("fast"), st.sampled_from(["mann", "other"]), st.lists(st.sampled_from("abcd"), max_size=5)),
    st.tuples(st.just("forget"), st.sampled_from(["mann", "other"]), st.just([])),
    st.tuples(st.just("drop"), st.sampled_from(["mann", "other"]), st.just([])),
    st.tuples(st.just("wait"), st.just(""), st.just([])),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(STEPS, max_size=25), st.sampled_from([0, 1500, 1 << 20]))
def test_whatever_happens_a_text_is_known_exactly_as_long_as_it_is_remembered(
    steps: list[tuple[str, str, list[str]]], recent_bytes: int
) -> None:
    """The same history with and without a copy of what was asked for lately, and by hand."""

    async def body(level: EmbeddingLevel, compute: Counting, clock: ManualClock) -> None:
        alive: dict[tuple[str, str], float] = {}
        for step, tenant, texts in steps:
            scope = Scope(tenant=Tenant(tenant))
            if step == "wait":
                clock.advance(4)
                alive = {place: until_s for place, until_s in alive.items() if until_s > clock.now_s()}
            elif step in ("forget", "drop"):
                if step == "forget":
                    await level.forget(scope)
                else:
                    level.drop(scope)
                alive = {place: until_s for place, until_s in alive.items() if place[0] != tenant}
            else:

                async def computed(missing: list[str], step: str = step) -> Encoded:
                    return msgspec.structs.replace(await compute(missing), text_s=0.0 if step == "fast" else None)

                compute.batches.clear()
                found = await level.embed(texts, space=Space(Tenant(tenant), "m", "f"), compute=computed)
                new = [text for text in dict.fromkeys(texts) if (tenant, text) not in alive]
                assert compute.batches == ([new] if new else [])
                assert origins(found) == (len(set(texts)) - len(new), len(new), len(texts) - len(set(texts)))
                for text, row in zip(texts, found.vectors, strict=True):
                    assert np.allclose(row, vector(text), atol=1e-3)
                alive |= dict.fromkeys([(tenant, text) for text in new], clock.now_s() + 10)

    run(body, ttl_s=10, disk_from_s=0.001, recent_bytes=recent_bytes)
