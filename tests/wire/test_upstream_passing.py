"""What an upstream of the client's own dialect is asked, what it answers, and how it fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from tests.wire.providers import (
    ANTHROPIC,
    CHAT,
    COMPLETIONS,
    RESPONSES,
    SENT,
    TALK,
    THINKING_AND_CALLS,
    Json,
    chunk,
    created,
    message_start,
    numbered,
    read,
    response,
    responses_stream,
    stream,
)

from anaphora.errors import BackendFailed, UpstreamFailed
from anaphora.types import (
    Raw,
)
from anaphora.wire.upstream import UpstreamDialect

OVERLOADED: Json = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
FAILED = {"code": "rate_limit_exceeded", "message": "Slow down."}


@pytest.mark.parametrize(
    ("upstream", "body", "message", "status"),
    [
        (ANTHROPIC, stream(message_start(), OVERLOADED, named=True), "Overloaded", 529),
        (ANTHROPIC, b"event: error\ndata: {}\n\n", "The upstream answered with status 500.", 500),
        (CHAT, stream({"error": {"message": "No.", "type": "server_error", "param": None, "code": None}}), "No.", 500),
        (CHAT, stream({"error": {"message": "Slow.", "code": 429}}), "Slow.", 429),
        (CHAT, stream(chunk({"content": "a"}), {"error": "broken"}), "broken", 500),
        (CHAT, stream({"object": "error", "message": "bad", "type": "BadRequestError", "code": 400}), "bad", 400),
        (RESPONSES, numbered({"type": "error", "code": "server_error", "message": "No.", "param": None}), "No.", 500),
        (
            RESPONSES,
            numbered(created(), {"type": "response.failed", "response": response("failed", [], error=FAILED)}),
            "Slow down.",
            429,
        ),
    ],
)
def test_an_error_within_a_stream_is_raised_in_the_providers_words(
    upstream: UpstreamDialect, body: bytes, message: str, status: int
) -> None:
    with pytest.raises(UpstreamFailed) as error:
        read(upstream, body)
    assert (error.value.message, error.value.status) == (message, status)
    assert error.value.again == (status in (429, 529))


@pytest.mark.parametrize("upstream", [ANTHROPIC, CHAT, RESPONSES, COMPLETIONS], ids=lambda upstream: upstream.name)
@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"<html>no</html>", b"{}", b"\xff"])
def test_what_is_no_answer_fails(upstream: UpstreamDialect, body: bytes) -> None:
    with pytest.raises(BackendFailed):
        upstream.read_whole(body)


def test_an_error_instead_of_a_whole_answer_is_raised() -> None:
    for upstream in (ANTHROPIC, CHAT, COMPLETIONS):
        with pytest.raises(UpstreamFailed, match="Overloaded"):
            upstream.read_whole(json.dumps(OVERLOADED).encode())


@pytest.mark.parametrize(
    ("upstream", "data", "expected"),
    [
        (
            ANTHROPIC,
            {"type": "error", "error": {"type": "not_found_error", "message": "model: x"}, "request_id": "req_1"},
            ("model: x", "not_found_error", None, True),
        ),
        (
            CHAT,
            {"error": {"message": "Bad.", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}},
            ("Bad.", "invalid_value", "n", True),
        ),
        (
            RESPONSES,
            {"error": {"message": "Bad.", "type": "invalid_request_error", "param": None, "code": None}},
            ("Bad.", "invalid_request_error", None, True),
        ),
        (
            CHAT,
            {"object": "error", "message": "Bad.", "type": "BadRequestError", "code": 400},
            ("Bad.", "BadRequestError", None, False),
        ),
        (CHAT, {"detail": "Not Found"}, ("Not Found", None, None, False)),
        (CHAT, {"error": "Bad."}, ("Bad.", None, None, False)),
        (CHAT, {"detail": [{"loc": ["body"]}]}, ('{"detail": [{"loc": ["body"]}]}', None, None, False)),
        (ANTHROPIC, {"error": {"message": "Bad."}}, ("Bad.", None, None, False)),
        (ANTHROPIC, b"<html><body>502</body></html>", ("The upstream answered with status 502.", None, None, False)),
        (CHAT, b"", ("The upstream answered with status 502.", None, None, False)),
        (CHAT, b"upstream\n connect error", ("upstream connect error", None, None, False)),
        (RESPONSES, b"\xff\xfe", ("The upstream answered with status 502.", None, None, False)),
    ],
)
def test_errors_are_read_in_whatever_form_they_come(
    upstream: UpstreamDialect, data: Json | bytes, expected: tuple[str, str | None, str | None, bool]
) -> None:
    error = upstream.read_error(502, data if isinstance(data, bytes) else json.dumps(data).encode())
    assert (error.message, error.code, error.param, error.readable) == expected
    assert error.status == 502


# -- a client's own body --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream", [ANTHROPIC, CHAT, RESPONSES, COMPLETIONS], ids=lambda upstream: upstream.name)
def test_a_clients_own_body_is_passed_with_another_model_and_nothing_else_changed(upstream: UpstreamDialect) -> None:
    native = b'{"x_new":[1.5,null],"model":"ours","cache_control":{"type":"ephemeral"},"messages":[{"\xc3\xa9":1e2}],"n":null}'
    body = upstream.passed(native, model="theirs")
    assert list(body.items()) == list({**json.loads(native), "model": "theirs"}.items())


# -- the official SDKs take what is passed on ------------------------------------------------------------


def passed_on(upstream: UpstreamDialect, body: bytes, native: Json) -> Callable[[httpx2.Request], httpx2.Response]:
    """A gateway: the raw events of an upstream's answer, byte by byte as they came."""

    def respond(request: httpx2.Request) -> httpx2.Response:
        reader = upstream.reader(upstream.passed(json.dumps(native).encode(), model="theirs"))

        def events() -> Iterator[bytes]:
            for start in range(0, len(body), 7):
                for delta in reader.feed(body[start : start + 7]):
                    if isinstance(delta, Raw):
                        yield delta.data

        return httpx2.Response(200, content=b"".join(events()), headers={"content-type": "text/event-stream"})

    return respond


def openai_client(upstream: UpstreamDialect, body: bytes, native: Json) -> openai.OpenAI:
    transport = httpx2.MockTransport(passed_on(upstream, body, native))
    return openai.OpenAI(api_key="k", base_url="http://test/v1", max_retries=0, http_client=httpx2.Client(transport=transport))


def test_anthropics_sdk_puts_a_passed_stream_together() -> None:
    transport = httpx2.MockTransport(passed_on(ANTHROPIC, THINKING_AND_CALLS, SENT))
    client = anthropic.Anthropic(
        api_key="k", base_url="http://test", max_retries=0, http_client=httpx2.Client(transport=transport)
    )
    messages: Any = [{"role": "user", "content": "?"}]
    with client.messages.stream(model="m", max_tokens=9, messages=messages) as events:
        message = events.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[0].to_dict() == {"type": "thinking", "thinking": "Which\u2028city?", "signature": "EqQB"}
    assert (message.usage.cache_read_input_tokens, message.usage.output_tokens) == (2000, 30)


@pytest.mark.parametrize("asked", [False, True])
def test_openais_sdk_puts_a_passed_chat_together(asked: bool) -> None:
    native = SENT | ({"stream_options": {"include_usage": True}} if asked else {})
    messages: Any = [{"role": "user", "content": "?"}]
    with openai_client(CHAT, TALK, native).chat.completions.stream(model="m", messages=messages) as events:
        completion = events.get_final_completion()
    assert completion.choices[0].message.content == "Hello"
    assert (completion.usage is not None) == asked


def test_openais_sdk_puts_a_passed_response_together() -> None:
    with openai_client(RESPONSES, responses_stream(), SENT).responses.stream(model="m", input="?") as events:
        final = events.get_final_response()
    assert final.output_text == "Hi"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
