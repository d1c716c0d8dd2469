"""The cache in a program of one's own."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from anaphora.errors import BackendFailed
from anaphora.library import BlockingCache, Cache


class Model:
    """Gives a text a vector of its own, and knows what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        self.asked.append(texts)
        return np.array([[len(text), sum(map(ord, text)) % 97, 1] for text in texts], np.float32)

    async def aencode(self, texts: list[str]) -> list[list[float]]:
        await asyncio.sleep(0)
        return [list(map(float, row)) for row in self.encode(texts)]


def test_only_what_is_new_is_computed_and_nothing_twice(tmp_path: Path) -> None:
    model = Model()

    async def body() -> None:
        async with Cache(tmp_path) as cache:
            known = [f"text {number}" for number in range(90)]
            await cache.embed(known, model.encode, model="m")
            batch = [*known, *(f"new {number % 10}" for number in range(20))]
            vectors = await cache.embed(batch, model.aencode, model="m")
            assert vectors.shape == (110, 3)
            assert np.array_equal(vectors, Model().encode(batch))
        assert list(map(len, model.asked)) == [90, 10]

    asyncio.run(body())


def test_it_is_there_after_a_restart_and_in_another_process_way_of_use(tmp_path: Path) -> None:
    first, second = Model(), Model()

    async def body() -> None:
        async with Cache(tmp_path) as cache:
            await cache.embed(["a"], first.encode, model="m")

    asyncio.run(body())
    with BlockingCache(tmp_path) as cache:
        assert np.array_equal(cache.embed(["a"], second.encode, model="m"), Model().encode(["a"]))
    assert second.asked == []


@pytest.mark.parametrize("other", [{"model": "n"}, {"revision": "2"}, {"kind": "query"}])
def test_vectors_of_another_model_revision_or_kind_are_others(tmp_path: Path, other: dict[str, str]) -> None:
    model = Model()
    with BlockingCache(tmp_path) as cache:
        cache.embed(["a"], model.encode, model="m")
        cache.embed(["a"], model.encode, **{"model": "m", **other})
    assert len(model.asked) == 2


def test_tenants_share_nothing_and_forgetting_is_complete(tmp_path: Path) -> None:
    model = Model()
    with BlockingCache(tmp_path, tenant="a") as cache, BlockingCache(tmp_path, tenant="b") as other:
        cache.embed(["a"], model.encode, model="m")
        other.embed(["a"], model.encode, model="m")
        assert len(model.asked) == 2
        assert cache.forget().complete
        cache.embed(["a"], model.encode, model="m")
        other.embed(["a"], model.encode, model="m")
        assert len(model.asked) == 3


def test_what_gives_no_vector_for_each_text_is_an_error_and_not_remembered(tmp_path: Path) -> None:
    with BlockingCache(tmp_path) as cache:
        for wrong in ([[1.0, 2.0]], [1.0, 2.0], [[[1.0]], [[2.0]]]):
            with pytest.raises(BackendFailed, match="2 texts"):
                cache.embed(["a", "b"], lambda texts, wrong=wrong: wrong, model="m")  # type: ignore[misc]
        with pytest.raises(ZeroDivisionError):
            cache.embed(["a", "b"], lambda texts: 1 / 0, model="m")
        assert cache.embed(["a", "b"], Model().encode, model="m").shape == (2, 3)


def test_threads_that_ask_the_same_at_once_have_it_computed_once(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()
    model = Model()

    def slow(texts: list[str]) -> NDArray[np.float32]:
        entered.set()
        assert leave.wait(30)
        return model.encode(texts)

    with BlockingCache(tmp_path) as cache:
        found: list[NDArray[np.float32]] = []
        threads = [threading.Thread(target=lambda: found.append(cache.embed(["a"], slow, model="m"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert entered.wait(30)
        leave.set()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert model.asked == [["a"]]


def test_a_cache_that_is_not_open_says_so(tmp_path: Path) -> None:
    cache = BlockingCache(tmp_path)
    with pytest.raises(RuntimeError, match="with"):
        cache.embed(["a"], Model().encode, model="m")
    cache.close()
