"""What every level of answers owes the memory, as tests to inherit.

class TestMyLevel(AnswerLevelContract):
    def make(self, clock: Clock) -> AnswerLevel:
        return MyLevel(..., clock=clock)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from anaphora.clock import Clock, ManualClock
from anaphora.events import Hit, Miss, MissReason, Refused, RefusedReason, Stored
from anaphora.keys import request_key
from anaphora.levels.base import Question
from anaphora.memory import AnswerLevel
from anaphora.types import (
    CacheControl,
    Choice,
    Completion,
    Message,
    Request,
    Sampling,
    Scope,
    Tenant,
    TextPart,
    Usage,
)


def make_question(
    text: str = "Why?",
    *,
    tenant: str = "a",
    max_tokens: int | None = None,
    sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008  a frozen value
    control: CacheControl = CacheControl(),  # noqa: B008
) -> Question:
    messages = (Message("user", (TextPart(text),)),)
    request = Request("m", Tenant(tenant), messages, sampling=sampling, max_tokens=max_tokens)
    return Question(request, request_key(request, fingerprint="f"), control)


def make_answer(text: str = "Because.", *, num_tokens: int = 3, num_choices: int = 1) -> Completion:
    choice = Choice((TextPart(text),), "end_turn")
    return Completion("m", (choice,) * num_choices, Usage(input_tokens=7, output_tokens=num_tokens), compute_s=0.5)


class AnswerLevelContract:
    """Inherit, and say how a level is made that knows nothing yet."""

    def make(self, clock: Clock) -> AnswerLevel:
        raise NotImplementedError

    def run(self, body: Callable[[AnswerLevel, ManualClock], Awaitable[None]]) -> None:
        async def main() -> None:
            clock = ManualClock()
            level = self.make(clock)
            try:
                await body(level, clock)
            finally:
                await level.aclose()

        asyncio.run(main())

    def test_what_was_learned_is_answered_with_its_age_and_cost(self) -> None:
        async def body(level: AnswerLevel, clock: ManualClock) -> None:
            question, answer = make_question(), make_answer()
            assert await level.lookup(question) == Miss(level.name, MissReason.ABSENT)
            assert isinstance(await level.learn(question, answer, clean=True, cost_s=0.5), Stored)
            clock.advance(12)
            hit = await level.lookup(question)
            assert isinstance(hit, Hit)
            assert (hit.level, hit.value, hit.age_s, hit.cost_s) == (level.name, answer, 12.0, 0.5)

        self.run(body)

    def test_an_answer_that_was_not_finished_cleanly_is_not_learned(self) -> None:
        async def body(level: AnswerLevel, clock: ManualClock) -> None:
            outcome = await level.learn(make_question(), make_answer(), clean=False, cost_s=0.5)
            assert outcome == Refused(level.name, RefusedReason.NOT_CLEAN)
            assert isinstance(await level.lookup(make_question()), Miss)

        self.run(body)

    def test_no_tenant_sees_another_tenants_answer(self) -> None:
        async def body(level: AnswerLevel, clock: ManualClock) -> None:
            await level.learn(make_question(tenant="a"), make_answer(), clean=True, cost_s=0.5)
            assert isinstance(await level.lookup(make_question(tenant="b")), Miss)

        self.run(body)

    def test_the_clients_wishes_are_honoured(self) -> None:
        async def body(level: AnswerLevel, clock: ManualClock) -> None:
            no_store = make_question(control=CacheControl(no_store=True))
            refused = await level.learn(no_store, make_answer(), clean=True, cost_s=0.5)
            assert refused == Refused(level.name, RefusedReason.NO_STORE)
            no_cache = make_question(control=CacheControl(no_cache=True))
            assert isinstance(await level.learn(no_cache, make_answer(), clean=True, cost_s=0.5), Stored)
            assert await level.lookup(no_cache) == Miss(level.name, MissReason.NO_CACHE)
            assert isinstance(await level.lookup(no_store), Hit)
            clock.advance(10)
            assert isinstance(await level.lookup(make_question(control=CacheControl(max_age_s=10))), Hit)
            stale = await level.lookup(make_question(control=CacheControl(max_age_s=9)))
            assert stale == Miss(level.name, MissReason.STALE_FOR_REQUEST)

        self.run(body)

    def test_what_is_forgotten_is_answered_no_more_and_the_receipt_says_so(self) -> None:
        async def body(level: AnswerLevel, clock: ManualClock) -> None:
            for tenant in "ab":
                await level.learn(make_question(tenant=tenant), make_answer(), clean=True, cost_s=0.5, tags=("t",))
            receipt = await level.forget(Scope(tenant=Tenant("a"), tag="t", model="m"))
            assert receipt.complete
            assert sum(receipt.removed.values()) >= 1
            assert isinstance(await level.lookup(make_question(tenant="a")), Miss)
            assert isinstance(await level.lookup(make_question(tenant="b")), Hit)

        self.run(body)

    def test_what_was_asked_before_something_was_forgotten_is_not_learned(self) -> None:
        async def body(level: AnswerLevel, clock: ManualClock) -> None:
            question, answer = make_question(), make_answer()
            refused = Refused(level.name, RefusedReason.FORGOTTEN)
            asked = level.mark()
            assert isinstance(await level.learn(question, answer, clean=True, cost_s=0.5, since=asked), Stored)
            await level.forget(Scope(tenant=Tenant("a")))
            assert await level.learn(question, answer, clean=True, cost_s=0.5, since=asked) == refused
            asked = level.mark()
            level.drop(Scope(tenant=Tenant("a")))
            assert await level.learn(question, answer, clean=True, cost_s=0.5, since=asked) == refused
            assert isinstance(await level.lookup(question), Miss)
            assert isinstance(await level.learn(question, answer, clean=True, cost_s=0.5, since=level.mark()), Stored)

        self.run(body)

    def test_what_another_process_forgets_is_answered_no_more(self) -> None:
        async def body(level: AnswerLevel, clock: ManualClock) -> None:
            for tenant in "ab":
                await level.learn(make_question(tenant=tenant), make_answer(), clean=True, cost_s=0.5)
            level.drop(Scope(tenant=Tenant("a"), model="m"))
            assert isinstance(await level.lookup(make_question(tenant="a")), Miss)
            assert isinstance(await level.lookup(make_question(tenant="b")), Hit)

        self.run(body)

    def test_a_newer_answer_replaces_the_older(self) -> None:
        async def body(level: AnswerLevel, clock: ManualClock) -> None:
            question = make_question(control=CacheControl(max_age_s=5))
            await level.learn(question, make_answer("old"), clean=True, cost_s=0.5)
            clock.advance(6)
            await level.learn(question, make_answer("new"), clean=True, cost_s=0.5)
            hit = await level.lookup(question)
            assert isinstance(hit, Hit)
            assert hit.value == make_answer("new")
            assert msgspec.structs.asdict(hit)["age_s"] == 0

        self.run(body)
