"""The whole level, with a real encoder and the verifier that is shipped, over a real exact level and a real file."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from anaphora.backends.encoders.minilm import MiniLM
from anaphora.clock import ManualClock
from anaphora.events import Compared, Event, Failed, Hit, Judged, Miss, MissReason, Refused, RefusedReason, Stored
from anaphora.keys import request_key
from anaphora.levels.base import Question
from anaphora.levels.exact import ExactLevel, ExactOptions
from anaphora.levels.semantic.comparing import Vector
from anaphora.levels.semantic.entries import Entries
from anaphora.levels.semantic.level import Route, SemanticLevel, SemanticOptions
from anaphora.levels.semantic.verifier import shipped
from anaphora.policies.lru import LRU
from anaphora.store import Store
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import (
    CacheControl,
    Choice,
    Completion,
    MediaPart,
    Message,
    Request,
    Sampling,
    Scope,
    Tenant,
    TextPart,
    Tool,
    ToolUsePart,
    Usage,
)

NO_WISHES = CacheControl()
RISK = 0.2
ASKED = "How do I reset my password?"
OTHER_WORDS = "how can i reset my password"
SAME = "how do I reset my PASSWORD"
TRAP = "How do I change my phone number?"
OPPOSITE = ("How do I turn on dark mode?", "How do I turn off dark mode?")
IMAGE = MediaPart("image", "image/png", {"base64": "aGVsbG8="})


@cache
def encoder() -> MiniLM:
    return MiniLM(threads=1)


def completion(text: str) -> Completion:
    return Completion("m", (Choice((TextPart(text),), "end_turn"),), Usage(input_tokens=7, output_tokens=3), compute_s=0.5)


class World:
    """A memory of two levels, and a model that answers as it is told."""

    def __init__(self, folder: Path, options: SemanticOptions, *, seed: int = 1, ask: Any = None) -> None:
        self.clock = ManualClock(1_000_000.0)
        self.events: list[Event] = []
        self.failing = False
        ram = RamTier(RamOptions(), policy=LRU(), clock=self.clock)
        self.exact = ExactLevel(ExactOptions(), store=Store([ram], clock=self.clock), clock=self.clock)
        entries = Entries(folder, dimensions=384, encoder="e", clock=self.clock, emit=self.events.append)
        self.level = SemanticLevel(
            options,
            answers=self.exact.lookup,
            embed=self._embed,
            entries=entries,
            verifier=shipped(),
            version="v",
            clock=self.clock,
            ask=ask,
            emit=self.events.append,
            rng=random.Random(seed),
        )
        self.level.start()
        self.number = 0

    async def _embed(self, tenant: Tenant, model: str, texts: Sequence[str]) -> Vector:
        if self.failing:
            raise OSError("the encoder is gone")
        return encoder().encode(texts)

    def question(self, text: str, *, control: CacheControl = NO_WISHES, **fields: Any) -> Question:
        self.number += 1
        content = (TextPart(text), *fields.pop("beside", ()))
        fields.setdefault("sampling", Sampling(temperature=0.0))
        before = fields.pop("before", ())
        request = Request("m", Tenant(fields.pop("tenant", "a")), (*before, Message("user", content)), **fields)
        return Question(request, request_key(request, fingerprint="f"), control, "f", f"req_{self.number:024x}")

    async def ask(self, text: str, answer: str | Completion = "An answer.", **fields: Any) -> Hit[Completion] | Miss:
        """As the memory does: look, and where there is nothing compute and learn."""
        question = self.question(text, **fields)
        found = await self.exact.lookup(question)
        if isinstance(found, Hit):
            return found
        found = await self.level.lookup(question)
        if isinstance(found, Miss):
            value = completion(answer) if isinstance(answer, str) else answer
            await self.exact.learn(question, value, clean=True, cost_s=0.5)
            await self.level.learn(question, value, clean=True, cost_s=0.5)
            await self.level.flush()
        return found

    async def teach(self, num: int = 40) -> None:
        """Evidence that both kinds of candidates are right."""
        pairs = [(ASKED, SAME, True), (ASKED, OTHER_WORDS, True)]
        assert await self.level.audits.teach(Tenant("a"), "m", pairs * (num // 2)) == num

    def compared(self) -> Compared:
        """The last comparison."""
        return next(event for event in reversed(self.events) if isinstance(event, Compared))


Body = Callable[[World], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    def run(body: Body, options: SemanticOptions | None = None, **fields: Any) -> None:
        async def main() -> None:
            world = World(tmp_path, options or SemanticOptions(risk=RISK, audit_share=0.01), **fields)
            try:
                await body(world)
            finally:
                await world.level.aclose()

        asyncio.run(main())

    return run


Run = Callable[..., None]


def reason(found: Hit[Completion] | Miss) -> MissReason | str:
    return found.reason if isinstance(found, Miss) else found.value.choices[0].content[0].text  # type: ignore[union-attr]


# -- what is given ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [SAME, OTHER_WORDS])
def test_without_evidence_nothing_is_given_and_it_is_said_what_is_missing(run: Run, text: str) -> None:
    async def body(world: World) -> None:
        assert reason(await world.ask(ASKED, "Click on forgot.")) is MissReason.NO_NEIGHBOUR
        assert reason(await world.ask(text, "Click on forgot.")) is MissReason.SHADOW
        said = world.compared()
        assert (said.outcome, said.step, said.nearest) == ("shadow", "risk", ASKED)
        assert "more audits without an error" in said.why

    run(body)


@pytest.mark.parametrize("text", [SAME, OTHER_WORDS])
def test_with_evidence_the_same_question_in_other_words_is_answered(run: Run, text: str) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED, "Click on forgot.")
        world.clock.advance(9)
        found = await world.ask(text)
        assert isinstance(found, Hit)
        assert (found.level, found.value, found.age_s, found.cost_s) == ("semantic", completion("Click on forgot."), 9.0, 0.5)
        assert world.compared().outcome == "hit"

    run(body)


def test_audits_of_what_was_computed_anyway_are_evidence_enough(run: Run) -> None:
    async def body(world: World) -> None:
        spellings = [f"{'How do I' if number % 2 else 'HOW do I'} reset my password{'!' * number}" for number in range(40)]
        outcomes = []
        for number, text in enumerate(spellings):
            control = CacheControl()
            found = await world.level.lookup(question := world.question(text, control=control))
            outcomes.append(found)
            if isinstance(found, Miss):
                await world.exact.learn(question, completion("Click on forgot."), clean=True, cost_s=0.5)
                await world.level.learn(question, completion("Click on forgot."), clean=True, cost_s=0.5)
                await world.level.flush()
            assert number > 5 or isinstance(found, Miss)
        assert isinstance(outcomes[-1], Hit)
        judged = [event for event in world.events if isinstance(event, Judged)]
        assert judged
        assert not any(event.wrong for event in judged)

    run(body)


def test_answers_that_turn_out_wrong_are_never_given(run: Run) -> None:
    async def body(world: World) -> None:
        for number in range(30):
            found = await world.ask(f"How do I reset my password{'!' * number}", f"Answer number {number}.")
            assert isinstance(found, Miss), number
        judged = [event for event in world.events if isinstance(event, Judged)]
        assert judged
        assert all(event.wrong for event in judged)

    run(body)


# -- what is not -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [OPPOSITE, (ASKED, TRAP), ("Is 5 more than 3?", "Is 3 more than 5?")])
def test_a_question_that_only_looks_alike_is_not_answered(run: Run, first: str, second: str) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(first, "One.")
        assert reason(await world.ask(second, "Two.")) in (MissReason.GUARDED, MissReason.UNVERIFIED, MissReason.NO_NEIGHBOUR)

    run(body)


@pytest.mark.parametrize(
    "fields",
    [
        {"tenant": "b"},
        {"before": (Message("system", (TextPart("You are a pirate."),)),)},
        {"tools": (Tool("lookup"),)},
        {"beside": (IMAGE,)},
        {"extra": {"response_format": {"type": "json_object"}}},
        {"sampling": Sampling(temperature=0.7)},
        {"before": (Message("user", (TextPart("Hi"),)), Message("assistant", (TextPart("Hello!"),)))},
        {"cache_salt": "s"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_under_other_circumstances_it_is_another_question(run: Run, fields: dict[str, Any]) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.level.audits.teach(Tenant("b"), "m", [(ASKED, SAME, True), (ASKED, OTHER_WORDS, True)] * 20)
        await world.ask(ASKED, "Click on forgot.")
        assert reason(await world.ask(OTHER_WORDS, "Other.", **fields)) is MissReason.NO_NEIGHBOUR
        assert reason(await world.ask(SAME, **fields)) == "Other."  # it is answered under the same ones

    run(body)


def test_what_the_client_does_not_want_it_does_not_get(run: Run) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED)
        found = await world.ask(OTHER_WORDS, control=CacheControl(semantic_risk=0.0))
        assert reason(found) is MissReason.NOT_COMPARABLE

    run(body)


def test_a_client_may_want_it_surer(run: Run) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED)
        assert reason(await world.ask(SAME, control=CacheControl(semantic_risk=0.001))) is MissReason.SHADOW

    run(body)


def test_routes_say_where_it_is_off_or_only_watched(run: Run) -> None:
    routes = (Route(tenants=("a",), models=("other*",), mode="off"), Route(tenants=("a",), mode="shadow"))

    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED)
        assert reason(await world.ask(SAME)) is MissReason.SHADOW
        assert "would be given" in world.compared().why

    run(body, SemanticOptions(risk=RISK, routes=routes))


@pytest.mark.parametrize(
    "value",
    [
        Completion("m", (Choice((ToolUsePart("1", "f", "{}"),), "tool_use"),), Usage(output_tokens=1)),
        Completion("m", (Choice((TextPart("a"),), "end_turn"),), Usage(output_tokens=1), faithful=False),
        Completion("m", (Choice((TextPart("a"),), "refusal"),), Usage(output_tokens=1)),
    ],
    ids=["a tool call", "not all of it is known", "a refusal"],
)
def test_what_is_no_answer_in_words_is_not_for_other_words(run: Run, value: Completion) -> None:
    async def body(world: World) -> None:
        question = world.question(ASKED)
        await world.exact.learn(question, value, clean=True, cost_s=0.5)
        outcome = await world.level.learn(question, value, clean=True, cost_s=0.5)
        assert outcome == Refused("semantic", RefusedReason.NOT_COMPARABLE)

    run(body)


def test_a_long_question_is_never_compared(run: Run) -> None:
    async def body(world: World) -> None:
        assert reason(await world.ask("word " * 500)) is MissReason.NOT_COMPARABLE

    run(body)


# -- the answer is the exact level's -----------------------------------------------------------------------------------------


def test_without_its_answer_a_question_stands_for_nothing(run: Run) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED)
        await world.exact.forget(Scope())
        assert reason(await world.ask(SAME)) is MissReason.NO_NEIGHBOUR
        assert world.compared().step == "answer"

    run(body)


def test_what_the_exact_level_did_not_keep_is_not_remembered(run: Run) -> None:
    async def body(world: World) -> None:
        question = world.question(ASKED)
        outcome = await world.level.learn(question, completion("a"), clean=True, cost_s=0.5)
        assert outcome == Refused("semantic", RefusedReason.NOT_COMPARABLE)
        await world.exact.learn(question, completion("a"), clean=True, cost_s=0.5)
        assert isinstance(await world.level.learn(question, completion("a"), clean=True, cost_s=0.5), Stored)

    run(body)


def test_an_older_answer_than_the_client_accepts_is_not_given(run: Run) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED)
        world.clock.advance(60)
        assert isinstance(await world.ask(SAME, control=CacheControl(max_age_s=10)), Miss)
        assert isinstance(await world.ask(SAME + "!", control=CacheControl(max_age_s=100)), Hit)

    run(body)


# -- what users say ----------------------------------------------------------------------------------------------------------


def test_an_answer_that_was_called_wrong_is_not_given_to_that_question_again(run: Run) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED, "Click on forgot.")
        found = await world.ask(OTHER_WORDS)
        assert isinstance(found, Hit)
        assert await world.level.audits.feedback(Tenant("a"), f"req_{world.number:024x}", right=False)
        assert isinstance(await world.ask(OTHER_WORDS), Miss)

    run(body)


def test_feedback_is_taken_of_ones_own_answers_only(run: Run) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED)
        await world.ask(SAME)
        request_id = f"req_{world.number:024x}"
        assert not await world.level.audits.feedback(Tenant("b"), request_id, right=False)
        assert not await world.level.audits.feedback(Tenant("a"), "req_unheard", right=False)
        assert await world.level.audits.feedback(Tenant("a"), request_id, right=False)

    run(body)


def test_complaints_end_what_evidence_began(run: Run) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED)
        for number in range(20):
            found = await world.ask(SAME + "!" * number)
            if isinstance(found, Miss):
                break
            await world.level.audits.feedback(Tenant("a"), f"req_{world.number:024x}", right=False)
        else:
            pytest.fail("twenty wrong answers in a row")

    run(body)


def test_who_goes_on_with_the_conversation_is_content(run: Run) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED, "Click on forgot.")
        assert isinstance(await world.ask(SAME), Hit)
        told = (Message("user", (TextPart(SAME),)), Message("assistant", (TextPart("Click on forgot."),)))
        await world.ask("Thanks! And what is the weather like?", before=told)
        assert isinstance(await world.ask(OTHER_WORDS), Hit)

    run(body)


def test_who_rephrases_in_the_same_conversation_is_noticed(run: Run) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED, "Click on forgot.")
        assert isinstance(await world.ask(SAME), Hit)
        told = (Message("user", (TextPart(SAME),)), Message("assistant", (TextPart("Click on forgot."),)))
        await world.ask("No, how can I reset the password?", before=told)
        assert reason(await world.ask(OTHER_WORDS, "Click on forgot.")) is MissReason.AUDITED
        outcomes = [decision.outcome for decision in await world.level.decisions(Tenant("a"), 10)]
        assert outcomes[:2] == ["right", "audited"]
        assert "doubted" in outcomes


def test_another_user_with_the_same_question_says_nothing_of_the_answer(run: Run) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED, "Click on forgot.")
        for _ in range(5):
            assert isinstance(await world.ask(SAME), Hit)
            assert isinstance(await world.ask(OTHER_WORDS), Hit)

    run(body)

    run(body)


# -- forgetting, failing -----------------------------------------------------------------------------------------------------


def test_forgetting_leaves_neither_questions_nor_evidence_nor_what_was_under_way(run: Run) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED)
        under_way = world.question(OTHER_WORDS)
        await world.level.lookup(under_way)
        mark = world.level.mark()
        receipt = await world.level.forget(Scope(tenant=Tenant("a")))
        assert receipt.complete
        assert receipt.removed == {"semantic": 1}
        late = await world.level.learn(under_way, completion("late"), clean=True, cost_s=0.5, since=mark)
        assert late == Refused("semantic", RefusedReason.FORGOTTEN)
        assert world.level.evidence(Tenant("a")) == {}
        assert await world.level.decisions(Tenant("a"), 10) == []
        await world.exact.forget(Scope())
        await world.ask(ASKED)
        assert reason(await world.ask(SAME)) is MissReason.SHADOW  # and the evidence begins anew

    run(body)


def test_what_is_forgotten_while_it_is_being_judged_leaves_nothing(run: Run) -> None:
    worlds: list[World] = []
    gone = asyncio.Event()

    async def ask(tenant: Tenant, prompt: str) -> str:
        await worlds[0].level.forget(Scope(tenant=tenant))
        gone.set()
        return "YES"

    async def body(world: World) -> None:
        worlds.append(world)
        await world.ask(ASKED, "Click on forgot.")
        await world.ask(OTHER_WORDS, "You find the link below.")
        assert gone.is_set()
        assert await world.level.decisions(Tenant("a"), 10) == []
        assert world.level.evidence(Tenant("a")) == {}

    run(body, ask=ask)


def test_what_is_forgotten_while_it_is_being_compared_leaves_nothing(run: Run) -> None:
    async def body(world: World) -> None:
        await world.ask(ASKED, "Click on forgot.")
        question = world.question(OTHER_WORDS)
        answers = world.level._answers

        async def forgetting(asked: Question) -> Hit[Completion] | Miss:
            found = await answers(asked)
            await world.level.forget(Scope(tenant=Tenant("a")))
            return found

        world.level._answers = forgetting
        assert isinstance(await world.level.lookup(question), Miss)
        world.level._answers = answers
        await world.level.flush()
        assert await world.level.decisions(Tenant("a"), 10) == []

    run(body)


def test_a_step_that_fails_is_a_miss(run: Run) -> None:
    async def body(world: World) -> None:
        await world.teach()
        await world.ask(ASKED)
        world.failing = True
        assert reason(await world.ask(OTHER_WORDS)) is MissReason.FAILED
        assert any(isinstance(event, Failed) and "the encoder is gone" in event.error for event in world.events)

    run(body)


def test_what_was_remembered_is_there_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        options = SemanticOptions(risk=RISK, audit_share=0.01)
        first = World(tmp_path, options)
        await first.teach()
        await first.ask(ASKED, "Click on forgot.")
        await first.level.aclose()
        second = World(tmp_path, options)
        second.exact = first.exact
        second.level._answers = first.exact.lookup
        await second.level.flush()
        assert isinstance(await second.ask(OTHER_WORDS), Hit)
        await second.level.aclose()

    asyncio.run(main())


# -- sharing, judging --------------------------------------------------------------------------------------------------------


def test_only_what_was_audited_is_for_all_tenants(run: Run) -> None:
    async def body(world: World) -> None:
        await world.level.audits.teach(Tenant("b"), "m", [(ASKED, SAME, True), (ASKED, OTHER_WORDS, True)] * 20)
        await world.ask(ASKED, "Click on forgot.")
        assert isinstance(await world.ask(SAME, "Another.", tenant="b"), Miss)  # not audited yet
        await world.ask(SAME, "Click on forgot.")  # in shadow, and the same: now it is
        found = await world.ask(OTHER_WORDS, tenant="c")
        assert reason(found) is MissReason.SHADOW  # known, but this tenant has no evidence
        found = await world.ask(OTHER_WORDS, tenant="b")
        assert isinstance(found, Hit)

    run(body, SemanticOptions(risk=RISK, audit_share=0.01, shared=True))


def test_a_judge_decides_where_the_verifier_is_in_doubt_and_whether_answers_agree(run: Run) -> None:
    prompts: list[str] = []

    async def ask(tenant: Tenant, prompt: str) -> str:
        prompts.append(prompt)
        return "Yes." if "Answer 2" in prompt else "NO"

    async def body(world: World) -> None:
        await world.ask(ASKED, "Click on forgot.")
        assert reason(await world.ask(OTHER_WORDS, "You find the link below.")) is MissReason.SHADOW
        assert ["Answer 2" in prompt for prompt in prompts] == [True]
        judged = next(event for event in world.events if isinstance(event, Judged))
        assert not judged.wrong

    run(body, ask=ask)


def test_a_judge_that_does_not_clearly_say_yes_says_no(run: Run) -> None:
    async def ask(tenant: Tenant, prompt: str) -> str:
        return "yes, or perhaps not"

    async def body(world: World) -> None:
        await world.ask(ASKED, "Click on forgot.")
        await world.ask(OTHER_WORDS, "You find the link below.")
        assert next(event for event in world.events if isinstance(event, Judged)).wrong

    run(body, ask=ask)


def test_options_are_those_of_the_configuration() -> None:
    from anaphora.config import SemanticConfig, SemanticRouteConfig

    assert set(Route.__struct_fields__) == set(SemanticRouteConfig.__struct_fields__)
    assert set(SemanticOptions.__struct_fields__) - {"unrelated"} <= set(SemanticConfig.__struct_fields__)
    defaults = {name: getattr(SemanticConfig(), name) for name in ("risk", "confidence", "audit_share", "max_chars", "shared")}
    assert defaults == {name: getattr(SemanticOptions(), name) for name in defaults}
    assert msgspec.structs.asdict(Route()) == msgspec.structs.asdict(SemanticRouteConfig())
