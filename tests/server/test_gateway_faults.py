"""What a client of a gateway sees of a provider that fails, and what the gateway does about it first."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from tests.server.gateways import CLAUDE, GPT, OUR_KEY, Gateway, gateway, the_one, upstream

from anaphora.testing.upstream import Control, Match, Upstream

AGAIN = "gpt-5.4"
POOL, OTHER_MODEL, FALLEN = "gpt-5-mini", "gpt-5-nano", "gpt-4.1"
FIRST, BETWEEN, TOTAL, CONNECT = "first-token", "between-tokens", "in-total", "to-connect"
LIMIT_S = 0.4

_numbers = itertools.count()


@pytest.fixture(scope="module")
def primary() -> Iterator[Upstream]:
    with Upstream("primary") as one:
        yield one


@pytest.fixture(scope="module")
def spare() -> Iterator[Upstream]:
    with Upstream("spare") as one:
        yield one


@pytest.fixture(scope="module")
def deaf() -> Iterator[str]:
    """An address where connections are neither taken nor refused."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # until its queue is full
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def nobody() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def served(
    primary: Upstream, spare: Upstream, deaf: str, nobody: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    toml = "[gateway]\nbreaker_failures = 1000\n"
    toml += upstream("claude", primary, "claude-*") + upstream("gpt", primary, GPT)
    toml += upstream("again", primary, AGAIN, retries=2)
    for model, limits in (
        (FIRST, {"first_s": LIMIT_S}),
        (BETWEEN, {"between_s": LIMIT_S}),
        (TOTAL, {"total_s": LIMIT_S}),
        (CONNECT, {"connect_s": LIMIT_S, "base_url": deaf}),
    ):
        toml += upstream(model, primary, model, rename={model: GPT}, **limits)
    toml += upstream("nobody", primary, "no-model", base_url=nobody, retries=1)
    toml += upstream("one", primary, "one-*", retries=0) + upstream("other", spare, "other-*")
    toml += upstream("spare-claude", spare, "spare-*", dialect="anthropic")
    toml += _route(POOL, ["one"], ["other", f"spare-claude:{CLAUDE}"])
    toml += _route(OTHER_MODEL, ["one"], [f"spare-claude:{CLAUDE}"])
    toml += _route(FALLEN, ["nobody"], ["other"])
    with gateway(toml, tmp_path_factory.mktemp("gateway")) as served:
        yield served


def _route(model: str, upstreams: list[str], fallbacks: list[str]) -> str:
    return f"[[gateway.routes]]\nmodels = ['{model}']\nupstreams = {upstreams}\nfallbacks = {fallbacks}\n"


@pytest.fixture(autouse=True)
def _nothing_seen(primary: Upstream, spare: Upstream) -> None:
    primary.clear()
    spare.clear()


@pytest.fixture(scope="module")
def claude(served: Gateway) -> Iterator[anthropic.Anthropic]:
    with served.claude() as client:
        yield client


@pytest.fixture(scope="module")
def gpt(served: Gateway) -> Iterator[openai.OpenAI]:
    with served.gpt() as client:
        yield client


def say(text: str = "a question of five words or so") -> Any:
    """That was not asked before."""
    return [{"role": "user", "content": f"{text} {next(_numbers)}"}]


def message(claude: anthropic.Anthropic, model: str = CLAUDE, **fields: Any) -> Any:
    return claude.messages.create(**{"model": model, "max_tokens": 99, "messages": say(), **fields})


def chat(gpt: openai.OpenAI, model: str = GPT, **fields: Any) -> Any:
    return gpt.chat.completions.create(**{"model": model, "messages": say(), **fields})


def response(gpt: openai.OpenAI, model: str = GPT, **fields: Any) -> Any:
    return gpt.responses.create(**{"model": model, "input": say(), **fields})


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[str, type[anthropic.APIStatusError], type[openai.APIStatusError], str]] = [
    ("400", anthropic.BadRequestError, openai.BadRequestError, "invalid_request_error"),
    ("404", anthropic.NotFoundError, openai.NotFoundError, "not_found_error"),
    ("413", anthropic.ContentTooLargeError, openai.APIStatusError, "request_too_large"),
    ("429", anthropic.RateLimitError, openai.RateLimitError, "rate_limit_error"),
    ("500", anthropic.InternalServerError, openai.InternalServerError, "api_error"),
    ("503", anthropic.ServiceUnavailableError, openai.InternalServerError, "overloaded_error"),
    ("529", anthropic.OverloadedError, openai.InternalServerError, "overloaded_error"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("status", "claudes", "gpts", "kind"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_a_refusal_is_told_in_the_words_of_the_clients_dialect(
    claude: anthropic.Anthropic,
    gpt: openai.OpenAI,
    primary: Control,
    status: str,
    claudes: type[anthropic.APIStatusError],
    gpts: type[openai.APIStatusError],
    kind: str,
    stream: bool,
) -> None:
    """At every way from a dialect to another. Each has its own number for a provider with too much to do."""
    for model in (CLAUDE, GPT):
        primary.fault(status, message="not now", count=3)
        busy = status in ("503", "529")
        expected = anthropic.OverloadedError if busy and model == GPT else claudes
        with pytest.raises(expected, match="not now") as of_claude:
            message(claude, model, stream=stream)
        body: Any = of_claude.value.body
        assert body["error"]["type"] == kind
        for call in (chat, response):
            with pytest.raises(gpts, match="not now") as of_gpt:
                call(gpt, model, stream=stream)
            assert of_gpt.value.status_code == (503 if busy and model == CLAUDE else int(status))
    assert [record.outcome for record in primary.requests()] == ["fault"] * 6


def test_that_our_own_key_was_refused_is_nothing_the_client_could_mend(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with Upstream("strict", keys=["another"]) as strict:
        toml = upstream("one", strict, "claude-*") + upstream("two", strict, "gpt-*")
        with gateway(toml, tmp_path_factory.mktemp("refused")) as served, served.claude() as claude, served.gpt() as gpt:
            with pytest.raises(anthropic.InternalServerError, match="one refused its API key") as of_claude:
                message(claude)
            with pytest.raises(openai.InternalServerError, match="two refused its API key") as of_gpt:
                chat(gpt)
        assert of_claude.value.status_code == of_gpt.value.status_code == 502
        assert OUR_KEY not in str(of_claude.value.body)


# -- once more -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["429", "503", "529", "500"])
def test_what_certainly_was_not_answered_is_asked_once_more(gpt: openai.OpenAI, primary: Control, status: str) -> None:
    primary.fault(status)
    assert chat(gpt, AGAIN).choices[0].message.content
    assert [record.outcome for record in primary.requests()] == ["fault", "finished"]


def test_retry_after_is_waited_for(gpt: openai.OpenAI, primary: Control) -> None:
    primary.fault("429", retry_after_s=1.0)
    assert chat(gpt, AGAIN).choices
    first, second = primary.requests()
    assert second.arrived_s - first.arrived_s >= 1.0


def test_a_long_retry_after_is_passed_on_at_once(gpt: openai.OpenAI, claude: anthropic.Anthropic, primary: Control) -> None:
    primary.fault("429", retry_after_s=100, count=2)
    with pytest.raises(openai.RateLimitError) as of_gpt:
        chat(gpt, AGAIN)
    with pytest.raises(anthropic.RateLimitError) as of_claude:
        message(claude, AGAIN)
    for error in (of_gpt.value, of_claude.value):
        assert error.response.headers["retry-after"] == "100"
    assert len(primary.requests()) == 2


def test_the_providers_word_on_retrying_is_obeyed(gpt: openai.OpenAI, primary: Control) -> None:
    primary.fault("503", should_retry=False)
    with pytest.raises(openai.InternalServerError) as error:
        chat(gpt, AGAIN)
    assert error.value.response.headers["x-should-retry"] == "false"
    assert len(primary.requests()) == 1
    primary.fault("409", should_retry=True)
    assert chat(gpt, AGAIN).choices
    assert [record.outcome for record in primary.requests()] == ["fault", "fault", "finished"]


def test_retries_come_to_an_end(gpt: openai.OpenAI, primary: Control) -> None:
    primary.fault("529", count=None)
    with pytest.raises(openai.InternalServerError) as error:
        chat(gpt, AGAIN)
    assert error.value.response.headers["x-should-retry"] == "true"
    assert len(primary.requests()) == 3


@pytest.mark.parametrize(
    ("fields", "times"),
    [
        ({"store": False}, 2),
        ({"store": False, "tools": [{"type": "function", "name": "look", "parameters": {"type": "object"}}]}, 2),
        ({"store": True}, 1),
        ({"store": False, "background": True}, 1),
        ({"store": False, "tools": [{"type": "web_search"}]}, 1),
    ],
    ids=["plain", "functions", "stored", "background", "server tools"],
)
def test_what_may_have_had_effects_is_not_asked_again_after_a_500(
    gpt: openai.OpenAI, primary: Control, fields: dict[str, Any], times: int
) -> None:
    primary.fault("500", count=1)
    try:
        response(gpt, AGAIN, **fields)
        assert times == 2
    except openai.InternalServerError:
        assert times == 1
    assert len(primary.requests()) == times


def test_a_refused_connection_is_tried_again_and_then_told(claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
    with pytest.raises(anthropic.InternalServerError, match="nobody cannot be reached") as of_claude:
        message(claude, "no-model")
    with pytest.raises(openai.InternalServerError, match="nobody cannot be reached") as of_gpt:
        chat(gpt, "no-model")
    assert of_claude.value.status_code == of_gpt.value.status_code == 502


def test_a_provider_that_is_back_after_a_moment_answers(tmp_path: Path) -> None:
    with Upstream("restarts") as restarts:
        toml = upstream("restarts", restarts, "gpt-*", retries=3)
        with gateway(toml, tmp_path) as served, served.gpt() as gpt, ThreadPoolExecutor(1) as pool:
            with restarts.refusing():
                answer = pool.submit(chat, gpt)
                served.wait_for("restarts cannot be reached")
            assert answer.result().choices
        assert the_one(restarts).outcome == "finished"


# -- somebody else -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["500", "529", "429", "cut", "reset", "malformed-json"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_where_one_cannot_answer_the_next_does(
    gpt: openai.OpenAI, primary: Control, spare: Control, kind: str, stream: bool
) -> None:
    primary.fault(kind, after_events=0)
    question = say()
    answer = chat(gpt, POOL, messages=question, stream=stream)
    text = _text(answer) if stream else answer.choices[0].message.content
    assert text == question[0]["content"]
    assert [the_one(control).model for control in (primary, spare)] == [POOL, POOL]


def _text(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_client_that_was_answered_in_part_gets_nobody_elses_rest(
    gpt: openai.OpenAI, primary: Control, spare: Control
) -> None:
    primary.fault("cut", after_events=4)
    with pytest.raises(openai.APIError):
        _text(chat(gpt, POOL, stream=True))
    assert spare.requests() == []


def test_a_refused_connection_is_somebody_elses_business(gpt: openai.OpenAI, spare: Control) -> None:
    assert chat(gpt, FALLEN).choices
    assert the_one(spare).outcome == "finished"


def test_a_bad_request_is_nobody_elses_business(gpt: openai.OpenAI, primary: Control, spare: Control) -> None:
    primary.fault("400")
    with pytest.raises(openai.BadRequestError):
        chat(gpt, POOL)
    assert spare.requests() == []


def test_another_model_answers_in_its_place_but_not_in_its_name(gpt: openai.OpenAI, primary: Control, spare: Control) -> None:
    primary.fault("529")
    question = say()
    answer = chat(gpt, OTHER_MODEL, messages=question)
    assert (answer.model, answer.choices[0].message.content) == (OTHER_MODEL, question[0]["content"])
    assert (the_one(spare).model, the_one(spare).path) == (CLAUDE, "/v1/messages")
    chat(gpt, OTHER_MODEL, messages=question)
    assert [record.outcome for record in primary.requests()] == ["fault", "finished"]  # it was not remembered


def test_all_fallbacks_are_asked_in_their_order(gpt: openai.OpenAI, primary: Control, spare: Control) -> None:
    primary.fault("529")
    spare.fault("529", match=Match(path="/v1/chat/completions"))
    assert chat(gpt, POOL).choices
    assert [(record.path, record.outcome) for record in spare.requests()] == [
        ("/v1/chat/completions", "fault"),
        ("/v1/messages", "finished"),
    ]


# -- the breaker ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fragile(primary: Upstream, tmp_path: Path) -> Iterator[openai.OpenAI]:
    """In front of a gateway that loses patience after four failures."""
    toml = "[gateway]\nbreaker_failures = 4\nbreaker_rest_s = 0.5\n" + upstream("gpt", primary, "gpt-*")
    with gateway(toml, tmp_path) as served, served.gpt() as client:
        yield client


def test_a_provider_that_keeps_failing_is_left_alone_for_a_while(fragile: openai.OpenAI, primary: Control) -> None:
    primary.fault("429", count=5)
    for _ in range(5):  # that it limits its clients is no failure
        with pytest.raises(openai.RateLimitError):
            chat(fragile)
    primary.fault("500", count=None)
    for _ in range(4):
        with pytest.raises(openai.InternalServerError, match="told to answer"):
            chat(fragile)
    with pytest.raises(openai.InternalServerError, match="failed too often") as resting:
        chat(fragile)
    assert (resting.value.status_code, resting.value.code) == (503, "upstream_resting")
    assert int(resting.value.response.headers["retry-after"]) >= 1
    assert len(primary.requests()) == 9
    primary.clear()
    while _rests(fragile):
        pass
    assert chat(fragile).choices
    assert [record.outcome for record in primary.requests()] == ["finished"] * 2


def _rests(client: openai.OpenAI) -> bool:
    """False: it has answered."""
    try:
        chat(client)
    except openai.InternalServerError as error:
        if error.code != "upstream_resting":
            raise
        return True
    return False


# -- too slow ------------------------------------------------------------------------------------------------------------

TOO_LATE: list[tuple[str, str, int, bool, str]] = [
    (FIRST, "slow", 0, True, "no first token came within 0.4 s"),
    (FIRST, "stall", 1, True, "no first token came within 0.4 s"),
    (BETWEEN, "stall", 4, True, "nothing more came within 0.4 s"),
    (TOTAL, "slow", 0, False, "the answer was not over within 0.4 s"),
    (TOTAL, "stall", 0, False, "the answer was not over within 0.4 s"),
    (TOTAL, "slow", 0, True, "the answer was not over within 0.4 s"),
    (TOTAL, "stall", 4, True, "the answer was not over within 0.4 s"),
]


@pytest.mark.parametrize(("model", "kind", "at", "stream", "words"), TOO_LATE)
def test_an_answer_that_takes_too_long_is_given_up(
    gpt: openai.OpenAI, primary: Control, model: str, kind: str, at: int, stream: bool, words: str
) -> None:
    primary.fault(kind, after_events=at)
    with pytest.raises(openai.APIError, match=words) as error:
        list(chat(gpt, model, stream=stream))
    assert the_one(primary).outcome == "left"
    assert error.value.code == "upstream_timeout"
    if not stream or kind == "slow":
        assert isinstance(error.value, openai.APIStatusError)
        assert error.value.status_code == 504


def test_a_connection_that_takes_too_long_is_given_up(gpt: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match=f"{CONNECT} cannot be reached"):
        chat(gpt, CONNECT)
