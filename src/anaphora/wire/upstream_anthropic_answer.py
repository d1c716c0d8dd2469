"""How answers of Anthropic's Messages API are read: messages, their streams, usage, errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anaphora.errors import BackendFailed
from anaphora.types import (
    Begin,
    Delta,
    End,
    Finish,
    FinishReason,
    Raw,
    Said,
    TextDelta,
    ThinkingDelta,
    ToolUseDelta,
    Usage,
)
from anaphora.wire.base import encode
from anaphora.wire.fields import Json
from anaphora.wire.sse import Event
from anaphora.wire.upstream import (
    UNKNOWN_USAGE,
    EventReader,
    UpstreamError,
    before_answer,
    count_of,
    json_object,
    malformed,
    object_of,
    objects_of,
    says_more,
    stream_failure,
    text_of,
    unreadable_error,
)

_DIALECT = "anthropic"

_REASONS: dict[str, FinishReason] = {
    "end_turn": "end_turn",
    "max_tokens": "max_tokens",
    "stop_sequence": "stop_sequence",
    "tool_use": "tool_use",
    "refusal": "refusal",
}
_NEAREST: dict[str, FinishReason] = {"model_context_window_exceeded": "max_tokens"}

_BLOCK_FIELDS = {
    "text": frozenset({"type", "text"}),
    "thinking": frozenset({"type", "thinking", "signature"}),
    "tool_use": frozenset({"type", "id", "name", "input", "caller"}),
}
_DELTA_FIELDS = frozenset({"stop_reason", "stop_sequence"})


class _Answer:
    """What both forms of an answer have: blocks one after the other, and why it stopped."""

    def __init__(self) -> None:
        self.faithful = True
        self.num_calls = 0
        self._last = ("", False)  # kind of the newest block; whether it was signed

    def begins(self, block: Json) -> str:
        """The kind of a new block that deltas can say; empty for any other."""
        kind = text_of(block.get("type"))
        if kind not in _BLOCK_FIELDS:
            self.faithful = False
            return ""
        if says_more(block, _BLOCK_FIELDS[kind]):
            self.faithful = False
        if kind == "tool_use":
            self.num_calls += 1
            if object_of(block.get("caller")).get("type", "direct") != "direct":
                self.faithful = False
        elif self._last == (kind, False):
            self.faithful = False  # deltas would make one of the two
        self._last = (kind, False)
        return kind

    def signed(self) -> None:
        self._last = (self._last[0], True)

    def finish(self, fields: Json) -> Finish:
        if says_more(fields, _DELTA_FIELDS):
            self.faithful = False
        word = text_of(fields.get("stop_reason"))
        reason = _REASONS.get(word)
        if reason is None:
            self.faithful = False
            reason = _NEAREST.get(word, "end_turn")
        stop = fields.get("stop_sequence")
        return Finish(0, reason, stop if isinstance(stop, str) else None)


class MessageReader(EventReader):
    dialect = _DIALECT

    def __init__(self) -> None:
        super().__init__()
        self._answer = _Answer()
        self._usage: Json | None = None
        self._begun = False
        self._block = ""  # kind of the open block that deltas can say
        self._index: object = None
        self._input: Json = {}  # of the open tool call, as it was when that began
        self._arguments = False  # it had more since
        self._stop: Json = {}

    def read(self, event: Event, data: bytes) -> Sequence[Said]:
        fields = json_object(data)
        kind = fields.get("type") or event.name
        if kind == "content_block_delta" and self._begun:  # nearly every event
            return self._block_delta(fields)
        return list(self._rarer(kind, fields, data))

    def _rarer(self, kind: object, fields: Json, data: bytes) -> Iterator[Said]:
        if kind == "error":
            raise stream_failure(_error(500, fields) or unreadable_error(500, data), _DIALECT, data)
        if kind == "message_start":
            yield self._start(object_of(fields.get("message")))
        elif kind == "ping":
            return
        elif not self._begun:
            raise malformed(f"{kind!r} before message_start")
        elif kind == "content_block_start":
            yield from self._block_start(fields)
        elif kind == "content_block_stop":
            yield from self._block_stop()
        elif kind == "message_delta":
            self._stop |= {key: value for key, value in object_of(fields.get("delta")).items() if value is not None}
            self._counted(fields.get("usage"))
        elif kind == "message_stop":
            yield from self._block_stop()
            yield self._answer.finish(self._stop)
            yield End(read_usage(self._usage), faithful=self._answer.faithful)
            self.ended = True
        else:
            self._answer.faithful = False

    def _start(self, message: Json) -> Begin:
        if self._begun:
            raise malformed("a second message_start")
        self._begun = True
        self._counted(message.get("usage"))
        usage = before_answer(read_usage(self._usage))
        return Begin(text_of(message.get("model")), usage, answer_id=text_of(message.get("id")))

    def _counted(self, usage: object) -> None:
        """Later counts are of the whole answer so far: they take the place of earlier ones."""
        given = {key: value for key, value in object_of(usage).items() if value is not None}
        if given:
            self._usage = {**(self._usage or {}), **given}

    def _block_start(self, fields: Json) -> Iterator[Said]:
        yield from self._block_stop()
        block = object_of(fields.get("content_block"))
        self._index = fields.get("index")
        self._block = self._answer.begins(block)
        if self._block == "text":
            if text := text_of(block.get("text")):
                yield TextDelta(0, text)
        elif self._block == "thinking":
            yield from self._thinking(text_of(block.get("thinking")), text_of(block.get("signature")))
        elif self._block == "tool_use":
            self._input, self._arguments = object_of(block.get("input")), False
            name = text_of(block.get("name"))
            if not name:
                raise malformed("a tool call without a name")
            yield ToolUseDelta(0, self._answer.num_calls - 1, "", text_of(block.get("id")), name)

    def _block_delta(self, fields: Json) -> Sequence[Said]:
        delta = object_of(fields.get("delta"))
        if self._block and fields.get("index") != self._index:
            raise malformed(f"a delta of block {fields.get('index')} within block {self._index}")
        match self._block, delta.get("type"):
            case "text", "text_delta":
                if text := text_of(delta.get("text")):
                    return (TextDelta(0, text),)
            case "thinking", "thinking_delta":
                return self._thinking(text_of(delta.get("thinking")), "")
            case "thinking", "signature_delta":
                return self._thinking("", text_of(delta.get("signature")))
            case "tool_use", "input_json_delta":
                if text := text_of(delta.get("partial_json")):
                    self._arguments = True
                    return (ToolUseDelta(0, self._answer.num_calls - 1, text),)
            case _:
                self._answer.faithful = False
        return ()

    def _thinking(self, text: str, signature: str) -> Sequence[Said]:
        if signature:
            self._answer.signed()
        return (ThinkingDelta(0, text, signature),) if text or signature else ()

    def _block_stop(self) -> Iterator[Said]:
        if self._block == "tool_use" and not self._arguments:
            yield ToolUseDelta(0, self._answer.num_calls - 1, encode(self._input).decode())
        self._block = ""


def read_message(data: bytes) -> list[Delta]:
    message = json_object(data)
    if message.get("type") == "error":
        raise stream_failure(_error(500, message) or unreadable_error(500, data), _DIALECT, data)
    content = message.get("content")
    if not isinstance(content, list):
        raise malformed("a message without content")
    answer = _Answer()
    usage = read_usage(message.get("usage"))
    begin = Begin(text_of(message.get("model")), before_answer(usage), answer_id=text_of(message.get("id")))
    deltas: list[Delta] = [Raw(_DIALECT, data), begin]
    for block in objects_of(content):
        kind = answer.begins(block)
        if kind == "text":
            deltas.append(TextDelta(0, text_of(block.get("text"))))
        elif kind == "thinking":
            signature = text_of(block.get("signature"))
            if signature:
                answer.signed()
            deltas.append(ThinkingDelta(0, text_of(block.get("thinking")), signature))
        elif kind == "tool_use":
            call, name = answer.num_calls - 1, text_of(block.get("name"))
            if not name:
                raise malformed("a tool call without a name")
            deltas.append(ToolUseDelta(0, call, "", text_of(block.get("id")), name))
            deltas.append(ToolUseDelta(0, call, encode(object_of(block.get("input"))).decode()))
    if any(message.get(key) is not None for key in ("container", "stop_details")):
        answer.faithful = False
    deltas.append(answer.finish({key: message.get(key) for key in _DELTA_FIELDS}))
    deltas.append(End(usage, faithful=answer.faithful))
    return deltas


def read_usage(value: object) -> Usage:
    """Anthropic's words are ours. Writes are told apart by lifetime where the answer does so, and only if the sum is right."""
    usage = object_of(value)
    if not usage:
        return UNKNOWN_USAGE
    by_lifetime = object_of(usage.get("cache_creation"))
    counts = {ttl: count_of(by_lifetime.get(f"ephemeral_{ttl}_input_tokens")) for ttl in ("5m", "1h")}
    given = usage.get("cache_creation_input_tokens")
    created = sum(counts.values()) if given is None else count_of(given)
    thinking = count_of(object_of(usage.get("output_tokens_details")).get("thinking_tokens"))
    return Usage(
        input_tokens=count_of(usage.get("input_tokens")),
        output_tokens=count_of(usage.get("output_tokens")),
        cache_read_input_tokens=count_of(usage.get("cache_read_input_tokens")),
        cache_creation_input_tokens=created,
        written={ttl: count for ttl, count in counts.items() if count} if sum(counts.values()) == created else {},
        details={"reasoning": thinking} if thinking else {},
    )


# -- errors ------------------------------------------------------------------------------------------------------------------

_STATUSES: dict[str, int] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}


def read_error(status: int, data: bytes) -> UpstreamError:
    try:
        fields = json_object(data)
    except BackendFailed:
        return unreadable_error(status, data)
    return _error(status, fields) or unreadable_error(status, data)


def _error(status: int, fields: Json) -> UpstreamError | None:
    """Within a stream (`status` 500) the type of the error says which status it would have had."""
    error = object_of(fields.get("error"))
    message, kind = text_of(error.get("message")), text_of(error.get("type")) or None
    if not message and kind is None:
        return None
    if status == 500 and kind is not None:
        status = _STATUSES.get(kind, status)
    return UpstreamError(status, message or str(kind), code=kind, readable=fields.get("type") == "error")
