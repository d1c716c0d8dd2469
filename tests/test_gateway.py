"""The path: recall, share, compute, learn. Real parts throughout; interleavings are forced with the echo's gate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import pytest

from anaphora.answer import Answer, Live, Recalled
from anaphora.backends.echo import EchoBackend, Options, fail_at
from anaphora.catalogue import Catalogue
from anaphora.clock import ManualClock
from anaphora.config import Buckets
from anaphora.errors import BackendFailed, ModelNotFound, NotCached
from anaphora.events import Answered, Computed, Event, Failed, Forgotten, Hit, Miss, MissReason, Refused, RefusedReason, Stored
from anaphora.forgets import Forgets
from anaphora.gateway import Gateway
from anaphora.levels.base import Question
from anaphora.levels.exact import ExactLevel, ExactOptions
from anaphora.memory import AnswerLevel, Memory
from anaphora.policies.lru import LRU
from anaphora.store import Mark, Store
from anaphora.tiers.base import Tier, TierStats
from anaphora.tiers.disk import DiskOptions, DiskTier
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import CacheControl, Completion, Keep, Key, Message, ModelInfo, Request, Sampling, Scope, Tenant, TextPart


class Bench:
    """A gateway over echo and memory, and what it emitted."""

    def __init__(
        self,
        *,
        sampled: Literal["reuse", "never"] | Buckets = "reuse",
        levels: list[AnswerLevel] | None = None,
        backend: EchoBackend | None = None,
        folder: Path | None = None,
        forgets: Forgets | None = None,
    ) -> None:
        self.clock = ManualClock()
        self.events: list[Event] = []
        self.backend = backend or EchoBackend(clock=self.clock)
        policy: LRU[Key] = LRU()
        tiers: list[Tier] = [RamTier(RamOptions(), policy=policy, clock=self.clock)]
        if folder is not None:
            tiers.append(DiskTier(DiskOptions(str(folder)), clock=self.clock))
        level = ExactLevel(ExactOptions(sampled=sampled), store=Store(tiers, clock=self.clock), clock=self.clock)
        catalogue = Catalogue(self.backend, ["also-echo"])
        memory = Memory([level] if levels is None else levels, fingerprint=catalogue.fingerprint, emit=self.events.append)
        self.gateway = Gateway(self.backend, memory, catalogue, forgets=forgets, clock=self.clock, emit=self.events.append)

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def answered(self) -> list[tuple[str, str]]:
        return [(event.source, event.outcome) for event in self.events if isinstance(event, Answered)]

    async def settled(self) -> None:
        """Wait until every computation has landed."""
        await self.gateway._flights.drain()  # tests of other modules have no business with flights


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await body()

    asyncio.run(main())


def ask(text: str = "to be or not", **fields: object) -> Request:
    fields = {"sampling": Sampling(temperature=0.0), **fields}
    return Request("echo", messages=(Message("user", (TextPart(text),)),), **fields)  # type: ignore[arg-type]


async def whole(answer: Answer) -> Completion | None:
    if isinstance(answer, Recalled):
        return answer.completion
    try:
        return await answer.whole()
    finally:
        answer.leave()


def text(completion: Completion | None) -> str:
    assert completion is not None
    return "".join(part.text for part in completion.choices[0].content if isinstance(part, TextPart))


class Gate:
    """Holds every run at one delta until it is opened."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self, index: int) -> None:
        if index == self.at:
            self.reached.set()
            await self.open.wait()


def test_a_hit_names_the_same_key_as_the_miss_before_wherever_the_answer_lies() -> None:
    async def body() -> None:
        bench = Bench()
        await bench.gateway.start()
        cut = ask(max_tokens=2)  # an answer that its limit cut is kept under a key of its own
        first = await bench.gateway.complete(cut)
        await whole(first)
        await bench.settled()
        second = await bench.gateway.complete(cut)
        assert isinstance(second, Recalled)
        assert second.key == first.key

    run(body)


def test_a_second_identical_request_is_a_hit_and_computes_nothing() -> None:
    async def body() -> None:
        bench = Bench()
        await bench.gateway.start()
        first = await bench.gateway.complete(ask())
        assert first.source == "miss"
        assert text(await whole(first)) == "to be or not"
        await bench.settled()
        bench.clock.advance(3)
        second = await bench.gateway.complete(ask())
        assert isinstance(second, Recalled)
        assert text(second.completion) == "to be or not"
        assert second.age_s == 3
        assert bench.backend.runs == 1
        assert bench.answered() == [("miss", "finished"), ("hit", "finished")]
        assert len(bench.of(Computed)) == len(bench.of(Stored)) == 1

    run(body)


def test_simultaneous_identical_requests_are_one_computation() -> None:
    async def body() -> None:
        bench = Bench()
        answers = [await bench.gateway.complete(ask()) for _ in range(50)]
        assert [answer.source for answer in answers] == ["miss"] + ["collapsed"] * 49
        texts = [text(completion) for completion in await asyncio.gather(*map(whole, answers))]
        assert texts == ["to be or not"] * 50
        await bench.settled()
        assert bench.backend.runs == 1
        assert len(bench.of(Computed)) == len(bench.of(Stored)) == 1

    run(body)


def test_different_token_limits_tenants_and_salts_are_computed_apart() -> None:
    async def body() -> None:
        bench = Bench()
        requests = [ask(), ask(max_tokens=2), ask(tenant=Tenant("other")), ask(cache_salt="salt")]
        answers = [await bench.gateway.complete(request) for request in requests]
        assert [answer.source for answer in answers] == ["miss"] * 4
        assert [text(await whole(answer)) for answer in answers] == ["to be or not", "to be ", "to be or not", "to be or not"]

    run(body)


def test_a_client_that_leaves_alone_cancels_and_nothing_is_learned() -> None:
    async def body() -> None:
        gate = Gate(at=2)
        bench = Bench(backend=EchoBackend(gate=gate))
        answer = await bench.gateway.complete(ask())
        assert isinstance(answer, Live)
        await gate.reached.wait()
        answer.leave()
        await bench.settled()
        assert (bench.backend.runs, bench.backend.closed, bench.backend.finished) == (1, 1, 0)
        assert bench.of(Stored) == []
        assert bench.answered() == [("miss", "left")]
        assert (await bench.gateway.complete(ask())).source == "miss"

    run(body)


def test_the_leader_leaving_leaves_the_followers_a_whole_answer_that_is_learned() -> None:
    async def body() -> None:
        gate = Gate(at=2)
        bench = Bench(backend=EchoBackend(gate=gate))
        leader = await bench.gateway.complete(ask())
        follower = await bench.gateway.complete(ask())
        await gate.reached.wait()
        assert isinstance(leader, Live)
        leader.leave()
        gate.open.set()
        assert text(await whole(follower)) == "to be or not"
        await bench.settled()
        assert bench.answered() == [("miss", "left"), ("collapsed", "finished")]
        assert len(bench.of(Stored)) == 1

    run(body)


def test_a_failure_reaches_every_client_and_nothing_is_learned() -> None:
    async def body() -> None:
        bench = Bench(backend=EchoBackend(gate=fail_at(3)))
        for answer in [await bench.gateway.complete(ask()) for _ in range(3)]:
            with pytest.raises(BackendFailed):
                await whole(answer)
        await bench.settled()
        assert bench.of(Stored) == []
        assert {outcome for _, outcome in bench.answered()} == {"failed"}

    run(body)


def test_who_demands_exact_kv_or_wants_it_kept_joins_nobody_who_does_not() -> None:
    async def body() -> None:
        bench = Bench()
        requests = [ask(), ask(exact_kv=True), ask(keep=(Keep(1 << 40, 60.0),)), ask(exact_kv=True)]
        answers = [await bench.gateway.complete(request) for request in requests]
        assert [answer.source for answer in answers] == ["miss", "miss", "miss", "collapsed"]
        await asyncio.gather(*map(whole, answers))
        await bench.settled()
        assert isinstance(await bench.gateway.complete(ask(keep=(Keep(1 << 40, 60.0),))), Recalled), "the question is the same"

    run(body)


def test_no_cache_and_no_store_share_nothing() -> None:
    async def body() -> None:
        for control in (CacheControl(no_cache=True), CacheControl(no_store=True)):
            bench = Bench()
            plain = await bench.gateway.complete(ask())
            own = [await bench.gateway.complete(ask(), control) for _ in range(2)]
            assert all(answer.source != "collapsed" for answer in own)
            await asyncio.gather(*map(whole, [plain, *own]))
            assert bench.backend.runs == 3

    run(body)


def test_no_store_leaves_nothing_behind() -> None:
    async def body() -> None:
        bench = Bench()
        answer = await bench.gateway.complete(ask(), CacheControl(no_store=True))
        assert answer.source == "bypass"
        await whole(answer)
        await bench.settled()
        assert bench.of(Stored) == []
        assert len(bench.of(Refused)) == 1

    run(body)


def test_only_if_cached_never_computes() -> None:
    async def body() -> None:
        bench = Bench()
        with pytest.raises(NotCached):
            await bench.gateway.complete(ask(), CacheControl(only_if_cached=True))
        assert bench.backend.runs == 0

    run(body)


def test_sampled_answers_are_shared_only_where_the_setting_reuses_them() -> None:
    async def body() -> None:
        sampled = ask(sampling=Sampling(temperature=1.0))
        settings: tuple[tuple[Literal["reuse", "never"] | Buckets, int], ...] = (("reuse", 1), ("never", 3), (Buckets(2), 3))
        for setting, runs in settings:
            bench = Bench(sampled=setting)
            answers = [await bench.gateway.complete(sampled) for _ in range(3)]
            await asyncio.gather(*map(whole, answers))
            assert bench.backend.runs == runs, setting

    run(body)


def test_without_levels_everything_is_computed_and_nothing_shared() -> None:
    async def body() -> None:
        bench = Bench(levels=[])
        answers = [await bench.gateway.complete(ask()) for _ in range(2)]
        assert [answer.source for answer in answers] == ["bypass"] * 2
        await asyncio.gather(*map(whole, answers))
        assert bench.backend.runs == 2

    run(body)


def test_an_unknown_model_is_refused_with_the_names_there_are_and_an_alias_is_served() -> None:
    async def body() -> None:
        bench = Bench()
        with pytest.raises(ModelNotFound, match="echo"):
            await bench.gateway.complete(Request("gpt-9"))
        await whole(await bench.gateway.complete(ask()))
        await bench.settled()
        alias = Request("also-echo", messages=ask().messages, sampling=ask().sampling)
        assert (await bench.gateway.complete(alias)).source == "hit"
        assert await bench.gateway.count_tokens(alias) == 4

    run(body)


def test_what_was_being_computed_when_it_was_forgotten_is_not_learned() -> None:
    async def body() -> None:
        gate = Gate(at=2)
        bench = Bench(backend=EchoBackend(gate=gate))
        answer = await bench.gateway.complete(ask())
        await gate.reached.wait()
        receipt = await bench.gateway.forget(Scope(tenant=ask().tenant))
        assert receipt.answers[0].complete
        gate.open.set()
        assert text(await whole(answer)) == "to be or not"
        await bench.settled()
        assert bench.of(Stored) == []
        assert [event.reason for event in bench.events if isinstance(event, Refused)] == [RefusedReason.FORGOTTEN]

    run(body)


def test_who_asks_after_a_forget_does_not_join_a_computation_from_before_it() -> None:
    async def body() -> None:
        gate = Gate(at=2)
        bench = Bench(backend=EchoBackend(gate=gate))
        before = await bench.gateway.complete(ask())
        await gate.reached.wait()
        await bench.gateway.forget(Scope(tenant=ask().tenant))
        after = await bench.gateway.complete(ask())
        assert after.source == "miss"
        gate.open.set()
        assert text(await whole(before)) == text(await whole(after)) == "to be or not"
        await bench.settled()
        assert bench.backend.runs == 2
        assert len(bench.of(Stored)) == 1

    run(body)


# -- several gateway processes of one server -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["nothing but the news", "a folder", "the folder alone"])
def test_what_another_process_forgets_while_it_is_being_computed_here_is_not_learned(share: str, tmp_path: Path) -> None:
    async def body() -> None:
        gate = Gate(at=2)
        # The folder alone: another server on the same cache directory, whose forgets are no news here.
        news = [None if share == "the folder alone" else Forgets(tmp_path / "forgets") for _ in range(2)]
        folder = None if share == "nothing but the news" else tmp_path / "answers"
        here = Bench(backend=EchoBackend(gate=gate), folder=folder, forgets=news[0])
        there = Bench(folder=folder, forgets=news[1])
        answer = await here.gateway.complete(ask())
        await gate.reached.wait()
        assert (await there.gateway.forget(Scope(tenant=ask().tenant))).answers[0].complete
        gate.open.set()
        assert text(await whole(answer)) == "to be or not"
        await here.settled()
        assert here.of(Stored) == []
        assert [event.reason for event in here.events if isinstance(event, Refused)] == [RefusedReason.FORGOTTEN]
        again = await here.gateway.complete(ask())
        assert again.source == "miss"
        await whole(again)
        await here.gateway.aclose()
        await there.gateway.aclose()

    run(body)


def test_what_another_process_forgets_is_gone_here_at_the_next_question_or_before_it(tmp_path: Path) -> None:
    async def body() -> None:
        here, there = (Bench(forgets=Forgets(tmp_path / "forgets")) for _ in range(2))
        told: list[Scope] = []
        here.gateway.on_forget(told.append)
        for tenant in ("a", "b"):
            await whole(await here.gateway.complete(ask(tenant=Tenant(tenant))))
        await here.settled()
        await there.gateway.forget(Scope(tenant=Tenant("a")))
        assert (await here.gateway.complete(ask(tenant=Tenant("b")))).source == "hit"
        assert (await here.gateway.complete(ask(tenant=Tenant("a")))).source == "miss"
        await there.gateway.forget(Scope(tenant=Tenant("b")))
        here.gateway.heed()  # without any question
        assert (await here.gateway.memory_stats())["exact"]["ram"].num_entries == 0
        assert told == [Scope(tenant=Tenant("a")), Scope(tenant=Tenant("b"))]

    run(body)


def test_a_level_that_cannot_drop_what_another_process_forgot_fails_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        bench = Bench(levels=[Broken("drop")], forgets=Forgets(tmp_path / "forgets"))
        Forgets(tmp_path / "forgets").tell(Scope())
        assert text(await whole(await bench.gateway.complete(ask()))) == "to be or not"
        assert [event.operation for event in bench.events if isinstance(event, Failed)] == ["drop"]

    run(body)
    assert "failed to drop" in caplog.text


class Broken:
    """A level that fails at some of what it is asked."""

    name = "broken"

    def __init__(self, *verbs: str) -> None:
        self.verbs = verbs

    def _try(self, verb: str) -> None:
        if verb in self.verbs:
            raise OSError("broken")

    async def lookup(self, question: Question) -> Hit[Completion] | Miss:
        self._try("lookup")
        return Miss(self.name, MissReason.ABSENT)

    async def learn(
        self,
        question: Question,
        value: Completion,
        *,
        clean: bool,
        cost_s: float,
        tags: tuple[str, ...] = (),
        since: Mark | None = None,
    ) -> Stored | Refused:
        self._try("learn")
        return Stored(self.name, question.key, 1)

    def mark(self) -> Mark:
        self._try("mark")
        return ()

    async def forget(self, scope: Scope) -> Forgotten:
        raise OSError("broken")

    def drop(self, scope: Scope) -> None:
        self._try("drop")

    async def stats(self) -> dict[str, TierStats]:
        return {}

    async def flush(self) -> None: ...

    async def aclose(self) -> None: ...


@pytest.mark.parametrize("verb", ["mark", "lookup", "learn"])
def test_where_the_cache_fails_the_request_succeeds_and_the_failure_is_counted(
    verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        bench = Bench(levels=[Broken(verb)])
        assert text(await whole(await bench.gateway.complete(ask()))) == "to be or not"
        await bench.settled()
        assert len(bench.of(Failed)) == 1
        # Who could not be asked cannot tell what was forgotten meanwhile: nothing is learned then.
        assert bench.of(Stored) == []

    run(body)
    assert "goes on without it" in caplog.text


class Reweighted(EchoBackend):
    """An echo whose weights change under a request."""

    weights = 1

    async def models(self) -> tuple[ModelInfo, ...]:
        return (ModelInfo("echo", fingerprint=f"echo-{self.weights}"),)


def test_an_answer_of_other_weights_than_were_asked_is_not_learned() -> None:
    async def body() -> None:
        gate = Gate(at=1)
        backend = Reweighted(Options(), gate=gate)
        bench = Bench(backend=backend)
        await backend.start()
        answer = await bench.gateway.complete(ask())
        await gate.reached.wait()
        backend.weights = 2
        gate.open.set()
        await whole(answer)
        await bench.settled()
        assert bench.of(Stored) == []
        answer = await bench.gateway.complete(ask())
        assert answer.source == "miss"
        await whole(answer)

    run(body)


def test_remembered_answers_are_given_while_the_backend_is_away() -> None:
    async def body() -> None:
        bench = Bench()
        await bench.gateway.start()
        await whole(await bench.gateway.complete(ask()))
        await bench.settled()
        await bench.backend.aclose()
        assert not bench.gateway.ready()
        assert (await bench.gateway.complete(ask())).source == "hit"

    run(body)


def test_times_are_measured_on_the_clock() -> None:
    async def body() -> None:
        bench = Bench()

        async def tick(index: int) -> None:
            await asyncio.sleep(0)  # let the client read: each delta is a burst of its own
            bench.clock.advance(1)

        bench.backend.gate = tick
        answer = await bench.gateway.complete(ask("one two three"))
        assert isinstance(answer, Live)
        async for _ in answer:
            pass
        answered = bench.of(Answered)[0]
        assert isinstance(answered, Answered)
        assert answered.first_s == 2  # Begin, then the first word
        assert answered.gaps_s == (1, 1)
        assert answered.elapsed_s == 6  # the third word, Finish, End: the client was told of End at once
        assert answered.usage.output_tokens == 3
        await bench.settled()

    run(body)
