"""Whom a fleet asks, in which order, how often, and what it does not do twice. Its upstreams say what they are told to."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.backends.echo import EchoBackend
from anaphora.backends.optimising import OptimiserOptions
from anaphora.backends.upstream import Upstream, UpstreamOptions
from anaphora.clock import ManualClock
from anaphora.config import GatewayConfig, RouteConfig, UpstreamConfig
from anaphora.errors import BackendFailed, InvalidRequest, ModelNotFound, ServiceError, UpstreamFailed
from anaphora.fleet import PATIENCE_S, Fleet
from anaphora.routing.round_robin import RoundRobin
from anaphora.types import Begin, Delta, End, Finish, Message, Raw, Request, TextDelta, TextPart, Usage
from anaphora.wire.upstream_anthropic import UpstreamAnthropic
from anaphora.wire.upstream_chat import UpstreamChat

BEGIN, HI = Begin("theirs", Usage(input_tokens=1)), TextDelta(0, "hi")
RAW = Raw("openai_chat", b"data: {}\n\n")
ANSWER: tuple[Delta, ...] = (RAW, BEGIN, HI, Finish(0, "end_turn"), End(Usage(input_tokens=1, output_tokens=1)))

BUSY = UpstreamFailed("busy", 529, elsewhere=True, again=True)
BROKEN = UpstreamFailed("broken", 500, elsewhere=True)
WRONG = UpstreamFailed("wrong", 400)

Script = Sequence[Delta | ServiceError]


class Scripted(Upstream):
    """Each request gets the next script; when there is none left, `ANSWER`."""

    def __init__(self, config: UpstreamConfig, scripts: Iterable[Script], asked: list[tuple[str, str]]) -> None:
        options = UpstreamOptions(config.name, config.base_url, models=config.models, rename=config.rename)
        anthropic = config.dialect == "anthropic"
        dialect = UpstreamAnthropic() if anthropic else UpstreamChat()
        super().__init__(options, {dialect.name: dialect})
        self._scripts = list(scripts)
        self._asked = asked
        self.closed = 0

    async def start(self) -> None:
        pass

    async def bursts(self, request: Request, optimiser: OptimiserOptions | None = None) -> AsyncGenerator[list[Delta], None]:
        self._asked.append((self.name, request.model))
        try:
            for step in self._scripts.pop(0) if self._scripts else ANSWER:
                if isinstance(step, ServiceError):
                    raise step
                yield [step]
        finally:
            self.closed += 1


class Stage:
    """A fleet of `upstreams`, each with its scripts, and what became of it."""

    def __init__(
        self,
        upstreams: dict[str, list[Script]],
        *,
        routes: tuple[RouteConfig, ...] = (),
        retries: int = 2,
        failures: int = 100,
        local: EchoBackend | None = None,
        **fields: dict[str, Any],
    ) -> None:
        configs = tuple(
            UpstreamConfig(name=name, base_url=f"http://{name}", retries=retries, **fields.get(name, {})) for name in upstreams
        )
        config = GatewayConfig(upstreams=configs, routes=routes, breaker_failures=failures, breaker_rest_s=10.0)
        self.asked: list[tuple[str, str]] = []
        self.pauses_s: list[float] = []
        self.clock = ManualClock(0.0)
        self.made: dict[str, Scripted] = {}

        def make(one: UpstreamConfig) -> Scripted:
            self.made[one.name] = Scripted(one, upstreams[one.name], self.asked)
            return self.made[one.name]

        self.fleet = Fleet(config, make, RoundRobin(), local=local, clock=self.clock, sleep=self._sleep, rng=random.Random(7))

    async def _sleep(self, seconds: float) -> None:
        self.pauses_s.append(seconds)
        self.clock.advance(seconds)

    def ask(self, model: str = "m") -> list[Delta]:
        return asyncio.run(self.answer(model))

    async def answer(self, model: str = "m", heard: list[Delta] | None = None) -> list[Delta]:
        """`heard`: gets all of it, also of an answer that fails."""
        request = Request(model=model, messages=(Message("user", (TextPart("hello"),)),))
        heard = [] if heard is None else heard
        async for delta in self.fleet.run(request):
            heard += [delta]
        return heard

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.asked]


def route(*upstreams: str, fallbacks: tuple[str, ...] = ()) -> tuple[RouteConfig, ...]:
    return (RouteConfig(models=("m",), upstreams=upstreams, fallbacks=fallbacks),)


def text(deltas: Iterable[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))


# -- whom ----------------------------------------------------------------------------------------------------------------


def test_whoever_names_a_model_most_exactly_is_asked() -> None:
    models: dict[str, Any] = {
        "all": {"models": ("*",)},
        "claude": {"models": ("claude-*",)},
        "opus": {"models": ("claude-opus-*",)},
        "one": {"models": ("claude-opus-5",)},
    }
    stage = Stage({name: [] for name in models}, **models)
    for model in ("gpt", "claude-haiku", "claude-opus-4", "claude-opus-5"):
        stage.ask(model)
    assert stage.names == ["all", "claude", "opus", "one"]


def test_a_route_is_asked_whatever_the_patterns_say() -> None:
    stage = Stage({"a": [], "b": []}, routes=route("b"), a={"models": ("m",)}, b={"models": ("other",)})
    stage.ask()
    assert stage.names == ["b"]


def test_those_of_a_pool_take_turns() -> None:
    stage = Stage({"a": [], "b": [], "c": []})
    for _ in range(6):
        stage.ask()
    assert sorted(stage.names[:3]) == sorted(stage.names[3:]) == ["a", "b", "c"]


def test_a_model_that_nobody_names_does_not_exist() -> None:
    stage = Stage({"a": []}, a={"models": ("claude-*",)})
    assert stage.fleet.model("gpt") is None
    assert not stage.fleet.hosts("gpt")
    with pytest.raises(ModelNotFound):
        stage.ask("gpt")


def test_an_engine_of_ones_own_answers_for_its_models() -> None:
    async def main() -> None:
        stage = Stage({"a": []}, local=EchoBackend())
        await stage.fleet.start()
        assert [model.id for model in await stage.fleet.models()] == ["echo"]
        assert text(await stage.answer("echo")) == "hello"
        assert text(await stage.answer("m")) == "hi"
        assert stage.names == ["a"]
        assert not stage.fleet.hosts("echo")

    asyncio.run(main())


def test_a_body_goes_out_as_it_came_where_anybody_of_the_pool_speaks_its_dialect() -> None:
    stage = Stage({"a": [], "b": []}, a={"dialect": "anthropic"})
    assert stage.fleet.passes_on("m", "anthropic")
    assert stage.fleet.passes_on("m", "openai_chat")
    assert not stage.fleet.passes_on("m", "openai_responses")


def test_a_models_fingerprint_changes_with_who_answers_for_it() -> None:
    stages = [
        Stage({"a": []}),
        Stage({"b": []}),
        Stage({"a": [], "b": []}),
        Stage({"a": []}, a={"rename": {"m": "n"}}),
        Stage({"a": []}),
    ]
    prints = [model.fingerprint for stage in stages if (model := stage.fleet.model("m")) is not None]
    assert prints[0] == prints[4]
    assert len(set(prints)) == 4


# -- who else ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [BUSY, BROKEN, BackendFailed("cut"), InvalidRequest("cannot be said")])
def test_where_one_cannot_answer_the_next_is_asked_at_once(error: ServiceError) -> None:
    stage = Stage({"a": [[error]], "b": [[error]], "c": []}, routes=route("a", fallbacks=("b", "c")))
    assert text(stage.ask()) == "hi"
    assert stage.names == ["a", "b", "c"]
    assert stage.pauses_s == []


def test_what_is_the_clients_mistake_is_nobody_elses_business() -> None:
    stage = Stage({"a": [[WRONG]], "b": []}, routes=route("a", fallbacks=("b",)))
    with pytest.raises(UpstreamFailed, match="wrong"):
        stage.ask()
    assert stage.names == ["a"]


def test_a_fallback_may_be_another_model_whose_answer_is_not_remembered() -> None:
    stage = Stage({"a": [[BROKEN]], "b": []}, routes=route("a", fallbacks=("b:other",)))
    deltas = stage.ask()
    assert stage.asked == [("a", "m"), ("b", "other")]
    assert isinstance(deltas[-1], End)
    assert not deltas[-1].faithful
    stage = Stage({"a": [], "b": []}, routes=route("a", fallbacks=("b:other",)))
    own = stage.ask()[-1]
    assert isinstance(own, End)
    assert own.faithful


def test_that_one_cannot_be_asked_in_its_dialect_does_not_hide_that_the_other_failed() -> None:
    stage = Stage({"a": [[BUSY]] * 3, "b": [[InvalidRequest("cannot be said")]] * 3}, routes=route("a", fallbacks=("b",)))
    with pytest.raises(UpstreamFailed, match="busy"):
        stage.ask()


def test_once_a_client_was_given_anything_nobody_else_continues() -> None:
    stage = Stage({"a": [[RAW, BEGIN, HI, BROKEN]], "b": []}, routes=route("a", fallbacks=("b",)))
    heard: list[Delta] = []
    with pytest.raises(UpstreamFailed, match="broken"):
        asyncio.run(stage.answer(heard=heard))
    assert text(heard) == "hi"
    assert stage.names == ["a"]


def test_the_beginning_of_an_answer_is_held_back_while_somebody_else_could_give_one() -> None:
    stage = Stage({"a": [[RAW, BEGIN, BROKEN]], "b": []}, routes=route("a", fallbacks=("b",)))
    deltas = stage.ask()
    assert [type(delta) for delta in deltas] == [type(delta) for delta in ANSWER]
    begin = deltas[1]
    assert isinstance(begin, Begin)
    assert begin.upstream == "b"


def test_the_only_one_who_can_answer_is_passed_on_from_its_first_byte() -> None:
    async def main() -> None:
        stage = Stage({"a": []})
        async with aclosing(_generator(stage.fleet.run(Request(model="m")))) as deltas:
            assert await anext(deltas) == RAW
        assert stage.made["a"].closed == 1  # and whoever stops reading ends it

    asyncio.run(main())


async def _generator(deltas: Any) -> AsyncGenerator[Delta, None]:
    async with aclosing(deltas):
        async for delta in deltas:
            yield delta


# -- once more -----------------------------------------------------------------------------------------------------------


def test_everybody_is_asked_again_after_a_pause_that_grows() -> None:
    stage = Stage({"a": [[BUSY]] * 3, "b": [[BUSY]] * 3}, routes=route("a", fallbacks=("b",)), retries=3)
    assert text(stage.ask()) == "hi"
    assert stage.names == ["a", "b"] * 3 + ["a"]
    first_s, second_s, third_s = stage.pauses_s
    assert 0.25 <= first_s <= 0.75
    assert 0.5 <= second_s <= 1.5
    assert 1.0 <= third_s <= 3.0


@pytest.mark.parametrize(("retries", "times"), [(0, 1), (1, 2), (4, 5)])
def test_retries_are_counted(retries: int, times: int) -> None:
    stage = Stage({"a": [[BUSY]] * 9}, retries=retries)
    with pytest.raises(UpstreamFailed, match="busy"):
        stage.ask()
    assert len(stage.asked) == times


def test_what_may_not_be_repeated_is_not() -> None:
    stage = Stage({"a": [[BROKEN]]})
    with pytest.raises(UpstreamFailed, match="broken"):
        stage.ask()
    assert stage.names == ["a"]


def test_whoever_says_that_it_may_be_asked_again_is_and_nobody_else() -> None:
    again = UpstreamFailed("conflict", 409, again=True)
    stage = Stage({"a": [[again]], "b": []}, routes=route("a", fallbacks=("b",)))
    assert text(stage.ask()) == "hi"
    assert stage.names == ["a", "a"]


def test_a_pause_is_as_long_as_was_asked_for_but_no_client_waits_too_long() -> None:
    wait = UpstreamFailed("later", 429, elsewhere=True, again=True, retry_after_s=7.0)
    stage = Stage({"a": [[wait]]})
    stage.ask()
    assert stage.pauses_s == [7.0]
    long = UpstreamFailed("much later", 429, elsewhere=True, again=True, retry_after_s=PATIENCE_S + 1)
    stage = Stage({"a": [[long]]})
    with pytest.raises(UpstreamFailed, match="much later"):
        stage.ask()
    assert stage.pauses_s == []


# -- the breaker ---------------------------------------------------------------------------------------------------------


def test_who_fails_too_often_is_passed_over_until_it_has_rested() -> None:
    stage = Stage({"a": [[BROKEN]] * 2, "b": []}, routes=route("a", fallbacks=("b",)), failures=2)
    for _ in range(4):
        stage.ask()
    assert stage.names == ["a", "b", "a", "b", "b", "b"]
    stage.clock.advance(10.0)
    stage.ask()
    stage.ask()
    assert stage.names[6:] == ["a", "a"]


def test_where_everybody_rests_the_client_is_told_until_when() -> None:
    stage = Stage({"a": [[BROKEN]]}, failures=1)
    with pytest.raises(UpstreamFailed, match="broken"):
        stage.ask()
    stage.clock.advance(4.0)
    with pytest.raises(UpstreamFailed, match="a failed too often") as resting:
        stage.ask()
    assert (resting.value.status, resting.value.code, resting.value.retry_after_s) == (503, "upstream_resting", 6.0)
    assert len(stage.asked) == 1


@pytest.mark.parametrize("error", [WRONG, UpstreamFailed("limited", 429), InvalidRequest("cannot be said")])
def test_refusals_do_not_open_it(error: ServiceError) -> None:
    stage = Stage({"a": [[error]] * 5}, failures=1)
    for _ in range(5):
        with pytest.raises(ServiceError):
            stage.ask()
    assert text(stage.ask()) == "hi"


def test_what_cannot_be_asked_says_nothing_of_whoever_was_not_asked() -> None:
    stage = Stage({"a": [[BROKEN], [InvalidRequest("cannot be said")], [BROKEN]]}, failures=1)
    for advance_s in (0.0, 10.0, 0.0):
        stage.clock.advance(advance_s)
        with pytest.raises(ServiceError):
            stage.ask()
    stage.clock.advance(10.0)  # the third was a trial still: it failed, and the rest is twice as long
    with pytest.raises(UpstreamFailed, match="failed too often"):
        stage.ask()
    stage.clock.advance(10.0)
    assert text(stage.ask()) == "hi"


# -- whatever happens ----------------------------------------------------------------------------------------------------

OUTCOMES: dict[str, Callable[[], Script]] = {
    "answers": lambda: ANSWER,
    "busy": lambda: (BUSY,),
    "broken": lambda: (RAW, BEGIN, BROKEN),
    "wrong": lambda: (WRONG,),
    "cut": lambda: (RAW, BEGIN, HI, BackendFailed("cut")),
    "untranslatable": lambda: (InvalidRequest("cannot be said"),),
}
SCRIPTS = st.lists(st.sampled_from(sorted(OUTCOMES)), max_size=4)


@given(SCRIPTS, SCRIPTS, SCRIPTS, st.integers(0, 2), st.integers(1, 3))
def test_a_client_gets_one_whole_answer_or_one_error(
    first: list[str], second: list[str], third: list[str], retries: int, failures: int
) -> None:
    scripts = {
        name: [OUTCOMES[outcome]() for outcome in outcomes] for name, outcomes in (("a", first), ("b", second), ("c", third))
    }
    stage = Stage(scripts, routes=route("a", "b", fallbacks=("c",)), retries=retries, failures=failures)
    for _ in range(4):
        before = len(stage.asked)
        heard: list[Delta] = []
        try:
            asyncio.run(stage.answer(heard=heard))
        except ServiceError:
            assert not any(isinstance(delta, End) for delta in heard)
        else:
            assert [type(delta) for delta in heard] == [type(delta) for delta in ANSWER]
        assert text(heard) in ("", "hi")
        assert len(stage.asked) - before <= 3 * (retries + 1)
        assert len(stage.pauses_s) <= retries * 4
    assert sum(upstream.closed for upstream in stage.made.values()) == len(stage.asked)
