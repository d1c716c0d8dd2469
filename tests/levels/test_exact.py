from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest

from anaphora.clock import Clock, ManualClock
from anaphora.config import Buckets
from anaphora.events import Hit, Miss, MissReason, Refused, RefusedReason, Stored
from anaphora.keys import request_key
from anaphora.levels.base import Question
from anaphora.levels.exact import ExactLevel, ExactOptions
from anaphora.policies.lru import LRU
from anaphora.store import Store, StoreOptions
from anaphora.testing.levels import AnswerLevelContract, make_answer, make_question
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import Choice, Completion, FinishReason, Request, Sampling, TextPart, ThinkingPart, ToolUsePart, Usage

DRAWN = Sampling(temperature=0.7)


def make_level(
    clock: Clock, options: ExactOptions | None = None, *, ttl_s: float | None = None, capacity: int = 1 << 20
) -> ExactLevel:
    ram = RamTier(RamOptions(capacity), policy=LRU(), clock=clock)
    store = Store([ram], clock=clock, options=StoreOptions(ttl_s=ttl_s))
    return ExactLevel(options or ExactOptions(), store=store, clock=clock, rng=random.Random(1))


class TestExact(AnswerLevelContract):
    def make(self, clock: Clock) -> ExactLevel:
        return make_level(clock)


class TestExactInBuckets(AnswerLevelContract):
    """Buckets concern sampled questions only: the contract's are not."""

    def make(self, clock: Clock) -> ExactLevel:
        return make_level(clock, ExactOptions(sampled=Buckets(4)))


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


async def learn(level: ExactLevel, question: Question, answer: Completion) -> Stored | Refused:
    return await level.learn(question, answer, clean=True, cost_s=1.0)


def cut(answer: Completion) -> Completion:
    choices = tuple(msgspec.structs.replace(choice, reason="max_tokens") for choice in answer.choices)
    return msgspec.structs.replace(answer, choices=choices)


def outcome(found: Hit[Completion] | Miss) -> str:
    return "hit" if isinstance(found, Hit) else found.reason.value


# -- the token limit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learned_under", "answer", "expected"),
    [
        (None, make_answer(num_tokens=10), {None: "hit", 9: "other_limit", 10: "hit", 99: "hit"}),
        (50, make_answer(num_tokens=10), {None: "hit", 9: "other_limit", 10: "hit", 50: "hit", 99: "hit"}),
        (10, cut(make_answer(num_tokens=10)), {None: "absent", 9: "absent", 10: "hit", 11: "absent"}),
        (None, cut(make_answer(num_tokens=10)), {None: "hit", 9: "other_limit", 10: "other_limit", 99: "other_limit"}),
        (None, make_answer(num_tokens=0), {None: "hit", 5: "other_limit"}),
    ],
    ids=["finished", "finished under a limit", "cut", "cut by the context's end", "tokens not counted"],
)
def test_an_answer_stands_for_limits_it_would_not_have_met(
    learned_under: int | None, answer: Completion, expected: dict[int | None, str]
) -> None:
    async def body() -> None:
        level = make_level(ManualClock())
        assert isinstance(await learn(level, make_question(max_tokens=learned_under), answer), Stored)
        found = {limit: outcome(await level.lookup(make_question(max_tokens=limit))) for limit in expected}
        assert found == expected

    run(body())


def test_several_choices_stand_for_the_same_limit_only() -> None:
    async def body() -> None:
        level = make_level(ManualClock())
        two = Sampling(temperature=0.0, n=2)
        answer = make_answer(num_choices=2)
        await learn(level, make_question(sampling=two, max_tokens=50), answer)
        found = [outcome(await level.lookup(make_question(sampling=two, max_tokens=n))) for n in (None, 49, 50, 51)]
        assert found == ["absent", "absent", "hit", "absent"]
        await learn(level, make_question(sampling=two), answer)
        found = [outcome(await level.lookup(make_question(sampling=two, max_tokens=n))) for n in (None, 49, 50, 51)]
        assert found == ["hit", "other_limit", "hit", "other_limit"]

    run(body())


def test_a_cut_answer_and_the_whole_one_live_side_by_side() -> None:
    async def body() -> None:
        level = make_level(ManualClock())
        await learn(level, make_question(max_tokens=2), cut(make_answer("Be", num_tokens=2)))
        await learn(level, make_question(max_tokens=9), make_answer("Because.", num_tokens=3))
        for limit, text in ((2, "Be"), (3, "Because."), (None, "Because.")):
            hit = await level.lookup(make_question(max_tokens=limit))
            assert isinstance(hit, Hit)
            assert hit.value.choices[0].content == (TextPart(text),)

    run(body())


def test_a_prewarm_is_neither_answered_nor_learned() -> None:
    async def body() -> None:
        level = make_level(ManualClock())
        await learn(level, make_question(), make_answer())
        assert outcome(await level.lookup(make_question(max_tokens=0))) == "prewarm"
        refused = await learn(level, make_question(max_tokens=0), make_answer())
        assert refused == Refused("exact", RefusedReason.PREWARM)

    run(body())


# -- admission ---------------------------------------------------------------------------------------------------------


def answer_of(*contents: tuple[TextPart | ThinkingPart | ToolUsePart, ...], reason: FinishReason = "end_turn") -> Completion:
    return Completion("m", tuple(Choice(content, reason) for content in contents), Usage(output_tokens=3))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (make_answer(), None),
        (answer_of((TextPart("x"),), reason="stop_sequence"), None),
        (answer_of((ToolUsePart("id", "look", "{}"),), reason="tool_use"), None),
        (answer_of((TextPart(""), ToolUsePart("id", "look", "{}"))), None),
        (answer_of((TextPart("No."),), reason="refusal"), RefusedReason.REFUSAL),
        (answer_of(()), RefusedReason.EMPTY),
        (answer_of((TextPart(""),)), RefusedReason.EMPTY),
        (answer_of((ThinkingPart("hm"),)), RefusedReason.EMPTY),
        (answer_of(), RefusedReason.INCOMPLETE),
        (make_answer(num_choices=2), RefusedReason.INCOMPLETE),
        (make_answer("x" * 3000), RefusedReason.TOO_LARGE),
    ],
)
def test_only_whole_answers_are_admitted(answer: Completion, reason: RefusedReason | None) -> None:
    async def body() -> None:
        level = make_level(ManualClock(), ExactOptions(max_value_bytes=2000))
        learned = await learn(level, make_question(), answer)
        found = await level.lookup(make_question())
        if reason is None:
            assert isinstance(learned, Stored)
            assert isinstance(found, Hit)
            assert found.value == answer
        else:
            assert learned == Refused("exact", reason)
            assert isinstance(found, Miss)

    run(body())


def test_one_empty_or_refused_choice_spoils_the_answer() -> None:
    async def body() -> None:
        level = make_level(ManualClock())
        question = make_question(sampling=Sampling(temperature=0.0, n=2))
        assert await learn(level, question, answer_of((TextPart("x"),), ())) == Refused("exact", RefusedReason.EMPTY)

    run(body())


def test_every_prompt_of_a_batch_has_to_be_answered() -> None:
    async def body() -> None:
        level = make_level(ManualClock())
        request = Request("m", prompts=("a", "b"), sampling=Sampling(temperature=0.0, n=2))
        question = Question(request, request_key(request, fingerprint="f"))
        assert isinstance(await learn(level, question, make_answer(num_choices=3)), Refused)
        assert isinstance(await learn(level, question, make_answer(num_choices=4)), Stored)

    run(body())


def test_an_answer_that_no_tier_is_large_enough_for_is_refused() -> None:
    async def body() -> None:
        level = make_level(ManualClock(), capacity=500)
        assert await learn(level, make_question(), make_answer("x" * 1000)) == Refused("exact", RefusedReason.TOO_LARGE)

    run(body())


# -- freshness ---------------------------------------------------------------------------------------------------------


def test_a_hit_says_how_long_it_has_to_live() -> None:
    async def body() -> None:
        clock = ManualClock()
        level = make_level(clock, ttl_s=100)
        await learn(level, make_question(), make_answer())
        clock.advance(30)
        hit = await level.lookup(make_question())
        assert isinstance(hit, Hit)
        assert (hit.age_s, hit.ttl_s) == (30, 70)
        clock.advance(70)
        assert outcome(await level.lookup(make_question())) == "absent"

    run(body())


def test_a_clock_that_was_set_back_makes_no_negative_age() -> None:
    async def body() -> None:
        clock = ManualClock()
        level = make_level(clock)
        await learn(level, make_question(), make_answer())
        clock.advance(-50)
        hit = await level.lookup(make_question())
        assert isinstance(hit, Hit)
        assert hit.age_s == 0

    run(body())


def test_bytes_of_another_version_are_a_miss_that_the_next_answer_mends() -> None:
    async def body() -> None:
        level = make_level(ManualClock())
        question = make_question()
        level._store.put(question.key, b"\x81\xa1x\x01", tenant=question.request.tenant)
        assert outcome(await level.lookup(question)) == "unreadable"
        await learn(level, question, make_answer())
        assert isinstance(await level.lookup(question), Hit)

    run(body())


# -- sampled answers ---------------------------------------------------------------------------------------------------

SAMPLED = [Sampling(), Sampling(temperature=0.7), Sampling(temperature=None, top_k=1)]
REPEATABLE = [Sampling(temperature=0.0), Sampling(temperature=0.7, seed=0), Sampling(seed=5)]


@pytest.mark.parametrize("sampling", SAMPLED)
def test_never_keeps_no_sampled_answer(sampling: Sampling) -> None:
    async def body() -> None:
        level = make_level(ManualClock(), ExactOptions(sampled="never"))
        question = make_question(sampling=sampling)
        assert await learn(level, question, make_answer()) == Refused("exact", RefusedReason.SAMPLED)
        assert await level.lookup(question) == Miss("exact", MissReason.SAMPLED)

    run(body())


@pytest.mark.parametrize("options", [ExactOptions(sampled="never"), ExactOptions(sampled=Buckets(3)), ExactOptions()])
@pytest.mark.parametrize("sampling", REPEATABLE)
def test_a_repeatable_answer_is_always_reused(options: ExactOptions, sampling: Sampling) -> None:
    async def body() -> None:
        level = make_level(ManualClock(), options)
        question = make_question(sampling=sampling)
        await learn(level, question, make_answer())
        assert isinstance(await level.lookup(question), Hit)

    run(body())


def test_reuse_answers_a_sampled_question_with_the_first_answer() -> None:
    async def body() -> None:
        level = make_level(ManualClock())
        await learn(level, make_question(sampling=DRAWN), make_answer())
        assert isinstance(await level.lookup(make_question(sampling=DRAWN)), Hit)

    run(body())


@pytest.mark.parametrize("limit", [None, 2])
def test_buckets_fill_up_one_by_one_and_are_then_drawn_from_evenly(limit: int | None) -> None:
    async def body() -> None:
        level = make_level(ManualClock(), ExactOptions(sampled=Buckets(4)))
        question = make_question(sampling=DRAWN, max_tokens=limit)
        answers = [make_answer(f"answer {number}") for number in range(4)]
        if limit is not None:
            answers = [cut(answer) for answer in answers]
        for filled, answer in enumerate(answers):
            found = [outcome(await level.lookup(question)) for _ in range(400)]
            assert set(found) <= {"hit", "empty_bucket"}
            assert abs(found.count("hit") - 100 * filled) < 40
            await learn(level, question, answer)
        texts = []
        for _ in range(400):
            hit = await level.lookup(question)
            assert isinstance(hit, Hit)
            texts.append(hit.value)
        assert all(60 < texts.count(answer) < 140 for answer in answers)
        assert isinstance(await learn(level, question, make_answer("one more")), Stored)  # in place of one of them

    run(body())
