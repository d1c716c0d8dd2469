"""What a test says shall be answered, in every dialect, and bytes that no dialect knows."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx2
import openai
import pytest

from anaphora.testing.upstream import Match, ToolCall, Upstream

QUESTION: Any = [{"role": "user", "content": "What now?"}]
CALLS = (ToolCall("look", {"at": "the sea"}), ToolCall("wait"))


def message(claude: anthropic.Anthropic, **fields: Any) -> Any:
    return claude.messages.create(**{"model": "claude-opus-5", "max_tokens": 500, "messages": QUESTION, **fields})


def test_a_text_is_answered_in_every_dialect(upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
    upstream.answer("Nothing at all.", count=4)
    assert message(claude).content[0].text == "Nothing at all."
    chat = gpt.chat.completions.create(model="gpt-4.1", messages=QUESTION)
    assert chat.choices[0].message.content == "Nothing at all."
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 3
    assert gpt.responses.create(model="gpt-4.1", input="What now?").output_text == "Nothing at all."
    assert gpt.completions.create(model="gpt-4.1", prompt="What now?").choices[0].text == "Nothing at all."
    assert message(claude).content[0].text == "What now?"


def test_thinking_comes_with_its_signature_and_before_text_and_tools(upstream: Upstream, claude: anthropic.Anthropic) -> None:
    upstream.answer("Let me see.", thinking="Is there a sea?", signature="c2lnbmVk", tools=CALLS, count=2)
    whole: Any = message(claude)
    with claude.messages.stream(model="claude-opus-5", max_tokens=500, messages=QUESTION) as stream:
        streamed: Any = stream.get_final_message()
    for answer in (whole, streamed):
        thinking, text, *calls = answer.content
        assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", "Is there a sea?", "c2lnbmVk")
        assert (text.type, text.text) == ("text", "Let me see.")
        assert [(call.name, call.input) for call in calls] == [("look", {"at": "the sea"}), ("wait", {})]
        assert answer.stop_reason == "tool_use"


def test_several_tool_calls_for_openai(upstream: Upstream, gpt: openai.OpenAI) -> None:
    upstream.answer(tools=CALLS, count=2)
    choice = gpt.chat.completions.create(model="gpt-4.1", messages=QUESTION).choices[0]
    assert choice.finish_reason == "tool_calls"
    calls: Any = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [("look", '{"at": "the sea"}'), ("wait", "{}")]
    output: Any = gpt.responses.create(model="gpt-4.1", input="What now?").output
    assert [item.name for item in output if item.type == "function_call"] == ["look", "wait"]


def test_a_refusal(upstream: Upstream, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
    upstream.answer("I would rather not.", reason="refusal", count=2)
    assert message(claude).stop_reason == "refusal"
    assert gpt.chat.completions.create(model="gpt-4.1", messages=QUESTION).choices[0].finish_reason == "content_filter"


def test_a_text_of_so_many_tokens_which_max_tokens_cuts(upstream: Upstream, claude: anthropic.Anthropic) -> None:
    upstream.answer(num_tokens=400, count=2)
    answer = message(claude)
    assert (answer.usage.output_tokens, answer.stop_reason) == (400, "end_turn")
    answer = message(claude, max_tokens=7)
    assert (answer.usage.output_tokens, answer.stop_reason) == (7, "max_tokens")
    assert answer.content[0].text.split() == [f"word{number}" for number in range(7)]


def test_a_header_of_the_request_tells_its_answer(upstream: Upstream, claude: anthropic.Anthropic) -> None:
    assert message(claude, extra_headers={"x-testing-answer": "plain"}).content[0].text == "plain"
    told = '{"tools": [{"name": "wait"}]}'
    assert message(claude, extra_headers={"x-testing-answer": told}).content[0].name == "wait"
    with pytest.raises(anthropic.BadRequestError, match="x-testing-answer"):
        message(claude, extra_headers={"x-testing-answer": '{"txet": "plain"}'})


def test_answers_are_for_the_requests_they_match(upstream: Upstream, claude: anthropic.Anthropic) -> None:
    upstream.answer("to sonnet", match=Match(model="claude-sonnet-5"), count=None)
    assert message(claude).content[0].text == "What now?"
    for _ in range(2):
        assert message(claude, model="claude-sonnet-5").content[0].text == "to sonnet"


def test_events_that_no_dialect_knows_go_out_as_they_were_told(upstream: Upstream) -> None:
    events = (
        {"type": "message_start", "message": {"id": "msg_1"}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "hologram", "depth": 3}},
        "event: ping\ndata: {}\n\n",
        ": a comment\n\n",
        {"type": "message_stop"},
    )
    upstream.answer(events=events, headers={"x-of-the-future": "yes"})
    # Neither is the request read: the emulator itself knows no such block.
    body = {"model": "claude-opus-9", "messages": [{"role": "user", "content": [{"type": "hologram"}]}], "stream": True}
    answer = httpx2.post(f"{upstream.url}/v1/messages", json=body)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["x-of-the-future"] == "yes"
    assert answer.text == (
        'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1"}}\n\n'
        'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        '"content_block":{"type":"hologram","depth":3}}\n\n'
        "event: ping\ndata: {}\n\n"
        ": a comment\n\n"
        'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )
    [request] = upstream.requests()
    assert request.num_events == 5
    assert request.body == body


def test_events_of_a_chat_have_no_names(upstream: Upstream) -> None:
    upstream.answer(events=({"id": "x"}, "data: [DONE]\n\n"))
    answer = httpx2.post(f"{upstream.url}/v1/chat/completions", json={"model": "gpt-4.1"})
    assert answer.text == 'data: {"id":"x"}\n\ndata: [DONE]\n\n'


def test_faults_befall_events_and_bodies_that_were_told_too(upstream: Upstream) -> None:
    upstream.answer(events=({"n": 1}, {"n": 2}, {"n": 3}))
    upstream.fault("cut", after_events=2)
    with pytest.raises(httpx2.RemoteProtocolError):
        httpx2.post(f"{upstream.url}/v1/chat/completions", json={})
    upstream.answer(body={"any": "thing"}, status=202)
    answer = httpx2.post(f"{upstream.url}/v1/chat/completions", json={})
    assert (answer.status_code, answer.json()) == (202, {"any": "thing"})
    assert [(request.outcome, request.num_events) for request in upstream.requests()] == [("fault", 2), ("finished", 0)]
