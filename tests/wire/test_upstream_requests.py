"""How a request is written for an upstream: what comes back when it is read again, what is translated, what is refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.test_same_question import Conversation, Pen, conversations, name, text, value

from anaphora.errors import InvalidRequest
from anaphora.types import LOCAL_TENANT, Native, Request
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Dialect, encode
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_completions import OpenAICompletions
from anaphora.wire.openai_responses import OpenAIResponses
from anaphora.wire.upstream import UpstreamDialect
from anaphora.wire.upstream_anthropic import UpstreamAnthropic
from anaphora.wire.upstream_chat import UpstreamChat
from anaphora.wire.upstream_completions import UpstreamCompletions
from anaphora.wire.upstream_responses import UpstreamResponses

Json = dict[str, Any]

ANTHROPIC = Anthropic(provider_blocks=True)
CHAT, RESPONSES, COMPLETIONS = OpenAIChat(), OpenAIResponses(), OpenAICompletions()
SERVERS: dict[str, Dialect] = {dialect.name: dialect for dialect in (ANTHROPIC, CHAT, RESPONSES, COMPLETIONS)}
UPSTREAMS: dict[str, UpstreamDialect] = {
    upstream.name: upstream for upstream in (UpstreamAnthropic(), UpstreamChat(), UpstreamResponses(), UpstreamCompletions())
}
TALKS = ("anthropic", "openai_chat", "openai_responses")


def parse(dialect: str, body: bytes | Json) -> Request:
    """As it arrives at the gateway, its own bytes beside it."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = SERVERS[dialect].parse(data, tenant=LOCAL_TENANT).request
    return msgspec.structs.replace(request, native=Native(dialect, data))


def plain(request: Request, **changes: Any) -> Request:
    return msgspec.structs.replace(request, native=None, **changes)


def write(dialect: str, request: Request) -> Json:
    """The body that an upstream is sent, as it reads it."""
    return msgspec.json.decode(encode(UPSTREAMS[dialect].write(request, model="theirs")), type=dict)


def translate(source: str, target: str, body: Json) -> Json:
    return write(target, parse(source, body))


def refused(source: str, target: str, body: Json) -> str | None:
    """What the complaint is about."""
    with pytest.raises(InvalidRequest) as error:
        translate(source, target, body)
    assert error.value.message.startswith(f"{error.value.param}: ")
    return error.value.param


BASE: dict[str, Json] = {
    "anthropic": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "?"}]},
    "openai_chat": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "?"}]},
    "openai_responses": {"model": "m", "max_output_tokens": 9, "input": "?"},
}


def ask(source: str, target: str, **fields: Any) -> Json:
    """What `fields` beside a plain question become."""
    plain_body, body = translate(source, target, BASE[source]), translate(source, target, BASE[source] | fields)
    return {key: given for key, given in body.items() if given != plain_body.get(key)}


# -- there and back ------------------------------------------------------------------------------------------------------------

TOOL_CALLS = st.fixed_dictionaries({"id": name, "name": name, "input": st.dictionaries(name, value, max_size=2)})
ANSWER_BLOCKS = (
    text.map(lambda words: {"type": "text", "text": words})
    | st.tuples(text, st.just("") | name).map(lambda pair: {"type": "thinking", "thinking": pair[0], "signature": pair[1]})
    | TOOL_CALLS.map(lambda call: {"type": "tool_use", **call})
    | name.map(lambda data: {"type": "redacted_thinking", "data": data})
)
SOURCES = st.sampled_from(
    [
        {"type": "base64", "media_type": "image/png", "data": "aGk="},
        {"type": "url", "url": "https://example.com/a"},
        {"type": "file", "file_id": "file_1"},
    ]
)
USER_BLOCKS = (
    text.map(lambda words: {"type": "text", "text": words})
    | SOURCES.map(lambda source: {"type": "image", "source": source})
    | st.tuples(SOURCES, text).map(
        lambda pair: (
            {"type": "document", "source": {**pair[0], "media_type": "application/pdf"}, "title": pair[1]}
            if pair[0]["type"] == "base64"
            else {"type": "document", "source": pair[0], "context": pair[1]}
        )
    )
    | st.just({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}})
    | st.tuples(name, st.lists(text, max_size=2), st.booleans()).map(
        lambda result: {
            "type": "tool_result",
            "tool_use_id": result[0],
            "content": [{"type": "text", "text": words} for words in result[1]],
            "is_error": result[2],
        }
    )
)
ANTHROPIC_TALKS = st.lists(
    st.lists(USER_BLOCKS, min_size=1, max_size=4).map(lambda blocks: {"role": "user", "content": blocks})
    | st.lists(ANSWER_BLOCKS, min_size=1, max_size=4).map(lambda blocks: {"role": "assistant", "content": blocks}),
    min_size=1,
    max_size=4,
)

CHAT_PARTS = (
    text.map(lambda words: {"type": "text", "text": words})
    | st.sampled_from(["https://example.com/a.png", "data:image/png;base64,aGk="]).map(
        lambda url: {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    )
    | st.just({"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}})
    | st.just({"type": "file", "file": {"file_data": "data:application/pdf;base64,aGk=", "filename": "a.pdf"}})
    | st.just({"type": "file", "file": {"file_id": "file_1"}})
)
CHAT_TALKS = st.lists(
    st.tuples(st.lists(CHAT_PARTS, max_size=3), st.none() | name).map(
        lambda turn: {"role": "user", "content": turn[0], "name": turn[1]}
    )
    | st.tuples(name, st.lists(text, max_size=2)).map(
        lambda result: {
            "role": "tool",
            "tool_call_id": result[0],
            "content": [{"type": "text", "text": words} for words in result[1]],
        }
    )
    | st.tuples(st.none() | text, st.lists(text, max_size=2), st.lists(TOOL_CALLS, max_size=2)).map(
        lambda turn: {
            "role": "assistant",
            "reasoning_content": turn[0],
            "content": [{"type": "text", "text": words} for words in turn[1]],
            "tool_calls": [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": json.dumps(call["input"])},
                }
                for call in turn[2]
            ],
        }
    )
    | text.map(lambda words: {"role": "system", "content": words}),
    min_size=1,
    max_size=6,
)


@given(conversations, st.integers())
def test_what_is_written_for_the_same_dialect_is_the_same_question(talk: Conversation, seed: int) -> None:
    pen = Pen(seed)
    for dialect, body in (
        ("anthropic", pen.anthropic(talk)),
        ("openai_chat", pen.chat(talk)),
        ("openai_responses", pen.responses(talk)),
    ):
        request = parse(dialect, body)
        assert plain(parse(dialect, write(dialect, request))) == plain(request, model="theirs")


@given(ANTHROPIC_TALKS)
def test_every_block_of_anthropics_comes_back_as_it_was(messages: list[Json]) -> None:
    request = parse("anthropic", {"model": "theirs", "max_tokens": 9, "messages": messages})
    assert plain(parse("anthropic", write("anthropic", request))) == plain(request)


@given(CHAT_TALKS)
def test_every_message_of_chat_comes_back_as_it_was(messages: list[Json]) -> None:
    request = parse("openai_chat", {"model": "theirs", "messages": messages})
    assert plain(parse("openai_chat", write("openai_chat", request))) == plain(request)


def test_what_was_thought_in_two_messages_stays_two_thoughts() -> None:
    thoughts = [{"role": "assistant", "reasoning_content": words, "content": ""} for words in ("a", "b")]
    request = parse("openai_chat", {"model": "theirs", "messages": thoughts})
    assert plain(parse("openai_chat", write("openai_chat", request))) == plain(request)


@given(CHAT_TALKS)
def test_every_item_of_responses_comes_back_as_it_was(messages: list[Json]) -> None:
    """What Chat says in messages without names, said in items by way of a request."""
    for message in messages:
        message.pop("name", None)
    asked = plain(parse("openai_chat", {"model": "theirs", "messages": messages}))
    own = msgspec.structs.replace(asked, native=Native("openai_responses", b"{}"))
    assert plain(parse("openai_responses", write("openai_responses", own))) == asked


@given(conversations, st.integers())
def test_a_translated_question_is_the_same_question(talk: Conversation, seed: int) -> None:
    talk.unknown, talk.salt, talk.top_k, talk.stop = {}, None, None, []
    talk.tools = [(tool, about, {"type": "object", **schema}) for tool, about, schema in talk.tools]
    body = Pen(seed).anthropic(talk)
    request = parse("anthropic", body)
    for target in TALKS:
        assert plain(parse(target, write(target, request))) == plain(request, model="theirs")
    for source, data in (("openai_chat", Pen(seed).chat(talk)), ("openai_responses", Pen(seed).responses(talk))):
        for target in TALKS:
            assert plain(parse(target, write(target, parse(source, data)))) == plain(request, model="theirs")


@given(
    st.one_of(
        text,
        st.lists(text, min_size=1, max_size=3),
        st.lists(st.integers(0, 9), min_size=1),
        st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1, max_size=2),
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(1, 3),
            "echo": st.booleans(),
            "logprobs": st.integers(0, 5),
            "stop": st.lists(text, max_size=2),
            "seed": st.integers(0, 9),
            "max_tokens": st.integers(0, 9),
            "stream": st.booleans(),
            "x_new": value,
        },
    ),
)
def test_raw_prompts_come_back_as_they_were(prompt: Any, fields: Json) -> None:
    request = parse("openai_completions", {"model": "theirs", "prompt": prompt, **fields})
    assert plain(parse("openai_completions", write("openai_completions", request))) == plain(request)
