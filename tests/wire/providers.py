"""Answers in the shapes in which providers, and the many servers that speak their dialects, write them."""

from __future__ import annotations

import json
from typing import Any

from anaphora.transcript import collect
from anaphora.types import (
    Completion,
    Delta,
    Raw,
)
from anaphora.wire.upstream import UpstreamDialect
from anaphora.wire.upstream_anthropic import UpstreamAnthropic
from anaphora.wire.upstream_chat import UpstreamChat
from anaphora.wire.upstream_completions import UpstreamCompletions
from anaphora.wire.upstream_responses import UpstreamResponses

Json = dict[str, Any]
ANTHROPIC, CHAT, RESPONSES, COMPLETIONS = UpstreamAnthropic(), UpstreamChat(), UpstreamResponses(), UpstreamCompletions()
SENT: Json = {"model": "m", "stream": True}


def stream(*events: Json | str, named: bool = False) -> bytes:
    """Objects are events, by their type's name if `named`; text is as it is."""
    body = ""
    for event in events:
        name = f"event: {event['type']}\n" if named and isinstance(event, dict) else ""
        body += event if isinstance(event, str) else f"{name}data: {json.dumps(event, ensure_ascii=False)}\n\n"
    return body.encode()


def read(upstream: UpstreamDialect, body: bytes) -> list[Delta]:
    return upstream.reader(SENT).feed(body)


def said(deltas: list[Delta]) -> list[Delta]:
    return [delta for delta in deltas if not isinstance(delta, Raw)]


def whole(upstream: UpstreamDialect, body: Json) -> Completion:
    completion = collect(upstream.read_whole(json.dumps(body).encode()))
    assert completion is not None
    return completion


def completion_of(deltas: list[Delta]) -> Completion:
    completion = collect(deltas)
    assert completion is not None
    return completion


# -- Anthropic --------------------------------------------------------------------------------------------


def message_start(**usage: Any) -> Json:
    message: Json = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 12, "output_tokens": 1, "service_tier": "standard", **usage},
    }
    return {"type": "message_start", "message": message}


def block_start(index: int, **block: Any) -> Json:
    return {"type": "content_block_start", "index": index, "content_block": block}


def block_delta(index: int, kind: str, **fields: Any) -> Json:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **fields}}


def block_stop(index: int) -> Json:
    return {"type": "content_block_stop", "index": index}


def message_end(reason: str, stop_sequence: str | None = None, **usage: Any) -> list[Json]:
    delta = {"stop_reason": reason, "stop_sequence": stop_sequence}
    return [
        {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 30, **usage}},
        {"type": "message_stop"},
    ]


THINKING_AND_CALLS = stream(
    message_start(
        cache_creation_input_tokens=300,
        cache_read_input_tokens=2000,
        cache_creation={"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200},
    ),
    block_start(0, type="thinking", thinking="", signature=""),
    ": keep-alive\n\n",
    {"type": "ping"},
    block_delta(0, "thinking_delta", thinking="Which\u2028city?"),
    block_delta(0, "signature_delta", signature="EqQB"),
    block_stop(0),
    block_start(1, type="text", text=""),
    block_delta(1, "text_delta", text="Let me look."),
    block_stop(1),
    block_start(2, type="tool_use", id="toolu_1", name="weather", input={}),
    block_delta(2, "input_json_delta", partial_json=""),
    block_delta(2, "input_json_delta", partial_json='{"city": '),
    block_delta(2, "input_json_delta", partial_json='"Oslo"}'),
    block_stop(2),
    block_start(3, type="tool_use", id="toolu_2", name="now", input={}),
    block_stop(3),
    *message_end("tool_use", output_tokens_details={"thinking_tokens": 9}),
    named=True,
)


# -- Chat --------------------------------------------------------------------------------------------


def chunk(delta: Json | None = None, finish: str | None = None, index: int = 0, **fields: Any) -> Json:
    choice: Json = {"index": index, "delta": delta or {}, "logprobs": None, "finish_reason": finish}
    choice |= {key: fields.pop(key) for key in ("stop_reason", "matched_stop") if key in fields}
    choices = [] if delta is None and finish is None else [choice]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-x"}
    return {**head, "choices": choices, "usage": None, **fields}


def call_piece(index: int | None, arguments: str = "", call_id: str | None = None, name: str | None = None) -> Json:
    function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    piece: Json = {"function": function}
    if index is not None:
        piece["index"] = index
    if call_id is not None:
        piece |= {"id": call_id, "type": "function"}
    return chunk({"tool_calls": [piece]})


DONE = "data: [DONE]\n\n"
CHAT_USAGE: Json = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "total_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 64, "cache_write_tokens": 16, "audio_tokens": 3, "image_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 8, "audio_tokens": 0, "accepted_prediction_tokens": 0},
}
TALK = stream(
    chunk({"role": "assistant", "content": "", "refusal": None}),
    chunk({"content": "Hel"}),
    chunk({"content": "lo"}),
    chunk({}, "stop"),
    chunk(usage=CHAT_USAGE),
    DONE,
)


# -- Responses --------------------------------------------------------------------------------------------


def response(status: str, output: list[Json], **fields: Any) -> Json:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": status,
        "model": "gpt-x",
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": None,
        **fields,
    }


RESPONSES_USAGE: Json = {
    "input_tokens": 100,
    "input_tokens_details": {
        "cached_tokens": 64,
        "cache_write_tokens": 16,
        "cache_write_tokens_details": {"ttl_30m_tokens": 16, "ttl_12h_tokens": 0},
    },
    "output_tokens": 20,
    "output_tokens_details": {"reasoning_tokens": 8},
    "total_tokens": 120,
}
REASONING: Json = {
    "id": "rs_1",
    "type": "reasoning",
    "summary": [{"type": "summary_text", "text": "First."}, {"type": "summary_text", "text": "Second."}],
    "encrypted_content": "gAAAAAB",
}
TEXT: Json = {"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []}
MESSAGE: Json = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [TEXT]}
CALL: Json = {
    "id": "fc_1",
    "type": "function_call",
    "status": "completed",
    "call_id": "call_1",
    "name": "f",
    "arguments": '{"a":1}',
}


def numbered(*events: Json) -> bytes:
    return stream(*({**event, "sequence_number": number} for number, event in enumerate(events)), named=True)


def created() -> Json:
    return {"type": "response.created", "response": response("in_progress", [])}


def item_done(place: int, item: Json) -> Json:
    return {"type": "response.output_item.done", "output_index": place, "item": item}


def completed(*output: Json) -> Json:
    return {"type": "response.completed", "response": response("completed", list(output), usage=RESPONSES_USAGE)}


def responses_stream() -> bytes:
    summary = {"type": "response.reasoning_summary_text.delta", "item_id": "rs_1", "output_index": 0}
    part = {"item_id": "msg_1", "output_index": 1, "content_index": 0}
    return numbered(
        created(),
        {"type": "response.in_progress", "response": response("in_progress", [])},
        {"type": "response.output_item.added", "output_index": 0, "item": {**REASONING, "summary": []}},
        {**summary, "summary_index": 0, "delta": "Fir"},
        {**summary, "summary_index": 0, "delta": "st."},
        {**summary, "summary_index": 1, "delta": "Second."},
        item_done(0, REASONING),
        {"type": "response.output_item.added", "output_index": 1, "item": {**MESSAGE, "content": [], "status": "in_progress"}},
        {"type": "response.content_part.added", **part, "part": {**TEXT, "text": ""}},
        {"type": "response.output_text.delta", **part, "delta": "H", "logprobs": [], "obfuscation": "x7"},
        {"type": "response.output_text.delta", **part, "delta": "i", "logprobs": []},
        {"type": "response.output_text.done", **part, "text": "Hi", "logprobs": []},
        {"type": "response.content_part.done", **part, "part": TEXT},
        item_done(1, MESSAGE),
        {"type": "response.output_item.added", "output_index": 2, "item": {**CALL, "arguments": "", "status": "in_progress"}},
        {"type": "response.function_call_arguments.delta", "item_id": "fc_1", "output_index": 2, "delta": '{"a":1}'},
        {"type": "response.function_call_arguments.done", "item_id": "fc_1", "output_index": 2, "arguments": '{"a":1}'},
        item_done(2, CALL),
        completed(REASONING, MESSAGE, CALL),
    )
