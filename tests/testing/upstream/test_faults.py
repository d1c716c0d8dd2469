"""Every fault as the official SDKs see it, against a real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from anaphora.testing.upstream import Fault, Match, Upstream

Call = Callable[..., Any]
WORDS = "one two three four five six"


def message(claude: anthropic.Anthropic, stream: bool = False, **fields: Any) -> Any:
    return claude.messages.create(
        model="claude-opus-5", max_tokens=50, messages=[{"role": "user", "content": WORDS}], stream=stream, **fields
    )


def chat(gpt: openai.OpenAI, stream: bool = False, **fields: Any) -> Any:
    return gpt.chat.completions.create(
        model="gpt-5.6-sol", messages=[{"role": "user", "content": WORDS}], stream=stream, **fields
    )


def response(gpt: openai.OpenAI, stream: bool = False) -> Any:
    return gpt.responses.create(model="gpt-5.6-sol", input=WORDS, stream=stream)


def completion(gpt: openai.OpenAI, stream: bool = False) -> Any:
    return gpt.completions.create(model="gpt-5.6-sol", prompt=WORDS, stream=stream)


STATUSES = [
    ("400", anthropic.BadRequestError, openai.BadRequestError, "invalid_request_error"),
    ("401", anthropic.AuthenticationError, openai.AuthenticationError, "authentication_error"),
    ("403", anthropic.PermissionDeniedError, openai.PermissionDeniedError, "permission_error"),
    ("404", anthropic.NotFoundError, openai.NotFoundError, "not_found_error"),
    ("413", anthropic.ContentTooLargeError, openai.APIStatusError, "request_too_large"),
    ("429", anthropic.RateLimitError, openai.RateLimitError, "rate_limit_error"),
    ("500", anthropic.InternalServerError, openai.InternalServerError, "api_error"),
    ("503", anthropic.ServiceUnavailableError, openai.InternalServerError, "overloaded_error"),
    ("529", anthropic.OverloadedError, openai.InternalServerError, "overloaded_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "claudes", "gpts", "kind"), STATUSES, ids=[row[0] for row in STATUSES])
def test_a_status_is_the_sdks_own_exception(
    upstream: Upstream,
    claude: anthropic.Anthropic,
    gpt: openai.OpenAI,
    status: str,
    claudes: type[anthropic.APIStatusError],
    gpts: type[openai.APIStatusError],
    kind: str,
    stream: bool,
) -> None:
    upstream.fault(status, count=4, message="not now")
    with pytest.raises(claudes, match="not now") as of_claude:
        message(claude, stream)
    body: Any = of_claude.value.body
    assert body["error"] == {"type": kind, "message": "not now"}
    assert body["request_id"] == of_claude.value.request_id
    for call in (chat, response, completion):
        with pytest.raises(gpts, match="not now") as of_gpt:
            call(gpt, stream)
        assert of_gpt.value.status_code == int(status)
        assert of_gpt.value.request_id
    assert [(request.fault, request.outcome, request.status) for request in upstream.requests()] == [
        (status, "fault", int(status))
    ] * 4


def test_a_rate_limit_says_when_to_come_back_and_the_limits(
    upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI
) -> None:
    upstream.fault("429", count=2, retry_after_s=1.5, should_retry=False)
    with pytest.raises(anthropic.RateLimitError) as of_claude:
        message(claude)
    with pytest.raises(openai.RateLimitError) as of_gpt:
        chat(gpt)
    for headers in (of_claude.value.response.headers, of_gpt.value.response.headers):
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "1500")
        assert headers["x-should-retry"] == "false"
    assert of_claude.value.response.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert of_gpt.value.response.headers["x-ratelimit-remaining-tokens"] == "0"
    assert of_gpt.value.response.headers["x-ratelimit-reset-tokens"] == "1.5s"
    raw = claude.messages.with_raw_response.create(
        model="claude-opus-5", max_tokens=5, messages=[{"role": "user", "content": "x"}]
    )
    assert raw.headers["anthropic-ratelimit-requests-remaining"] == raw.headers["anthropic-ratelimit-requests-limit"]


def test_the_sdks_try_again_as_they_are_told(upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
    upstream.fault("529", retry_after_s=0.001)
    assert message(claude.with_options(max_retries=1)).content[0].text == WORDS
    upstream.fault("503", retry_after_s=0.001)
    assert chat(gpt.with_options(max_retries=1)).choices[0].message.content == WORDS
    upstream.fault("500", should_retry=False)
    with pytest.raises(openai.InternalServerError):
        chat(gpt.with_options(max_retries=1))
    assert [request.outcome for request in upstream.requests()] == ["fault", "finished", "fault", "finished", "fault"]


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_connection_that_breaks_before_the_answer(
    upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI, kind: str
) -> None:
    upstream.fault(kind, count=4, after_events=0)
    for stream in (False, True):
        with pytest.raises(anthropic.APIConnectionError):
            message(claude, stream)
        with pytest.raises(openai.APIConnectionError):
            chat(gpt, stream)
    assert [(request.outcome, request.status) for request in upstream.requests()] == [("fault", None)] * 4


def test_a_stream_is_cut_after_exactly_so_many_events(
    upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI
) -> None:
    upstream.fault("cut", count=4, after_events=4)
    calls: tuple[tuple[Call, Any, type[Exception]], ...] = (
        (message, claude, httpx2.RemoteProtocolError),
        (chat, gpt, openai.APIConnectionError),
        (response, gpt, openai.APIConnectionError),
        (completion, gpt, openai.APIConnectionError),
    )
    for call, client, error in calls:
        events: list[Any] = []
        with pytest.raises(error):
            events.extend(call(client, True))
    assert [(request.outcome, request.num_events) for request in upstream.requests()] == [("fault", 4)] * 4


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_an_answer_that_is_not_streamed_breaks_in_the_middle(upstream: Upstream, gpt: openai.OpenAI, kind: str) -> None:
    upstream.fault(kind, after_events=1)
    with pytest.raises(openai.APIConnectionError):
        chat(gpt)
    assert [(request.outcome, request.status) for request in upstream.requests()] == [("fault", 200)]


def test_a_stream_that_is_over_sooner_is_not_cut(upstream: Upstream, claude: anthropic.Anthropic) -> None:
    upstream.fault("cut", after_events=1000)
    events = list(message(claude, True))
    assert events[-1].type == "message_stop"
    [request] = upstream.requests()
    assert (request.fault, request.outcome, request.num_events) == ("cut", "finished", len(events))


def test_an_event_that_is_no_json(upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
    upstream.fault("malformed-json", count=6)
    calls: tuple[tuple[Call, Any], ...] = ((message, claude), (chat, gpt), (response, gpt))
    for call, client in calls:
        with pytest.raises(json.JSONDecodeError):
            list(call(client, True))
        with pytest.raises(json.JSONDecodeError):
            call(client)
    assert {request.outcome for request in upstream.requests()} == {"fault"}


def test_a_stream_that_turns_into_a_page_ends_without_its_last_event(upstream: Upstream, claude: anthropic.Anthropic) -> None:
    upstream.fault("malformed-sse", after_events=2)
    assert [event.type for event in message(claude, True)] == ["message_start", "content_block_start"]
    upstream.fault("malformed-sse", after_events=2)
    body = {"model": "claude-opus-5", "max_tokens": 9, "messages": [{"role": "user", "content": WORDS}], "stream": True}
    answer = httpx2.post(f"{upstream.url}/v1/messages", json=body)
    assert answer.text.endswith("</html>\r\n")
    assert "message_stop" not in answer.text


def test_an_error_event_within_a_stream(upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
    upstream.fault("error", count=3, after_events=2, message="too busy")
    events: list[Any] = []
    with pytest.raises(anthropic.APIStatusError, match=r"overloaded_error.*too busy"):
        events.extend(message(claude, True))
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == "one two "
    chunks: list[Any] = []
    with pytest.raises(openai.APIError, match="too busy"):
        chunks.extend(chat(gpt, True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two "
    kinds = [event.type for event in response(gpt, True)]
    assert kinds[-2:] == ["error", "response.failed"]
    assert [(request.outcome, request.status) for request in upstream.requests()] == [("fault", 200)] * 3


def test_an_error_within_an_answer_that_is_not_streamed_has_a_status(upstream: Upstream, claude: anthropic.Anthropic) -> None:
    upstream.fault("error", status=500)
    with pytest.raises(anthropic.InternalServerError):
        message(claude)
    assert [(request.outcome, request.status) for request in upstream.requests()] == [("fault", 500)]


def test_a_slow_first_token_and_a_stall_run_into_timeouts(
    upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI
) -> None:
    upstream.fault("slow", count=2)
    with pytest.raises(anthropic.APITimeoutError):
        message(claude.with_options(timeout=0.3), True)
    with pytest.raises(openai.APITimeoutError):
        chat(gpt.with_options(timeout=0.3))
    upstream.fault("stall", after_events=2)
    events = []
    with pytest.raises(openai.APITimeoutError):
        events.extend(chat(gpt.with_options(timeout=0.3), True))
    requests = upstream.requests()
    assert [(request.outcome, request.status, request.num_events) for request in requests] == [
        ("left", None, 0),
        ("left", None, 0),
        ("left", 200, 2),
    ]


def test_what_is_slow_or_stalls_for_a_time_is_answered_in_the_end(upstream: Upstream, claude: anthropic.Anthropic) -> None:
    for kind in ("slow", "stall"):
        upstream.fault(kind, wait_s=0.1, count=2)
        assert message(claude).content[0].text == WORDS
        assert list(message(claude, True))[-1].type == "message_stop"
    requests = upstream.requests()
    assert all(request.outcome == "finished" and (request.over_s or 0) >= 0.1 for request in requests)
    assert [(request.first_s or 0) >= 0.1 for request in requests] == [True, True, False, False]


def test_a_header_of_the_request_tells_its_fault(upstream: Upstream, claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.RateLimitError):
        message(claude, extra_headers={"x-testing-fault": "429"})
    with pytest.raises(anthropic.OverloadedError, match="by header"):
        message(claude, extra_headers={"x-testing-fault": '{"kind": "529", "message": "by header"}'})
    with pytest.raises(anthropic.BadRequestError, match="x-testing-fault is wrong: no fault is called 'late'"):
        message(claude, extra_headers={"x-testing-fault": "late"})
    assert message(claude).content[0].text == WORDS


def test_faults_are_for_the_requests_they_match(upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
    upstream.fault("500", match=Match(model="gpt-5.6-sol"))
    upstream.fault("404", match=Match(path="/v1/models"))
    upstream.fault("503", match=Match(contains="four five"))
    with pytest.raises(anthropic.ServiceUnavailableError):
        message(claude)
    assert message(claude).content[0].text == WORDS
    with pytest.raises(openai.InternalServerError):
        chat(gpt)
    assert chat(gpt).choices[0].message.content == WORDS
    with pytest.raises(openai.NotFoundError):
        gpt.models.list()
    assert gpt.models.list().data


def test_a_fault_can_be_taken_back(upstream: Upstream, claude: anthropic.Anthropic) -> None:
    upstream.fault("500", count=None)
    for _ in range(3):
        with pytest.raises(anthropic.InternalServerError):
            message(claude)
    assert httpx2.delete(f"{upstream.url}/testing/faults").json()["faults"] == []
    assert message(claude).content[0].text == WORDS


def test_random_faults_are_the_same_for_the_same_seed() -> None:
    def outcomes(seed: int) -> list[str]:
        faults = (Fault("500", share=0.3), Fault("429", share=0.3))
        with Upstream(faults=faults, seed=seed) as upstream, httpx2.Client(base_url=upstream.url) as client:
            body = {"model": "gpt-4.1", "prompt": "x"}
            return [str(client.post("/v1/completions", json=body).status_code) for _ in range(60)]

    first = outcomes(1)
    assert first == outcomes(1)
    assert first != outcomes(2)
    assert {"200", "429", "500"} == set(first)


def test_refused_connections_are_connection_errors_and_end_what_was_under_way(
    upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI
) -> None:
    upstream.fault("stall", after_events=2)
    stream = iter(message(claude, True))
    assert next(stream).type == "message_start"
    with upstream.refusing():
        with pytest.raises(httpx2.TransportError):
            list(stream)
        with pytest.raises(anthropic.APIConnectionError):
            message(claude)
        with pytest.raises(openai.APIConnectionError):
            chat(gpt)
    assert message(claude).content[0].text == WORDS
    assert len(upstream.requests()) == 2


def test_what_was_told_wrongly_is_refused_in_words(upstream: Upstream) -> None:
    def post(path: str, body: Any) -> httpx2.Response:
        return httpx2.post(f"{upstream.url}/testing/{path}", json=body)

    assert "no fault is called 'late'" in post("faults", {"kind": "late"}).json()["error"]
    assert "unknown field `cound`" in post("faults", [{"kind": "429", "cound": 2}]).json()["error"]
    assert "a share is from 0 to 1" in post("faults", {"kind": "429", "share": 2}).json()["error"]
    assert post("faults", {"kind": "late"}).status_code == 400
    assert post("wishes", {}).status_code == 404
    with pytest.raises(ValueError, match="no fault is called 'late'"):
        upstream.fault("late")
