"""How Anthropic's dialect writes answers down: messages, their streams, errors, models."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from anaphora.errors import ServiceError
from anaphora.prompt import Diagnosis
from anaphora.types import (
    Begin,
    Completion,
    End,
    Finish,
    ModelInfo,
    Said,
    TextDelta,
    ThinkingDelta,
    ThinkingPart,
    ToolUseDelta,
    ToolUsePart,
    Usage,
)
from anaphora.wire import sse
from anaphora.wire.base import Ids, Rendering, encode
from anaphora.wire.fields import Json


def whole_message(completion: Completion, rendering: Rendering, ids: Ids) -> Json:
    """The message object of a whole answer. Empty text is no block: a pre-warm's content is []."""
    choice = completion.choices[0]
    content: list[object] = []
    num_tools = 0
    for part in choice.content:
        if isinstance(part, ToolUsePart):
            call_id = ids.call("toolu_", 0, num_tools)
            content.append({"type": "tool_use", "id": call_id, "name": part.name, "input": _tool_input(part.arguments)})
            num_tools += 1
        elif isinstance(part, ThinkingPart):
            content.append({"type": "thinking", "thinking": part.text, "signature": part.signature})
        elif part.text:
            content.append({"type": "text", "text": part.text})
    return _message(rendering, ids, content, choice.reason, choice.stop_sequence, completion.usage)


def _message(
    rendering: Rendering, ids: Ids, content: list[object], reason: str | None, stop_sequence: str | None, usage: Usage
) -> Json:
    written = usage.written or {"5m": usage.cache_creation_input_tokens}
    return {
        "id": f"msg_{ids.id}",
        "type": "message",
        "role": "assistant",
        "model": rendering.model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": stop_sequence,
        "usage": {
            **_usage(usage),
            # Writes that are not told apart by lifetime count as the default one.
            "cache_creation": {
                "ephemeral_5m_input_tokens": written.get("5m", 0),
                "ephemeral_1h_input_tokens": written.get("1h", 0),
            },
            "service_tier": "standard",
        },
        **({"diagnostics": _diagnostics(rendering.diagnosis)} if rendering.diagnosed else {}),
    }


def _diagnostics(diagnosis: Diagnosis | None) -> Json | None:
    """Null is what the API says where the earlier prompt is a prefix of this one, or where none was named."""
    if diagnosis is None:
        return None
    reason: Json = {"type": diagnosis.reason}
    if diagnosis.reason.endswith("_changed"):
        reason["cache_missed_input_tokens"] = diagnosis.missed_tokens
    return {"cache_miss_reason": reason}


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.input_tokens,
        "cache_creation_input_tokens": usage.cache_creation_input_tokens,
        "cache_read_input_tokens": usage.cache_read_input_tokens,
        "output_tokens": usage.output_tokens,
    }


def _tool_input(arguments: str) -> object:
    """`input` is an object; arguments that are none are wrapped the way Anthropic's guide tells clients to."""
    if not arguments.strip():
        return {}
    try:
        msgspec.json.decode(arguments, type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError):
        return {"INVALID_JSON": arguments}
    return msgspec.Raw(arguments.encode())


class MessageWriter:
    """Content blocks open and close one after the other; a delta of another kind, or of another tool call, opens the next."""

    def __init__(self, rendering: Rendering, ids: Ids) -> None:
        self._rendering = rendering
        self._ids = ids
        self._index = -1  # of the newest block
        self._open = ""  # kind of the block that is open: "", "text", "thinking", "tool"
        self._calls = 0  # tool calls begun
        self._call = -1  # index of the newest one
        self._finish = Finish(0, "end_turn")

    def feed(self, delta: Said) -> bytes:
        if isinstance(delta, TextDelta):
            if not delta.text:
                return b""
            start = b"" if self._open == "text" else self._start("text", {"type": "text", "text": ""})
            return start + _block_delta(self._index, b"text_delta", b"text", delta.text)
        if isinstance(delta, ToolUseDelta):
            return self._tool(delta)
        if isinstance(delta, ThinkingDelta):
            return self._thinking(delta)
        if isinstance(delta, Begin):
            message = _message(self._rendering, self._ids, [], None, None, delta.usage)
            return sse.event(b"message_start", encode({"type": "message_start", "message": message}))
        if isinstance(delta, Finish):
            self._finish = delta
            return self._stop()
        return self._end(delta)

    def fail(self, error: ServiceError, passed: bytes = b"") -> bytes:
        return sse.event(b"error", encode(error_body(error)))

    def _start(self, kind: str, block: Json) -> bytes:
        stop = self._stop()
        self._index += 1
        self._open = kind
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return stop + sse.event(b"content_block_start", encode(start))

    def _stop(self) -> bytes:
        if not self._open:
            return b""
        self._open = ""
        return sse.event(b"content_block_stop", b'{"type":"content_block_stop","index":%d}' % self._index)

    def _tool(self, delta: ToolUseDelta) -> bytes:
        start = b""
        if self._open != "tool" or delta.index != self._call:
            call_id = self._ids.call("toolu_", 0, self._calls)
            start = self._start("tool", {"type": "tool_use", "id": call_id, "name": delta.name, "input": {}})
            self._calls += 1
            self._call = delta.index
        if not delta.arguments:
            return start
        return start + _block_delta(self._index, b"input_json_delta", b"partial_json", delta.arguments)

    def _thinking(self, delta: ThinkingDelta) -> bytes:
        events = b""
        if self._open != "thinking":
            events = self._start("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        if delta.text:
            events += _block_delta(self._index, b"thinking_delta", b"thinking", delta.text)
        if delta.signature:
            events += _block_delta(self._index, b"signature_delta", b"signature", delta.signature)
        return events

    def _end(self, delta: End) -> bytes:
        finish = {"stop_reason": self._finish.reason, "stop_sequence": self._finish.stop_sequence}
        event = {"type": "message_delta", "delta": finish, "usage": _usage(delta.usage)}
        return sse.event(b"message_delta", encode(event)) + sse.event(b"message_stop", b'{"type":"message_stop"}')


def _block_delta(index: int, kind: bytes, key: bytes, text: str) -> bytes:
    payload = b'{"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":%b}}' % (index, kind, key, encode(text))
    return sse.event(b"content_block_delta", payload)


# -- errors, models ----------------------------------------------------------------------------------------------------------

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def wire_status(error: ServiceError) -> int:
    return 529 if error.status == 503 else error.status


def error_body(error: ServiceError) -> Json:
    kind = _ERROR_TYPES.get(wire_status(error), "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def model_object(model: ModelInfo) -> Json:
    fields: Json = {
        "type": "model",
        "id": model.id,
        "display_name": model.id,
        "created_at": datetime.fromtimestamp(model.created_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
    }
    if model.max_input_tokens:
        fields["max_input_tokens"] = model.max_input_tokens
    return fields
