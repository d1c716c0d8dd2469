"""What goes through a gateway as it is, what is refused because it cannot be said in the other dialect, and whose key goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest
from tests.server.gateways import CLAUDE, CLIENT_KEY, GPT, OUR_KEY, Gateway, gateway, the_one, upstream
from tests.server.provided import COMPLETION, MESSAGE, Json

from anaphora.testing.upstream import Control, Match, Upstream
from anaphora.wire import sse

OPEN_CLAUDE, OPEN_GPT = "claude-haiku-4-5", "gpt-5.4"
"""Models of providers that clients bring their own keys for."""
ALICE, BOB, MALLORY = "key-of-alice", "key-of-bob", "key-of-mallory"


@pytest.fixture(scope="module")
def providers() -> Iterator[tuple[Upstream, Upstream, Upstream]]:
    with (
        Upstream("anthropic", keys=[OUR_KEY]) as one,
        Upstream("openai", keys=[OUR_KEY]) as other,
        Upstream("open", keys=[ALICE, BOB]) as third,
    ):
        yield one, other, third


@pytest.fixture(scope="module")
def served(providers: tuple[Upstream, Upstream, Upstream], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    one, other, third = providers
    toml = upstream("anthropic", one, "claude-*") + upstream("openai", other, "gpt-*")
    toml += upstream("open-anthropic", third, OPEN_CLAUDE, key_env=None)
    toml += upstream("open-openai", third, OPEN_GPT, key_env=None)
    with gateway(toml, tmp_path_factory.mktemp("gateway")) as served:
        yield served


@pytest.fixture(autouse=True)
def _nothing_seen(providers: tuple[Upstream, Upstream, Upstream]) -> None:
    for provider in providers:
        provider.clear()


@pytest.fixture
def at_anthropic(providers: tuple[Upstream, Upstream, Upstream]) -> Control:
    return providers[0]


@pytest.fixture
def at_openai(providers: tuple[Upstream, Upstream, Upstream]) -> Control:
    return providers[1]


@pytest.fixture
def at_open(providers: tuple[Upstream, Upstream, Upstream]) -> Control:
    return providers[2]


@pytest.fixture
def claude(served: Gateway) -> Iterator[anthropic.Anthropic]:
    with served.claude() as client:
        yield client


@pytest.fixture
def gpt(served: Gateway) -> Iterator[openai.OpenAI]:
    with served.gpt() as client:
        yield client


def say(text: str) -> Any:
    return [{"role": "user", "content": text}]


# -- to a provider of the client's own dialect ---------------------------------------------------------------------------

NEW = {"of": ["another", {"age": 1.5}], "nothing": None}
"""What nobody knows of yet."""


def test_unknown_fields_and_blocks_reach_anthropic_untouched(claude: anthropic.Anthropic, at_anthropic: Control) -> None:
    hologram = {"type": "hologram", "beam": NEW}
    marked = {"type": "text", "text": "what is it?", "cache_control": {"type": "ephemeral", "ttl": "1h", "x_depth": 3}}
    messages: Any = [{"role": "user", "content": [hologram, marked], "x_mood": "curious"}]
    tools: Any = [{"type": "telepathy_20300101", "name": "telepathy", "range": NEW}]
    at_anthropic.answer(body=MESSAGE)
    answer = claude.messages.create(
        model=CLAUDE, max_tokens=9, messages=messages, tools=tools, metadata={"user_id": "7"}, extra_body={"x_new": NEW}
    )
    assert answer.content[0].type == "text"
    assert the_one(at_anthropic).body == {
        "model": CLAUDE,
        "max_tokens": 9,
        "messages": messages,
        "metadata": {"user_id": "7"},
        "tools": tools,
        "x_new": NEW,
    }


def test_unknown_fields_and_parts_reach_chat_untouched(gpt: openai.OpenAI, at_openai: Control) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "smell", "smell": NEW}], "x_mood": "curious"}]
    tools: Any = [{"type": "custom", "custom": {"name": "grep", "format": NEW}}]
    at_openai.answer(body=COMPLETION)
    gpt.chat.completions.create(
        model=GPT, messages=messages, tools=tools, service_tier="flex", logit_bias={"1": -100}, extra_body={"x_new": NEW}
    )
    assert the_one(at_openai).body == {
        "model": GPT,
        "messages": messages,
        "tools": tools,
        "service_tier": "flex",
        "logit_bias": {"1": -100},
        "x_new": NEW,
    }


def test_unknown_fields_and_items_reach_responses_untouched(gpt: openai.OpenAI, at_openai: Control) -> None:
    items: Any = [{"type": "dream", "dream": NEW}, {"role": "user", "content": "and?"}]
    at_openai.answer(body={"id": "resp_1", "object": "response", "status": "completed", "output": [], "model": GPT})
    gpt.responses.create(
        model=GPT, input=items, tools=[{"type": "web_search"}], previous_response_id="resp_0", extra_body={"x_new": NEW}
    )
    assert the_one(at_openai).body == {
        "model": GPT,
        "input": items,
        "tools": [{"type": "web_search"}],
        "previous_response_id": "resp_0",
        "x_new": NEW,
    }


def test_unknown_fields_and_blocks_of_an_answer_reach_a_client_of_its_dialect(
    claude: anthropic.Anthropic, gpt: openai.OpenAI, at_anthropic: Control, at_openai: Control
) -> None:
    message = {**MESSAGE, "content": [{"type": "hologram", "beam": NEW}, *MESSAGE["content"]], "x_new": NEW}
    at_anthropic.answer(body=message)
    raw = claude.messages.with_raw_response.create(model=CLAUDE, max_tokens=9, messages=say("show me"))
    assert json.loads(raw.text()) == message
    completion = {**COMPLETION, "x_new": NEW, "system_fingerprint": "fp_1"}
    at_openai.answer(body=completion)
    answer = gpt.chat.completions.with_raw_response.create(model=GPT, messages=say("show me"))
    assert json.loads(answer.text) == completion


def test_unknown_events_of_a_stream_reach_a_client_of_its_dialect_byte_for_byte(
    claude: anthropic.Anthropic, at_anthropic: Control
) -> None:
    events: list[Json] = [
        {"type": "message_start", "message": {**MESSAGE, "content": [], "stop_reason": None}},
        {"type": "aurora", "colours": NEW},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "hologram", "beam": NEW}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "beam_delta", "beam": "~"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1, "x_new": NEW}},
        {"type": "message_stop", "x_new": NEW},
    ]
    at_anthropic.answer(events=(": a comment\n\n", *events))
    create = claude.messages.with_streaming_response.create
    with create(model=CLAUDE, max_tokens=9, messages=say("stream it"), stream=True) as response:
        body = b"".join(response.iter_bytes())
    sent = [sse.event(str(event["type"]).encode(), json.dumps(event, separators=(",", ":")).encode()) for event in events]
    assert body == b": a comment\n\n" + b"".join(sent)


def test_what_deltas_cannot_say_is_left_out_for_other_dialects_and_not_remembered(
    gpt: openai.OpenAI, at_anthropic: Control
) -> None:
    message = {**MESSAGE, "content": [{"type": "hologram", "beam": NEW}, *MESSAGE["content"]]}
    at_anthropic.answer(body=message, count=2)
    for _ in range(2):
        answer = gpt.chat.completions.create(model=CLAUDE, messages=say("holograms?"))
        assert answer.choices[0].message.content == "hi"
    assert len(at_anthropic.requests()) == 2


def test_thinking_and_its_signature_go_there_and_come_back(
    claude: anthropic.Anthropic, gpt: openai.OpenAI, at_anthropic: Control, at_openai: Control
) -> None:
    earlier: Any = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
    hidden: Any = {"type": "redacted_thinking", "data": "aGlkZGVu"}
    messages: Any = [
        *say("think"),
        {"role": "assistant", "content": [earlier, hidden, {"type": "text", "text": "so"}]},
        *say("more"),
    ]
    at_anthropic.answer("It is so.", thinking="well then", signature="bmV3", count=2)
    answer = claude.messages.create(model=CLAUDE, max_tokens=99, messages=messages, thinking={"type": "adaptive"})
    again = claude.messages.create(model=CLAUDE, max_tokens=99, messages=messages, thinking={"type": "adaptive"})
    for said in (answer, again):
        thought, text = said.content
        assert thought.type == "thinking"
        assert (thought.thinking, thought.signature) == ("well then", "bmV3")
        assert text.type == "text"
    record = the_one(at_anthropic)  # the second one was remembered, signature and all
    assert record.body["messages"] == messages
    assert record.body["thinking"] == {"type": "adaptive"}
    with claude.messages.stream(model=CLAUDE, max_tokens=99, messages=say("again"), thinking={"type": "adaptive"}) as stream:
        assert [block.type for block in stream.get_final_message().content] == ["thinking", "text"]
    # Another provider's model can make nothing of it.
    talk = [messages[0], {"role": "assistant", "content": [earlier, {"type": "text", "text": "so"}]}, messages[2]]
    claude.messages.create(model=GPT, max_tokens=99, messages=talk)
    assert [message["content"] for message in the_one(at_openai).body["messages"]] == ["think", "so", "more"]


def test_several_choices_with_log_probabilities_come_from_chat(gpt: openai.OpenAI, at_openai: Control) -> None:
    answer = gpt.chat.completions.create(model=GPT, messages=say("two of them"), n=2, logprobs=True, top_logprobs=1)
    assert [choice.message.content for choice in answer.choices] == ["two of them"] * 2
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [entry.token for entry in choice.logprobs.content] == ["two ", "of ", "them"]
    again = gpt.chat.completions.create(model=GPT, messages=say("two of them"), n=2, logprobs=True, top_logprobs=1)
    assert [choice.logprobs for choice in again.choices] == [choice.logprobs for choice in answer.choices]
    stream = gpt.chat.completions.create(model=GPT, messages=say("two streams"), n=2, stream=True)
    texts = ["", ""]
    for chunk in stream:
        for piece in chunk.choices:
            texts[piece.index] += piece.delta.content or ""
    assert texts == ["two streams"] * 2
    assert len(at_openai.requests()) == 2


def test_usage_of_a_stream_comes_only_to_those_who_asked_for_it(gpt: openai.OpenAI, at_openai: Control) -> None:
    asked: list[Json] = [{}, {"stream_options": {"include_usage": True}}]
    for number, options in enumerate(asked):
        chunks = list(gpt.chat.completions.create(model=GPT, messages=say(f"usage {number}"), stream=True, **options))
        assert [chunk.usage is not None for chunk in chunks if not chunk.choices] == ([True] if options else [])
    assert [record.body["stream_options"] for record in at_openai.requests()] == [{"include_usage": True}] * 2


def test_limits_and_the_providers_own_id_are_told_to_the_client(claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
    message = claude.messages.with_raw_response.create(model=CLAUDE, max_tokens=9, messages=say("limits"))
    assert message.headers["anthropic-ratelimit-requests-limit"] == "4000"
    completion = gpt.chat.completions.with_raw_response.create(model=GPT, messages=say("limits"), stream=True)
    assert completion.headers["x-ratelimit-limit-requests"] == "4000"
    for headers, name in ((message.headers, "anthropic"), (completion.headers, "openai")):
        assert headers["x-anaphora-upstream"] == name
        assert headers["x-anaphora-upstream-request-id"].startswith("req_")
    completion.parse().close()


def test_betas_reach_the_provider_and_are_another_question(claude: anthropic.Anthropic, at_anthropic: Control) -> None:
    def ask(betas: dict[str, str]) -> str:
        create = claude.messages.with_raw_response.create
        headers = create(model=CLAUDE, max_tokens=9, messages=say("beta?"), extra_headers=betas).headers
        return str(headers["cache-status"])

    one, other = {"anthropic-beta": "interleaved-thinking-2025-05-14"}, {"anthropic-beta": "context-1m-2025-08-07"}
    assert ["hit" in ask(betas) for betas in ({}, one, other, one, {}, other)] == [False, False, False, True, True, True]
    assert [record.headers.get("anthropic-beta") for record in at_anthropic.requests()] == [
        None,
        *one.values(),
        *other.values(),
    ]


# -- what cannot be translated -------------------------------------------------------------------------------------------

SEARCH = {"type": "web_search_20250305", "name": "web_search"}
BEYOND: list[tuple[str, Json, str]] = [
    ("messages", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ("messages", {"extra_body": {"top_k": 5}, "extra_headers": {"anthropic-version": "2023-06-01"}}, "top_k"),
    ("messages", {"extra_body": {"x_new": 1}}, "x_new"),
    ("messages", {"tools": [SEARCH]}, "tools[0]"),
    ("messages", {"stop_sequences": ["a", "b", "c", "d", "e"]}, "stop"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "messages.0.content.0"),
    ("chat", {"n": 2}, "n"),
    ("chat", {"logprobs": True}, "logprobs"),
    ("chat", {"temperature": 1.5}, "temperature"),
    ("chat", {"frequency_penalty": 0.5}, "frequency_penalty"),
    ("chat", {"seed": 7}, "seed"),
    ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
    ("chat", {"logit_bias": {"1": 1}}, "logit_bias"),
    ("chat", {"messages": [{"role": "user", "content": "hi", "name": "joe"}]}, "messages[0].name"),
    ("responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
    ("responses", {"tools": [{"type": "web_search"}]}, "tools[0]"),
    ("responses", {"extra_body": {"x_new": 1}}, "x_new"),
]


@pytest.mark.parametrize(("api", "fields", "named"), BEYOND, ids=[f"{api} {named}" for api, _, named in BEYOND])
def test_what_the_providers_dialect_cannot_say_is_refused_by_its_name(
    claude: anthropic.Anthropic,
    gpt: openai.OpenAI,
    at_anthropic: Control,
    at_openai: Control,
    api: str,
    fields: Json,
    named: str,
) -> None:
    ask: dict[str, Callable[[], object]] = {
        "messages": lambda: claude.messages.create(**{"model": GPT, "max_tokens": 9, "messages": say("hi"), **fields}),
        "chat": lambda: gpt.chat.completions.create(**{"model": CLAUDE, "messages": say("hi"), **fields}),
        "responses": lambda: gpt.responses.create(**{"model": CLAUDE, "input": "hi", **fields}),
    }
    with pytest.raises((anthropic.BadRequestError, openai.BadRequestError)) as refused:
        ask[api]()
    where = refused.value.param if isinstance(refused.value, openai.BadRequestError) else refused.value
    assert named in str(where)
    assert at_anthropic.requests() == at_openai.requests() == []


def test_tokens_are_counted_by_whoever_makes_them(claude: anthropic.Anthropic, at_openai: Control) -> None:
    short = claude.messages.count_tokens(model=GPT, messages=say("hi"))
    long = claude.messages.count_tokens(model=GPT, system="Be kind.", messages=say("hi " * 100))
    assert [record.path for record in at_openai.requests("/tokenize")] == ["/tokenize"] * 2
    assert at_openai.requests("/tokenize")[1].body["messages"][0] == {"role": "system", "content": "Be kind."}
    assert long.input_tokens > short.input_tokens > 0


def test_tokens_that_nobody_can_count_are_not_made_up(claude: anthropic.Anthropic, at_openai: Control) -> None:
    picture: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    with pytest.raises(anthropic.NotFoundError, match="no way to count tokens"):
        claude.messages.count_tokens(model=GPT, messages=[{"role": "user", "content": [picture]}])
    assert at_openai.requests("/tokenize") == []
    at_openai.fault("404", match=Match(path="/tokenize"))  # as at a provider
    with pytest.raises(anthropic.NotFoundError, match="no way to count tokens"):
        claude.messages.count_tokens(model=GPT, messages=say("hi"))


def test_a_model_that_nobody_has_is_named(claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
    with pytest.raises(anthropic.NotFoundError, match="llama"):
        claude.messages.create(model="llama", max_tokens=9, messages=say("hi"))
    with pytest.raises(openai.NotFoundError, match="llama"):
        gpt.chat.completions.create(model="llama", messages=say("hi"))


# -- keys ----------------------------------------------------------------------------------------------------------------


def test_a_configured_key_goes_in_the_place_of_the_clients(
    claude: anthropic.Anthropic, gpt: openai.OpenAI, at_anthropic: Control, at_openai: Control
) -> None:
    claude.messages.create(model=CLAUDE, max_tokens=9, messages=say("whose key?"))  # any other would be refused
    gpt.chat.completions.create(model=GPT, messages=say("whose key?"))
    assert (the_one(at_anthropic).auth, the_one(at_openai).auth) == ("x-api-key", "bearer")


def test_without_one_each_clients_own_key_goes_and_answers_are_not_shared(served: Gateway, at_open: Control) -> None:
    def ask(key: str) -> list[bool]:
        with served.claude(key) as claude, served.gpt(key) as gpt:
            message = claude.messages.with_raw_response.create(model=OPEN_CLAUDE, max_tokens=9, messages=say("mine"))
            completion = gpt.chat.completions.with_raw_response.create(model=OPEN_GPT, messages=say("mine"))
            return ["hit" in answer.headers["cache-status"] for answer in (message, completion)]

    assert [ask(key) for key in (ALICE, BOB, ALICE, BOB)] == [[False] * 2, [False] * 2, [True] * 2, [True] * 2]
    assert [record.auth for record in at_open.requests()] == ["bearer"] * 4  # as both SDKs send it
    with pytest.raises(anthropic.AuthenticationError):
        ask(MALLORY)
    with served.gpt(MALLORY) as gpt, pytest.raises(openai.AuthenticationError):
        gpt.chat.completions.create(model=OPEN_GPT, messages=say("mine"))


def test_a_clients_key_does_not_go_to_a_provider_of_another_dialect(served: Gateway, at_open: Control) -> None:
    with served.claude(ALICE) as claude, pytest.raises(anthropic.AuthenticationError):
        claude.messages.create(model=OPEN_GPT, max_tokens=9, messages=say("mine?"))
    assert the_one(at_open).auth == ""


def test_no_key_is_ever_written_to_a_log(
    providers: tuple[Upstream, Upstream, Upstream], tmp_path_factory: pytest.TempPathFactory
) -> None:
    third = providers[2]
    toml = upstream("open", third, "claude-*", key_env=None, retries=1) + upstream("closed", third, "gpt-*")
    with gateway(toml, tmp_path_factory.mktemp("logged")) as served, served.claude() as claude, served.gpt() as gpt:
        with pytest.raises(anthropic.AuthenticationError):
            claude.messages.create(model=CLAUDE, max_tokens=9, messages=say("refused"))
        with pytest.raises(openai.InternalServerError, match="refused its API key"):
            gpt.chat.completions.create(model=GPT, messages=say("refused"))
        third.fault("529", count=2)
        with pytest.raises(anthropic.OverloadedError):
            claude.messages.create(model=CLAUDE, max_tokens=9, messages=say("overloaded"))
    written = "".join(served.lines)
    assert "upstream closed did not answer" in written
    assert CLIENT_KEY not in written
    assert OUR_KEY not in written
