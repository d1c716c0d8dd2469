"""Answers of OpenAI's Chat and Completions, and of the many servers that speak these dialects."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.providers import (
    CHAT,
    CHAT_USAGE,
    COMPLETIONS,
    DONE,
    SENT,
    TALK,
    Json,
    call_piece,
    chunk,
    completion_of,
    read,
    said,
    stream,
    whole,
)
from tests.wire.test_same_question import name, value
from tests.wire.test_sse import cut

from anaphora.errors import ServiceError
from anaphora.types import (
    Begin,
    Choice,
    End,
    Finish,
    Raw,
    TextDelta,
    TextPart,
    ThinkingPart,
    TokenLogprob,
    ToolUseDelta,
    ToolUsePart,
    TopLogprob,
    Usage,
)
from anaphora.wire.upstream import UNKNOWN_USAGE


def test_chats_usage_is_told_at_the_end() -> None:
    details = {"reasoning": 8, "audio_input": 3, "image_input": 4}
    assert said(read(CHAT, TALK)) == [
        Begin("gpt-x", Usage(), answer_id="chatcmpl-1"),
        TextDelta(0, "Hel"),
        TextDelta(0, "lo"),
        Finish(0, "end_turn"),
        End(Usage(20, 20, 64, 16, details=details)),
    ]


def test_the_chunk_with_usage_is_kept_from_clients_that_did_not_ask() -> None:
    plain = {"model": "m", "stream": True, "messages": [], "x_new": 1}
    asking = {**plain, "stream_options": {"include_usage": True}}
    for native, shown in ((plain, False), (asking, True), (plain | {"stream_options": None}, False)):
        body = CHAT.passed(json.dumps(native).encode(), model="theirs")
        assert body["stream_options"] == {"include_usage": True}
        deltas = CHAT.reader(body).feed(TALK)
        raw = b"".join(delta.data for delta in deltas if isinstance(delta, Raw))
        assert (b"prompt_tokens" in raw) == shown
        assert completion_of(deltas).usage.input_tokens == 20
        assert raw.endswith(b"data: [DONE]\n\n")


def test_usage_beside_content_is_kept_from_nobody() -> None:
    body = stream(chunk({"content": "a"}, usage=CHAT_USAGE), chunk({}, "stop", usage=CHAT_USAGE), DONE)
    deltas = CHAT.reader(CHAT.passed(json.dumps(SENT).encode(), model="theirs")).feed(body)
    assert b"".join(delta.data for delta in deltas if isinstance(delta, Raw)) == body


def test_calls_that_are_written_at_the_same_time_are_told_one_after_the_other() -> None:
    body = stream(
        chunk({"role": "assistant", "content": None}),
        call_piece(0, "", "call_a", "f"),
        call_piece(1, '{"b"', "call_b", "g"),
        call_piece(0, '{"a":'),
        call_piece(1, ":2}"),
        call_piece(0, "1}"),
        chunk({}, "tool_calls"),
        chunk(usage=CHAT_USAGE),
        DONE,
    )
    deltas = said(read(CHAT, body))
    assert deltas[1:6] == [
        ToolUseDelta(0, 0, "", "call_a", "f"),
        ToolUseDelta(0, 0, '{"a":'),
        ToolUseDelta(0, 0, "1}"),
        ToolUseDelta(0, 1, "", "call_b", "g"),
        ToolUseDelta(0, 1, '{"b"'),
    ]
    assert completion_of(deltas).choices[0].content == (
        ToolUsePart("call_a", "f", '{"a":1}'),
        ToolUsePart("call_b", "g", '{"b":2}'),
    )


@given(
    st.lists(st.tuples(name, st.dictionaries(name, value, max_size=3), st.lists(st.integers(0, 99))), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_calls_come_out_whole_however_they_are_mixed(calls: list[tuple[str, Json, list[int]]], random: Random) -> None:
    expected = [ToolUsePart(f"call_{place}", called, json.dumps(given)) for place, (called, given, _) in enumerate(calls)]
    pieces = [
        [piece.decode() for piece in cut(part.arguments.encode(), places)]
        for part, (_, _, places) in zip(expected, calls, strict=True)
    ]
    events = [call_piece(place, "", part.id, part.name) for place, part in enumerate(expected)]
    while any(pieces):
        place = random.choice([place for place, left in enumerate(pieces) if left])
        events.append(call_piece(place, pieces[place].pop(0)))
    found = completion_of(read(CHAT, stream(*events, chunk({}, "tool_calls"), DONE)))
    assert (found.choices[0].content, found.faithful) == (tuple(expected), True)


def test_a_second_call_is_streamed_once_the_first_is_whole() -> None:
    reader = CHAT.reader(SENT)
    reader.feed(stream(call_piece(0, '{"a":1}', "call_a", "f")))
    assert said(reader.feed(stream(call_piece(1, '{"b"', "call_b", "g")))) == [
        ToolUseDelta(0, 1, "", "call_b", "g"),
        ToolUseDelta(0, 1, '{"b"'),
    ]


@pytest.mark.parametrize("index", [0, None])
def test_calls_that_a_server_does_not_count_are_told_apart_by_their_ids(index: int | None) -> None:
    body = stream(
        call_piece(index, '{"a":1}', "call_a", "f"),
        call_piece(index, '{"b":', "call_b", "g"),
        call_piece(index, "2}", "call_b", None),
        chunk({}, "stop"),
        DONE,
    )
    found = completion_of(read(CHAT, body)).choices[0]
    assert found.content == (ToolUsePart("call_a", "f", '{"a":1}'), ToolUsePart("call_b", "g", '{"b":2}'))
    assert found.reason == "tool_use"


def test_text_between_two_halves_of_a_call_waits() -> None:
    body = stream(
        call_piece(0, '{"a":', "call_a", "f"),
        chunk({"content": "Hm."}),
        call_piece(0, "1}"),
        chunk({}, "tool_calls"),
        DONE,
    )
    assert said(read(CHAT, body))[1:5] == [
        ToolUseDelta(0, 0, "", "call_a", "f"),
        ToolUseDelta(0, 0, '{"a":'),
        ToolUseDelta(0, 0, "1}"),
        TextDelta(0, "Hm."),
    ]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thinking_of_servers_that_show_it(field: str) -> None:
    body = stream(chunk({"role": "assistant", field: "hm"}), chunk({"content": "Hi"}), chunk({}, "stop"), DONE)
    assert completion_of(read(CHAT, body)).choices[0].content == (ThinkingPart("hm"), TextPart("Hi"))
    message = {"role": "assistant", "content": "Hi", field: "hm"}
    body_whole = {"model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    assert whole(CHAT, body_whole).choices[0].content == (ThinkingPart("hm"), TextPart("Hi"))


def test_mistrals_lists_of_parts() -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    body = stream(chunk({"content": [thinking]}), chunk({"content": [{"type": "text", "text": "Hi"}]}), chunk({}, "stop"), DONE)
    assert completion_of(read(CHAT, body)).choices[0].content == (ThinkingPart("hm"), TextPart("Hi"))


SILENT = Usage(10, 2, reads_unsaid=True)
"""Of an upstream that does not say what it had in its cache."""


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 0}}, Usage(10, 2)),
        (  # DeepSeek
            {"prompt_tokens": 10, "completion_tokens": 2, "prompt_cache_hit_tokens": 6, "prompt_cache_miss_tokens": 4},
            Usage(4, 2, 6),
        ),
        ({"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12, "prompt_tokens_details": None}, SILENT),
        (  # hidden reasoning only in the total
            {
                "prompt_tokens": 10,
                "completion_tokens": 2,
                "total_tokens": 19,
                "completion_tokens_details": {"reasoning_tokens": 7},
            },
            Usage(10, 9, details={"reasoning": 7}, reads_unsaid=True),
        ),
        (  # more written than there are tokens: what was written is not counted into the prompt
            {
                "prompt_tokens": 10,
                "completion_tokens": 0,
                "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 90},
            },
            Usage(0, 0, 4, 6),
        ),
        (None, UNKNOWN_USAGE),
    ],
)
def test_usage_of_many_servers(usage: Json | None, expected: Usage) -> None:
    assert completion_of(read(CHAT, stream(chunk({"content": "a"}, "stop"), chunk(usage=usage), DONE))).usage == expected


def test_usage_on_a_chunk_with_content_and_in_a_field_of_their_own() -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    assert completion_of(read(CHAT, stream(chunk({"content": "a"}, "stop", usage=usage), DONE))).usage == SILENT
    groq = stream(chunk({"content": "a"}, "stop", x_groq={"usage": usage}), DONE)
    assert completion_of(read(CHAT, groq)).usage == SILENT


@pytest.mark.parametrize("field", ["stop_reason", "matched_stop"])
def test_the_stop_string_is_told_where_the_server_tells_it(field: str) -> None:
    for stop, expected in (("END", ("stop_sequence", "END")), (151645, ("end_turn", None))):
        more: Json = {field: stop}
        found = completion_of(read(CHAT, stream(chunk({"content": "a"}), chunk({}, "stop", **more), DONE))).choices[0]
        assert (found.reason, found.stop_sequence) == expected


def test_azures_first_chunk_and_an_empty_last_one_say_nothing() -> None:
    filtered = {**chunk(), "model": "", "prompt_filter_results": [{"prompt_index": 0}]}
    body = stream(filtered, chunk({"content": "Hi"}), chunk({}, "stop"), chunk({"content": ""}), DONE)
    found = completion_of(read(CHAT, body))
    assert (found.model, found.choices[0].content, found.faithful) == ("gpt-x", (TextPart("Hi"),), True)


@pytest.mark.parametrize(
    "delta",
    [
        {"annotations": [{"type": "url_citation"}]},
        {"audio": {"id": "a", "data": "aGk="}},
        {"function_call": {"name": "f", "arguments": "{}"}},
        {"reasoning_details": [{"type": "reasoning.encrypted"}]},
        {"content": [{"type": "image_url"}]},
        {"hologram": 3},
    ],
)
def test_what_deltas_cannot_say_of_chats_answers_is_not_learned(delta: Json) -> None:
    found = completion_of(read(CHAT, stream(chunk({"content": "a"}), chunk(delta), chunk({}, "stop"), DONE)))
    assert not found.faithful


def test_a_refusal_in_text() -> None:
    found = completion_of(read(CHAT, stream(chunk({"refusal": "I can"}), chunk({"refusal": "not."}), chunk({}, "stop"), DONE)))
    assert (found.choices[0], found.faithful) == (Choice((TextPart("I cannot."),), "refusal"), False)


def test_parts_of_letters_in_logprobs_are_not_learned() -> None:
    def logprobs(token: str, spelled: list[int]) -> bytes:
        entry = {"token": token, "logprob": -0.5, "bytes": spelled, "top_logprobs": []}
        piece = chunk({"content": "a"}, "stop")
        piece["choices"][0]["logprobs"] = {"content": [entry], "refusal": None}
        return stream(piece, DONE)

    found = completion_of(read(CHAT, logprobs("a", [97])))
    assert (found.choices[0].logprobs, found.faithful) == ((TokenLogprob("a", -0.5),), True)
    assert not completion_of(read(CHAT, logprobs("\\xe2", [226]))).faithful


@pytest.mark.parametrize(
    "events",
    [
        [chunk({"content": "a"}), DONE],  # why did it stop?
        [DONE],
        [chunk({"content": "a"}, "insufficient_system_resource")],
        [chunk({"content": "a"}, index=1), chunk({}, "stop", index=1), DONE],
        ["data: {\n\n"],
        ["data: 3\n\n"],
        ["<html>\n"],
        [chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"arguments": "{}"}}]}), chunk({}, "tool_calls")],
    ],
)
def test_what_is_no_clean_answer_of_chat_fails(events: list[Json | str]) -> None:
    with pytest.raises(ServiceError):
        read(CHAT, stream(*events))


def test_log_probabilities_of_completions() -> None:
    columns: Json = {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -1],
        "top_logprobs": [None, {"b": -1, "c": -2}],
        "text_offset": [0, 1],
    }
    choice = {"index": 0, "text": "ab", "logprobs": columns, "finish_reason": "length"}
    found = whole(COMPLETIONS, {"model": "m", "choices": [choice]})
    top = (TopLogprob("b", -1.0), TopLogprob("c", -2.0))
    assert found.choices[0].logprobs == (TokenLogprob("a", 0.0), TokenLogprob("b", -1.0, top))
    assert not found.faithful  # the first token of a prompt has none, which deltas cannot say
