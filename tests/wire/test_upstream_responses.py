"""Answers of OpenAI's Responses."""

from __future__ import annotations

import json

import pytest
from tests.wire.providers import (
    CALL,
    MESSAGE,
    REASONING,
    RESPONSES,
    RESPONSES_USAGE,
    TEXT,
    Json,
    completed,
    completion_of,
    created,
    item_done,
    numbered,
    read,
    response,
    responses_stream,
    said,
    whole,
)

from anaphora.errors import BackendFailed
from anaphora.types import (
    Begin,
    Choice,
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


def test_a_stream_of_responses() -> None:
    body = responses_stream()
    deltas = read(RESPONSES, body)
    assert said(deltas) == [
        Begin("gpt-x", Usage(), answer_id="resp_1"),
        ThinkingDelta(0, "Fir"),
        ThinkingDelta(0, "st."),
        ThinkingDelta(0, "\n\nSecond."),
        ThinkingDelta(0, "", "gAAAAAB"),
        TextDelta(0, "H"),
        TextDelta(0, "i"),
        ToolUseDelta(0, 0, "", "call_1", "f"),
        ToolUseDelta(0, 0, '{"a":1}'),
        Finish(0, "tool_use"),
        # A replay could not give the summary and the id back.
        End(Usage(20, 20, 64, 16, {"30m": 16}, details={"reasoning": 8}), faithful=False),
    ]
    assert b"".join(delta.data for delta in deltas if isinstance(delta, Raw)) == body
    same = whole(RESPONSES, response("completed", [REASONING, MESSAGE, CALL], usage=RESPONSES_USAGE))
    assert same == completion_of(deltas)


def test_an_answer_of_text_alone_may_be_learned() -> None:
    body = numbered(created(), item_done(0, MESSAGE), completed(MESSAGE))
    assert completion_of(read(RESPONSES, body)).faithful


def test_a_server_that_streams_nothing_but_the_whole_is_understood() -> None:
    found = completion_of(read(RESPONSES, numbered(completed(MESSAGE, CALL))))
    assert found.choices[0].content == (TextPart("Hi"), ToolUsePart("call_1", "f", '{"a":1}'))


@pytest.mark.parametrize(
    "item",
    [
        {"id": "ws_1", "type": "web_search_call", "status": "completed"},
        {**MESSAGE, "phase": "commentary"},
        {**MESSAGE, "content": [{**TEXT, "annotations": [{"type": "url_citation"}]}]},
        {**MESSAGE, "content": [TEXT, TEXT]},
        {**CALL, "namespace": "crm"},
        {**CALL, "caller": {"type": "program", "caller_id": "p"}},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"},
    ],
    ids=lambda item: json.dumps(item)[:60],
)
def test_what_deltas_cannot_say_of_responses_is_not_learned(item: Json) -> None:
    assert not completion_of(read(RESPONSES, numbered(created(), item_done(0, item), completed(item)))).faithful
    assert not whole(RESPONSES, response("completed", [item])).faithful


def test_reasoning_that_is_shown_may_be_learned() -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    found = completion_of(read(RESPONSES, numbered(created(), item_done(0, item), completed(item))))
    assert (found.choices[0].content, found.faithful) == ((ThinkingPart("hm"),), True)


@pytest.mark.parametrize(
    ("word", "reason", "faithful"),
    [("max_output_tokens", "max_tokens", True), ("content_filter", "refusal", True), ("steered", "end_turn", False)],
)
def test_an_incomplete_response(word: str, reason: str, faithful: bool) -> None:
    body = response("incomplete", [MESSAGE], incomplete_details={"reason": word})
    found = completion_of(read(RESPONSES, numbered(created(), {"type": "response.incomplete", "response": body})))
    assert (found.choices[0].reason, found.faithful) == (reason, faithful)


def test_a_refusal_of_responses() -> None:
    refusal = {**MESSAGE, "content": [{"type": "refusal", "refusal": "No."}]}
    piece = {"type": "response.refusal.delta", "item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": "No."}
    body = numbered(created(), piece, item_done(0, refusal), completed(refusal))
    for found in (completion_of(read(RESPONSES, body)), whole(RESPONSES, response("completed", [refusal]))):
        assert (found.choices[0], found.faithful) == (Choice((TextPart("No."),), "refusal"), False)


def test_a_response_that_is_not_finished_is_no_answer() -> None:
    with pytest.raises(BackendFailed):
        RESPONSES.read_whole(json.dumps(response("queued", [])).encode())
