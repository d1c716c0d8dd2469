from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from anaphora.clock import ManualClock
from anaphora.events import Event, Forgotten, Hit, Miss, MissReason, Refused, RefusedReason, Stored
from anaphora.keys import request_key
from anaphora.levels.exact import ExactLevel, ExactOptions
from anaphora.memory import Memory
from anaphora.policies.lru import LRU
from anaphora.store import Store
from anaphora.testing.levels import make_answer, make_question
from anaphora.tiers.disk import DiskOptions, DiskTier
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import CacheControl, Scope

REQUEST = make_question().request
ANSWER = make_answer()
NO_WISHES = CacheControl()


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


def make_level(clock: ManualClock, folder: Path | None = None, options: ExactOptions | None = None) -> ExactLevel:
    ram = RamTier(RamOptions(), policy=LRU(), clock=clock)
    slower = [] if folder is None else [DiskTier(DiskOptions(str(folder)), clock=clock)]
    return ExactLevel(options or ExactOptions(), store=Store([ram, *slower], clock=clock), clock=clock, rng=random.Random(1))


class Weights:
    """What a model's name stands for at the moment."""

    def __init__(self, fingerprint: str | None) -> None:
        self.fingerprint = fingerprint

    def __call__(self, model: str) -> str | None:
        return self.fingerprint


def test_what_was_learned_is_recalled_and_both_are_told() -> None:
    async def body() -> None:
        events: list[Event] = []
        memory = Memory([make_level(ManualClock())], fingerprint=Weights("f"), emit=events.append)
        missed = await memory.recall(REQUEST)
        assert missed.hit is None
        assert missed.key == request_key(REQUEST, fingerprint="f")
        assert missed.misses == (Miss("exact", MissReason.ABSENT),)
        stored = await memory.learn(REQUEST, NO_WISHES, ANSWER, clean=True, key=missed.key)
        assert isinstance(stored, Stored)
        recalled = await memory.recall(REQUEST)
        assert isinstance(recalled.hit, Hit)
        assert (recalled.hit.value, recalled.hit.cost_s, recalled.misses) == (ANSWER, ANSWER.compute_s, ())
        assert events == [missed.misses[0], stored, recalled.hit]
        refused = await memory.learn(REQUEST, NO_WISHES, ANSWER, clean=False)
        assert refused == events[-1] == Refused("exact", RefusedReason.NOT_CLEAN)

    run(body())


def test_a_model_that_is_not_known_has_no_memory() -> None:
    async def body() -> None:
        memory = Memory([make_level(ManualClock())], fingerprint=Weights(None))
        recall = await memory.recall(REQUEST)
        assert (recall.key, recall.hit) == (None, None)
        assert recall.misses[0].reason is MissReason.UNKNOWN_MODEL
        learned = await memory.learn(REQUEST, NO_WISHES, ANSWER, clean=True)
        assert learned == Refused("memory", RefusedReason.UNKNOWN_MODEL)

    run(body())


def test_an_answer_belongs_to_the_weights_it_was_asked_of() -> None:
    async def body() -> None:
        weights = Weights("old")
        memory = Memory([make_level(ManualClock())], fingerprint=weights)
        asked = await memory.recall(REQUEST)
        weights.fingerprint = "new"
        await memory.learn(REQUEST, NO_WISHES, ANSWER, clean=True, key=asked.key)
        assert (await memory.recall(REQUEST)).hit is None
        weights.fingerprint = "old"
        assert (await memory.recall(REQUEST)).hit is not None

    run(body())


def test_a_memory_without_levels_gives_a_key_and_nothing_else() -> None:
    async def body() -> None:
        memory = Memory([], fingerprint=Weights("f"))
        recall = await memory.recall(REQUEST)
        assert recall.key is not None
        assert recall.hit is None
        assert await memory.learn(REQUEST, NO_WISHES, ANSWER, clean=True) == Refused("memory", RefusedReason.NO_LEVEL)
        assert await memory.forget(Scope()) == ()

    run(body())


def test_levels_are_asked_in_order_and_all_of_them_learn_and_forget() -> None:
    async def body() -> None:
        clock = ManualClock()
        picky = make_level(clock, options=ExactOptions(max_value_bytes=1))
        memory = Memory([picky, make_level(clock)], fingerprint=Weights("f"))
        assert isinstance(await memory.learn(REQUEST, NO_WISHES, ANSWER, clean=True), Stored)
        recall = await memory.recall(REQUEST)
        assert recall.misses == (Miss("exact", MissReason.ABSENT),)
        assert recall.hit is not None
        receipts = await memory.forget(Scope(tenant=REQUEST.tenant))
        assert [receipt.removed for receipt in receipts] == [{"ram": 0}, {"ram": 1}]
        assert all(isinstance(receipt, Forgotten) and receipt.complete for receipt in receipts)
        assert (await memory.recall(REQUEST)).hit is None

    run(body())


def test_answers_survive_a_restart(tmp_path: Path) -> None:
    async def body() -> None:
        clock = ManualClock()
        memory = Memory([make_level(clock, tmp_path)], fingerprint=Weights("f"))
        await memory.learn(REQUEST, NO_WISHES, ANSWER, clean=True)
        await memory.flush()
        assert (await memory.stats())["exact"]["disk"].num_entries == 1
        await memory.aclose()
        clock.advance(100)
        memory = Memory([make_level(clock, tmp_path)], fingerprint=Weights("f"))
        hit = (await memory.recall(REQUEST)).hit
        assert hit is not None
        assert (hit.value, hit.age_s) == (ANSWER, 100)
        await memory.aclose()

    run(body())


def test_a_hit_in_memory_never_suspends(tmp_path: Path) -> None:
    async def body() -> None:
        memory = Memory([make_level(ManualClock(), tmp_path)], fingerprint=Weights("f"))
        await memory.learn(REQUEST, NO_WISHES, ANSWER, clean=True)
        recalling = memory.recall(REQUEST)
        with pytest.raises(StopIteration) as done:  # it comes to its end at the first step
            recalling.send(None)
        assert done.value.value.hit.value == ANSWER
        await memory.aclose()

    run(body())
