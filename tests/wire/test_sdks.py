"""The official SDKs read what we write, and we read what they write. In process: their transport is our dialect."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import anthropic
import httpx2
import msgspec
import openai
import pytest

from anaphora.errors import EngineDied, InvalidRequest, QueueFull, ServiceError
from anaphora.prompt import Diagnosis
from anaphora.transcript import replay
from anaphora.types import (
    Choice,
    Completion,
    FinishReason,
    ModelInfo,
    Request,
    Said,
    Tenant,
    TextDelta,
    TextPart,
    ThinkingPart,
    TokenLogprob,
    ToolUsePart,
    TopLogprob,
    Usage,
)
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Dialect, Ids, Parsed
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_common import render_model, render_models
from anaphora.wire.openai_completions import OpenAICompletions
from anaphora.wire.openai_responses import OpenAIResponses

IDS = Ids("0123456789abcdef01234567", 1_700_000_000)
USAGE = Usage(input_tokens=10, output_tokens=7, cache_read_input_tokens=32)
WEATHER: dict[str, object] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TEXT = "Rayleigh scattering: blue light is scattered most, \u201cof course\u201d. " * 3
CALLS = (ToolUsePart("x", "weather", '{"city": "Oslo"}'), ToolUsePart("y", "weather", '{"city":"Rome"}'))
MODELS = (ModelInfo("m", created_s=1_700_000_000, max_input_tokens=8192), ModelInfo("n"))


class Server:
    """Answers every request of an SDK with `completion`, or with `error` (before the first delta, or after `error_after`)."""

    def __init__(self, *content: TextPart | ThinkingPart | ToolUsePart, reason: FinishReason = "end_turn") -> None:
        logprobs = (TokenLogprob("Ray", -0.5, (TopLogprob("Ray", -0.5), TopLogprob("Mie", -1.5))),)
        choice = Choice(content, reason, logprobs=logprobs if content and isinstance(content[0], TextPart) else None)
        self.completion = Completion("m", (choice,), USAGE, 0.5)
        self.error: ServiceError | None = None
        self.error_after: int | None = None
        self.requests: list[Request] = []
        self.parsed: list[Parsed] = []
        self.caching: dict[str, object] = {}  # fields of `Rendering` that a profile sets

    def _parse(self, dialect: Dialect, request: httpx2.Request) -> Parsed:
        parsed = dialect.parse(request.content, tenant=Tenant("t"), version=request.headers.get("anthropic-version"))
        self.requests.append(parsed.request)
        self.parsed.append(parsed)
        return Parsed(parsed.request, msgspec.structs.replace(parsed.rendering, **self.caching), parsed.read_prompt)

    def _deltas(self, writer_fail: Callable[[ServiceError], bytes], feed: Callable[[Said], bytes]) -> Iterator[bytes]:
        for number, delta in enumerate(replay(self.completion)):
            if self.error is not None and number == self.error_after:
                yield writer_fail(self.error)
                return
            yield feed(delta)

    def answer(self, dialect: Dialect) -> Callable[[httpx2.Request], httpx2.Response]:
        def respond(request: httpx2.Request) -> httpx2.Response:
            try:
                parsed = self._parse(dialect, request)
                if self.error is not None and self.error_after is None:
                    raise self.error
            except ServiceError as error:
                status, body, headers = dialect.render_error(error, "req_1")
                return httpx2.Response(status, content=body, headers=headers)
            if not parsed.rendering.stream:
                body = dialect.render(self.completion, parsed.rendering, IDS)
                return httpx2.Response(200, content=body, headers={"content-type": "application/json"})
            writer = dialect.writer(parsed.rendering, IDS)
            sse = b"".join(self._deltas(writer.fail, writer.feed))
            return httpx2.Response(200, content=sse, headers={"content-type": "text/event-stream"})

        return respond

    def openai(self, dialect: Dialect) -> openai.OpenAI:
        transport = httpx2.MockTransport(self.answer(dialect))
        return openai.OpenAI(
            api_key="k", base_url="http://test/v1", max_retries=0, http_client=httpx2.Client(transport=transport)
        )

    def anthropic(self) -> anthropic.Anthropic:
        transport = httpx2.MockTransport(self.answer(Anthropic()))
        return anthropic.Anthropic(
            api_key="k", base_url="http://test", max_retries=0, http_client=httpx2.Client(transport=transport)
        )


# -- Anthropic -----------------------------------------------------------------------------------------------------------


def test_anthropic_reads_a_whole_answer_with_thinking_text_and_tools() -> None:
    server = Server(ThinkingPart("hm", "sig"), TextPart(TEXT), *CALLS, reason="tool_use")
    message = server.anthropic().messages.create(
        model="m",
        max_tokens=9,
        messages=[{"role": "user", "content": "?"}],
        tools=[{"name": "weather", "input_schema": WEATHER}],
    )
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[1].to_dict() == {"type": "text", "text": TEXT}
    assert [block.input for block in message.content if block.type == "tool_use"] == [{"city": "Oslo"}, {"city": "Rome"}]
    assert len({block.id for block in message.content if block.type == "tool_use"}) == 2
    assert (message.stop_reason, message.model, message.id) == ("tool_use", "m", f"msg_{IDS.id}")
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens, message.usage.output_tokens) == (10, 32, 7)


def test_anthropics_stream_helper_builds_the_same_message_as_the_whole_answer() -> None:
    server = Server(ThinkingPart("hm", "sig"), TextPart(TEXT), *CALLS, reason="tool_use")
    client = server.anthropic()
    with client.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}]) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    whole = client.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}])
    assert text == TEXT
    assert _said(streamed.to_dict()) == _said(whole.to_dict())


def _said(message: dict[str, object]) -> dict[str, object]:
    """Without what the SDK adds for itself."""
    return {key: message[key] for key in ("id", "model", "role", "stop_reason", "usage", "content")}


def test_anthropics_second_turn_may_send_back_what_it_got() -> None:
    server = Server(ThinkingPart("hm", "sig"), TextPart(TEXT), CALLS[0], reason="tool_use")
    client = server.anthropic()
    first = client.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}])
    call = first.content[2]
    assert call.type == "tool_use"
    client.messages.create(
        model="m",
        max_tokens=9,
        messages=[
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "12 C"}]},
        ],
    )
    answer = server.requests[1].messages[1]
    assert answer.content == (ThinkingPart("hm", "sig"), TextPart(TEXT), ToolUsePart(call.id, "weather", '{"city":"Oslo"}'))


def test_anthropic_raises_its_own_exception_for_an_error_in_the_stream() -> None:
    server = Server(TextPart(TEXT))
    server.error, server.error_after = EngineDied("The engine is restarting; retry."), 2
    with (
        pytest.raises(anthropic.APIStatusError, match="overloaded_error"),
        server.anthropic().messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}]) as stream,
    ):
        stream.until_done()


def test_anthropic_counts_tokens_of_the_same_body() -> None:
    def respond(request: httpx2.Request) -> httpx2.Response:
        dialect = Anthropic()
        parsed = dialect.parse_count_tokens(request.content, tenant=Tenant("t"), version=request.headers["anthropic-version"])
        return httpx2.Response(200, content=dialect.render_count(len(parsed.messages)))

    client = anthropic.Anthropic(api_key="k", http_client=httpx2.Client(transport=httpx2.MockTransport(respond)))
    assert client.messages.count_tokens(model="m", messages=[{"role": "user", "content": "?"}], system="s").input_tokens == 2


def test_anthropic_lists_models_page_by_page() -> None:
    def respond(request: httpx2.Request) -> httpx2.Response:
        after = request.url.params.get("after_id")
        return httpx2.Response(200, content=Anthropic().render_models(MODELS, limit=1, after_id=after))

    client = anthropic.Anthropic(api_key="k", http_client=httpx2.Client(transport=httpx2.MockTransport(respond)))
    assert [model.id for model in client.models.list(limit=1)] == ["m", "n"]


# -- OpenAI --------------------------------------------------------------------------------------------------------------

FUNCTION: openai.types.chat.ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "weather", "parameters": WEATHER},
}


def test_openai_chat_reads_a_whole_answer_with_log_probabilities() -> None:
    answer = (
        Server(TextPart(TEXT))
        .openai(OpenAIChat())
        .chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}], logprobs=True, top_logprobs=2)
    )
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (TEXT, "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert choice.logprobs.content[0].top_logprobs[1].token == "Mie"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (42, 32)


def test_openai_chats_stream_helper_builds_the_same_tool_calls_as_the_whole_answer() -> None:
    server = Server(*CALLS, reason="tool_use")
    client = server.openai(OpenAIChat())
    with client.chat.completions.stream(model="m", messages=[{"role": "user", "content": "?"}], tools=[FUNCTION]) as stream:
        streamed = stream.get_final_completion().choices[0]
    whole = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}], tools=[FUNCTION]).choices[0]
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    assert whole.message.tool_calls is not None
    assert streamed.message.tool_calls is not None
    assert [(call.id, call.type) for call in streamed.message.tool_calls] == [
        (f"call_{IDS.id}_0_0", "function"),
        (f"call_{IDS.id}_0_1", "function"),
    ]
    assert [call.function.arguments for call in streamed.message.tool_calls] == [call.arguments for call in CALLS]
    assert [call.id for call in streamed.message.tool_calls] == [call.id for call in whole.message.tool_calls]


def test_openai_chat_reads_usage_at_the_end_of_a_stream() -> None:
    chunks = list(
        Server(TextPart(TEXT))
        .openai(OpenAIChat())
        .chat.completions.create(
            model="m", messages=[{"role": "user", "content": "?"}], stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []


def test_openai_chats_second_turn_may_send_back_what_it_got() -> None:
    server = Server(TextPart(TEXT), *CALLS, reason="tool_use")
    client = server.openai(OpenAIChat())
    first = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}]).choices[0].message
    client.chat.completions.create(
        model="m",
        messages=[
            {"role": "user", "content": "?"},
            first.model_dump(),  # type: ignore[list-item]  # what many programs do
            {"role": "tool", "tool_call_id": "a", "content": "12 C"},
        ],
    )
    assert [type(part) for part in server.requests[1].messages[1].content] == [TextPart, ToolUsePart, ToolUsePart]


def test_openai_raises_its_own_exception_for_an_error_in_the_stream() -> None:
    server = Server(TextPart(TEXT))
    server.error, server.error_after = EngineDied("The engine is restarting; retry."), 2
    stream = server.openai(OpenAIChat()).chat.completions.create(
        model="m", messages=[{"role": "user", "content": "?"}], stream=True
    )
    with pytest.raises(openai.APIError, match="restarting"):
        list(stream)


def test_openai_completions_reads_text_and_log_probabilities() -> None:
    client = Server(TextPart("Ray")).openai(OpenAICompletions())
    answer = client.completions.create(model="m", prompt="Why", logprobs=2)
    assert answer.choices[0].text == "Ray"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.top_logprobs == [{"Ray": -0.5, "Mie": -1.5}]
    assert answer.choices[0].logprobs.text_offset == [0]
    chunks = list(client.completions.create(model="m", prompt="Why", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Ray"


@pytest.mark.parametrize("reason", ["end_turn", "max_tokens"])
def test_openai_responses_reads_a_whole_answer(reason: FinishReason) -> None:
    server = Server(ThinkingPart("hm"), TextPart(TEXT), *CALLS, reason=reason)
    response = server.openai(OpenAIResponses()).responses.create(model="m", input="?")
    assert response.output_text == TEXT
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.status == ("completed" if reason == "end_turn" else "incomplete")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.input_tokens_details.cached_tokens) == (42, 32)


def test_openai_responses_stream_helper_ends_with_the_same_response_as_the_whole_answer() -> None:
    server = Server(ThinkingPart("hm", "sig"), TextPart(TEXT), *CALLS)
    client = server.openai(OpenAIResponses())
    with client.responses.stream(model="m", input="?") as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    whole = client.responses.create(model="m", input="?")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
    assert streamed.output_text == whole.output_text
    assert [item.to_dict()["id"] for item in streamed.output] == [item.to_dict()["id"] for item in whole.output]


def test_openai_responses_second_turn_may_send_back_what_it_got() -> None:
    server = Server(ThinkingPart("hm"), TextPart(TEXT), CALLS[0])
    client = server.openai(OpenAIResponses())
    first = client.responses.create(model="m", input="?")
    turn: list[object] = [item.model_dump() for item in first.output]
    client.responses.create(
        model="m",
        input=[
            {"role": "user", "content": "?"},
            *turn,  # type: ignore[list-item]  # what many programs do
            {"type": "function_call_output", "call_id": "a", "output": "12 C"},
        ],
    )
    kinds = [type(part) for part in server.requests[1].messages[1].content]
    assert kinds == [ThinkingPart, TextPart, ToolUsePart]


def test_openai_responses_reports_a_failure_in_the_stream() -> None:
    server = Server(TextPart(TEXT))
    server.error, server.error_after = EngineDied("The engine is restarting; retry."), 2
    events = list(server.openai(OpenAIResponses()).responses.create(model="m", input="?", stream=True))
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]


def test_openai_lists_models() -> None:
    def respond(request: httpx2.Request) -> httpx2.Response:
        one = request.url.path.endswith("/m")
        return httpx2.Response(200, content=render_model(MODELS[0]) if one else render_models(MODELS))

    client = openai.OpenAI(api_key="k", http_client=httpx2.Client(transport=httpx2.MockTransport(respond)))
    assert [model.id for model in client.models.list()] == ["m", "n"]
    assert client.models.retrieve("m").created == 1_700_000_000


# -- errors ----------------------------------------------------------------------------------------------------------------


def test_both_sdks_raise_their_typed_exceptions() -> None:
    server = Server(TextPart(TEXT))
    server.error = QueueFull("Too many requests are waiting.", retry_after_s=2.5)
    with pytest.raises(openai.RateLimitError) as openai_error:
        server.openai(OpenAIChat()).chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}])
    assert openai_error.value.response.headers["retry-after"] == "3"
    with pytest.raises(anthropic.RateLimitError) as anthropic_error:
        server.anthropic().messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}])
    assert anthropic_error.value.request_id == "req_1"
    server.error = InvalidRequest("no")
    with pytest.raises(openai.BadRequestError):
        server.openai(OpenAIResponses()).responses.create(model="m", input="?")


def test_a_delta_that_is_all_text_is_one_chunk() -> None:
    parsed = OpenAIChat().parse(b'{"model":"m","messages":[{"role":"user","content":"?"}],"stream":true}', tenant=Tenant("t"))
    assert OpenAIChat().writer(parsed.rendering, IDS).feed(TextDelta(0, "a\nb")).count(b"\n\n") == 1


# -- prompt caching ----------------------------------------------------------------------------------------------------------


def cached(server: Server, **written: int) -> None:
    """The answer's prompt was read (32 tokens), written, and 10 tokens were neither."""
    usage = msgspec.structs.replace(USAGE, cache_creation_input_tokens=sum(written.values()), written=written)
    server.completion = msgspec.structs.replace(server.completion, usage=usage)


def test_anthropic_tells_writes_apart_by_lifetime_whole_and_streamed() -> None:
    server = Server(TextPart(TEXT))
    cached(server, **{"5m": 5, "1h": 60})
    client = server.anthropic()
    whole = client.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}])
    with client.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}]) as stream:
        begun = next(event.message.usage.to_dict() for event in stream if event.type == "message_start")
        streamed = stream.get_final_message()
    assert whole.usage.cache_creation is not None
    assert whole.usage.cache_creation.ephemeral_5m_input_tokens == 5
    assert whole.usage.cache_creation.ephemeral_1h_input_tokens == 60
    assert (whole.usage.input_tokens, whole.usage.cache_creation_input_tokens) == (10, 65)
    assert begun["cache_creation"] == whole.usage.cache_creation.to_dict()
    assert streamed.usage.to_dict() == whole.usage.to_dict()
    assert whole.diagnostics is None


def test_writes_without_a_profile_count_as_anthropics_default_lifetime() -> None:
    server = Server(TextPart(TEXT))
    usage = msgspec.structs.replace(USAGE, cache_creation_input_tokens=3)
    server.completion = msgspec.structs.replace(server.completion, usage=usage)
    message = server.anthropic().messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}])
    assert message.usage.cache_creation is not None
    assert message.usage.cache_creation.ephemeral_5m_input_tokens == 3


@pytest.mark.parametrize(
    ("diagnosis", "told"),
    [
        (None, None),
        (Diagnosis("system_changed", 70), {"type": "system_changed", "cache_missed_input_tokens": 70}),
        (Diagnosis("unavailable"), {"type": "unavailable"}),
        (Diagnosis("previous_message_not_found"), {"type": "previous_message_not_found"}),
    ],
)
def test_anthropic_says_why_a_prefix_was_not_reused(diagnosis: Diagnosis | None, told: dict[str, object] | None) -> None:
    server = Server(TextPart(TEXT))
    server.caching = {"diagnosed": True, "diagnosis": diagnosis}
    client = server.anthropic()
    message = client.messages.create(
        model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}], diagnostics={"previous_message_id": "msg_0"}
    )
    assert "diagnostics" in message.model_fields_set
    reason = message.diagnostics.cache_miss_reason if message.diagnostics else None
    assert (reason.to_dict() if reason else None) == told
    with client.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}]) as stream:
        assert stream.get_final_message().diagnostics == message.diagnostics


def test_chat_counts_writes_where_a_profile_bills_them_and_only_there() -> None:
    server = Server(TextPart(TEXT))
    client = server.openai(OpenAIChat())

    def written() -> int | None:
        whole = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}]).usage
        chunks = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "?"}], stream=True, stream_options={"include_usage": True}
        )
        *_, last = chunks
        assert whole is not None
        assert last.usage == whole
        assert whole.prompt_tokens_details is not None
        assert whole.prompt_tokens_details.cached_tokens == 32
        return whole.prompt_tokens_details.cache_write_tokens

    assert written() is None
    server.caching = {"writes_billed": True}
    assert written() == 0
    cached(server, **{"30m": 500})
    assert written() == 500


def test_responses_tells_writes_apart_by_lifetime_and_repeats_what_was_asked() -> None:
    server = Server(TextPart(TEXT))
    client = server.openai(OpenAIResponses())
    plain = client.responses.create(model="m", input="?")
    assert plain.usage is not None
    assert plain.usage.input_tokens_details.cache_write_tokens_details is None
    assert plain.prompt_cache_options is None
    assert plain.prompt_cache_diagnostics is None

    cached(server, **{"30m": 500, "12h": 40})
    response = client.responses.create(
        model="m", input="?", prompt_cache_key="k", prompt_cache_options={"ttl": "12h", "comparison_response_id": "resp_0"}
    )
    assert response.usage is not None
    details = response.usage.input_tokens_details
    assert (details.cached_tokens, details.cache_write_tokens, response.usage.input_tokens) == (32, 540, 582)
    assert details.cache_write_tokens_details is not None
    assert (details.cache_write_tokens_details.ttl_30m_tokens, details.cache_write_tokens_details.ttl_12h_tokens) == (500, 40)
    assert response.prompt_cache_key == "k"
    assert response.prompt_cache_options is not None
    assert response.prompt_cache_options.to_dict() == {"mode": "implicit", "ttl": "12h", "comparison_response_id": "resp_0"}


@pytest.mark.parametrize(
    ("diagnosis", "told"),
    [
        (None, {"type": "cache_hit"}),
        (Diagnosis("tools_changed", 70), {"type": "cache_miss", "reason": "tools_changed", "cache_missed_tokens": 70}),
        (
            Diagnosis("input_changed", 70, 9),
            {
                "type": "cache_miss",
                "reason": "input_changed",
                "cache_missed_tokens": 70,
                "comparison_reusable_tokens": 9,
            },
        ),
        (Diagnosis("comparison_response_not_found"), {"type": "comparison_response_not_found"}),
        (Diagnosis("unavailable"), {"type": "unavailable"}),
    ],
)
def test_responses_says_why_a_prefix_was_not_reused(diagnosis: Diagnosis | None, told: dict[str, object]) -> None:
    server = Server(TextPart(TEXT))
    server.caching = {"diagnosed": True, "diagnosis": diagnosis}
    client = server.openai(OpenAIResponses())
    whole = client.responses.create(model="m", input="?")
    assert whole.prompt_cache_diagnostics is not None
    assert whole.prompt_cache_diagnostics.to_dict() == told
    with client.responses.stream(model="m", input="?") as stream:
        assert stream.get_final_response().prompt_cache_diagnostics == whole.prompt_cache_diagnostics


def test_marks_as_the_sdks_write_them_are_read() -> None:
    server = Server(TextPart(TEXT))
    server.anthropic().messages.create(
        model="m",
        max_tokens=9,
        cache_control={"type": "ephemeral"},
        system=[{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        messages=[{"role": "user", "content": "?"}],
    )
    server.openai(OpenAIChat()).chat.completions.create(
        model="m",
        prompt_cache_options={"mode": "explicit", "ttl": "30m"},
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "?", "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"}}],
            }
        ],
    )
    first, second = (parsed.prompt for parsed in server.parsed)
    assert (first.automatic, [block.mark for block in first.blocks]) == ("5m", ["1h", None])
    assert (second.mode, second.ttl, [block.mark for block in second.blocks]) == ("explicit", "30m", ["12h"])


def test_responses_prewarm_asks_for_no_answer() -> None:
    server = Server()
    server.openai(OpenAIResponses()).responses.create(model="m", input="?", prompt_cache_options={"prewarm": True})
    assert server.requests[0].max_tokens == 0
