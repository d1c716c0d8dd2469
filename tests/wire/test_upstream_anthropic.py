"""Answers of Anthropic's API, and of servers that speak its dialect."""

from __future__ import annotations

import json

import pytest
from tests.wire.providers import (
    ANTHROPIC,
    SENT,
    THINKING_AND_CALLS,
    Json,
    block_delta,
    block_start,
    block_stop,
    completion_of,
    message_end,
    message_start,
    read,
    said,
    stream,
    whole,
)

from anaphora.types import (
    Begin,
    Choice,
    Completion,
    End,
    Finish,
    Raw,
    TextDelta,
    TextPart,
    ThinkingDelta,
    ThinkingPart,
    ToolUseDelta,
    ToolUsePart,
    Usage,
)
from anaphora.wire.upstream import UNKNOWN_USAGE


def test_anthropics_stream_of_thinking_text_and_calls() -> None:
    deltas = read(ANTHROPIC, THINKING_AND_CALLS)
    usage = Usage(12, 30, 2000, 300, {"5m": 100, "1h": 200}, details={"reasoning": 9})
    assert said(deltas) == [
        Begin("claude-x", Usage(12, 0, 2000, 300, {"5m": 100, "1h": 200}), answer_id="msg_1"),
        ThinkingDelta(0, "Which\u2028city?"),
        ThinkingDelta(0, "", "EqQB"),
        TextDelta(0, "Let me look."),
        ToolUseDelta(0, 0, "", "toolu_1", "weather"),
        ToolUseDelta(0, 0, '{"city": '),
        ToolUseDelta(0, 0, '"Oslo"}'),
        ToolUseDelta(0, 1, "", "toolu_2", "now"),
        ToolUseDelta(0, 1, "{}"),
        Finish(0, "tool_use"),
        End(usage),
    ]
    assert b"".join(delta.data for delta in deltas if isinstance(delta, Raw)) == THINKING_AND_CALLS


def test_the_last_raw_is_before_the_end_and_nothing_is_behind_it() -> None:
    reader = ANTHROPIC.reader(SENT)
    deltas = reader.feed(THINKING_AND_CALLS + stream({"type": "ping"}, named=True))
    assert isinstance(deltas[-1], End)
    last = [delta for delta in deltas if isinstance(delta, Raw)][-1]
    assert b"message_stop" in last.data
    assert reader.feed(b"data: {}\n\n") == []


def test_a_cut_stream_has_no_end() -> None:
    for size in range(0, len(THINKING_AND_CALLS), 97):
        assert not any(isinstance(delta, End) for delta in read(ANTHROPIC, THINKING_AND_CALLS[:size]))


UNSAYABLE: list[list[Json]] = [
    [block_start(0, type="redacted_thinking", data="abc"), block_stop(0)],
    [
        block_start(0, type="server_tool_use", id="srvtoolu_1", name="web_search", input={}),
        block_delta(0, "input_json_delta", partial_json='{"query":"x"}'),
        block_stop(0),
        block_start(1, type="web_search_tool_result", tool_use_id="srvtoolu_1", content=[]),
        block_stop(1),
    ],
    [
        block_start(0, type="text", text="", citations=[]),
        block_delta(0, "citations_delta", citation={"type": "char_location"}),
        block_stop(0),
    ],
    [block_start(0, type="text", text="a"), block_stop(0), block_start(1, type="text", text="b"), block_stop(1)],
    [block_start(0, type="tool_use", id="t", name="f", input={}, caller={"type": "code_execution_20260120"}), block_stop(0)],
    [block_start(0, type="hologram", pixels=3), block_stop(0)],
    [{"type": "something_new"}],
]


@pytest.mark.parametrize("events", UNSAYABLE, ids=lambda events: json.dumps(events)[:60])
def test_what_deltas_cannot_say_of_anthropics_answers_is_passed_on_but_not_learned(events: list[Json]) -> None:
    text = [block_start(9, type="text", text="Hi"), block_stop(9)] if "text" not in json.dumps(events) else []
    body = stream(message_start(), *events, *text, *message_end("end_turn"), named=True)
    deltas = read(ANTHROPIC, body)
    assert not completion_of(deltas).faithful
    assert b"".join(delta.data for delta in deltas if isinstance(delta, Raw)) == body


@pytest.mark.parametrize(
    ("word", "reason", "faithful"),
    [
        ("end_turn", "end_turn", True),
        ("refusal", "refusal", True),
        ("pause_turn", "end_turn", False),
        ("model_context_window_exceeded", "max_tokens", False),
        ("something_new", "end_turn", False),
    ],
)
def test_reasons_of_anthropics_to_stop(word: str, reason: str, faithful: bool) -> None:
    found = completion_of(read(ANTHROPIC, stream(message_start(), *message_end(word), named=True)))
    assert (found.choices[0].reason, found.faithful) == (reason, faithful)


def test_a_stop_sequence_is_kept() -> None:
    found = completion_of(read(ANTHROPIC, stream(message_start(), *message_end("stop_sequence", "END"), named=True)))
    assert found.choices[0] == Choice((), "stop_sequence", "END")


def test_later_counts_of_anthropics_take_the_place_of_earlier_ones() -> None:
    """Servers that speak the dialect often know nothing at the start."""
    start, end = message_start(input_tokens=0), message_end("end_turn", input_tokens=7, cache_read_input_tokens=5)
    assert completion_of(read(ANTHROPIC, stream(start, *end, named=True))).usage == Usage(7, 30, 5)
    unsaid = message_end("end_turn", input_tokens=None)
    assert completion_of(read(ANTHROPIC, stream(message_start(), *unsaid, named=True))).usage == Usage(12, 30)


def test_a_server_that_gives_the_whole_input_of_a_call_at_once_is_understood() -> None:
    body = stream(
        message_start(),
        block_start(0, type="tool_use", id="t", name="f", input={"a": 1}),
        block_stop(0),
        *message_end("tool_use"),
    )
    assert completion_of(read(ANTHROPIC, body)).choices[0].content == (ToolUsePart("t", "f", '{"a":1}'),)


def test_a_whole_message_of_anthropics() -> None:
    content = [
        {"type": "thinking", "thinking": "hm", "signature": "sig"},
        {"type": "text", "text": "Hi", "citations": None},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1]}, "caller": {"type": "direct"}},
    ]
    message = message_start()["message"] | {"content": content, "stop_reason": "tool_use"}
    found = whole(ANTHROPIC, message)
    parts = (ThinkingPart("hm", "sig"), TextPart("Hi"), ToolUsePart("t", "f", '{"a":[1]}'))
    assert found == Completion("claude-x", (Choice(parts, "tool_use"),), Usage(12, 1))


def test_without_usage_it_is_unknown_and_not_none() -> None:
    message = message_start()["message"] | {"content": [], "stop_reason": "end_turn", "usage": None}
    assert whole(ANTHROPIC, message).usage == UNKNOWN_USAGE
    assert UNKNOWN_USAGE.prompt_tokens == UNKNOWN_USAGE.output_tokens == 0
