"""OpenAI's Responses: `POST /v1/responses`.

Answers are not stored: `previous_response_id`, `conversation`, `prompt` and `background` are refused. Tools are functions
only. `prompt_cache_options.prewarm` fills the cache without an answer, like `max_output_tokens: 0`. Reasoning is what
Anthropic calls thinking; its `encrypted_content` is the signature. Extensions: `top_k`, `min_p`, `stop`, `seed`,
penalties and `cache_salt`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import msgspec

from anaphora.errors import ServiceError
from anaphora.prompt import Diagnosis
from anaphora.types import (
    Begin,
    Completion,
    End,
    Finish,
    FinishReason,
    MediaPart,
    Part,
    Request,
    Role,
    Said,
    Tenant,
    TextDelta,
    TextPart,
    ThinkingDelta,
    ThinkingPart,
    TokenLogprob,
    Tool,
    ToolResultPart,
    ToolUseDelta,
    ToolUsePart,
    Usage,
)
from anaphora.wire import sse
from anaphora.wire.base import (
    NEUTRAL,
    SAMPLING_FIELDS,
    Ids,
    Parsed,
    Rendering,
    Turns,
    cache_salt,
    compact_arguments,
    encode,
    extra_fields,
    read_stop,
    text_parts,
)
from anaphora.wire.fields import (
    FieldError,
    Json,
    bad_value,
    each,
    named,
    only,
    opt_bool,
    opt_int,
    opt_list,
    opt_object,
    opt_string,
    string,
    strings,
    unsupported,
    wrong_type,
)
from anaphora.wire.openai_common import (
    MARKED_TEXT_FIELDS,
    TEXT_FIELDS,
    OpenAIDialect,
    audio_part,
    check_function_type,
    check_neutral,
    error_object,
    file_part,
    function_tool,
    image_from_url,
    openai_sampling,
    read_stream,
    read_tool_choice,
    token_logprob,
)
from anaphora.wire.openai_prompt import DEFAULT_TTL, MARK, check_breakpoint, check_caching, one_of, read_responses

_STATEFUL = ("previous_response_id", "conversation", "prompt")
_KNOWN = (
    NEUTRAL
    | SAMPLING_FIELDS
    | {"model", "input", "instructions", "max_output_tokens", "stop", "top_logprobs", "tools", "tool_choice"}
    | {"parallel_tool_calls", "text", "reasoning", "cache_salt", "background", *_STATEFUL}
    | {"include"}  # what else to show of an answer, not what it says; log-probabilities are read from it
)
_LOGPROBS = "message.output_text.logprobs"


class OpenAIResponses(OpenAIDialect):
    name = "openai_responses"
    answer_prefix = "resp_"

    def _read(self, body: Json, tenant: Tenant) -> Parsed:
        for key in _STATEFUL:
            if body.get(key) is not None:
                raise unsupported(f"'{key}' is not supported: answers are not stored. Send the conversation as 'input'.", key)
        if opt_bool(body, "background", False):
            raise unsupported("'background' is not supported: answers are not stored.", "background")
        model = named(body, "model")
        turns = Turns()
        if instructions := opt_string(body, "instructions"):
            turns.add("system", text_parts(instructions))
        _read_input(body, turns)
        tools = tuple(each(opt_list(body, "tools"), "tools", _tool))
        stream, _ = read_stream(body)
        check_neutral(body)
        check_caching(body, ttls=("30m", "12h"), responses=True)
        logprobs = _logprobs(body)
        request = Request(
            model=model,
            tenant=tenant,
            messages=turns.messages(),
            tools=tools,
            tool_choice=read_tool_choice(body, tools, lambda choice: named(choice, "name")),
            sampling=openai_sampling(body, stop=read_stop(body, "stop"), logprobs=logprobs),
            max_tokens=_max_tokens(body),
            stream=stream,
            cache_salt=cache_salt(body),
            extra={**extra_fields(body, _KNOWN), **_text_extra(body), **_reasoning_extra(body)},
        )
        rendering = Rendering(model, stream, logprobs=logprobs is not None, repeated=_repeated(body))
        return Parsed(request, rendering, partial(read_responses, body))

    def render(self, completion: Completion, rendering: Rendering, ids: Ids) -> bytes:
        choice = completion.choices[0]
        output: list[Json] = []
        num_calls = 0
        for part in choice.content:
            index = len(output)
            if isinstance(part, ToolUsePart):
                output.append(_call_item(ids, index, num_calls, part.name, part.arguments, "completed"))
                num_calls += 1
            elif isinstance(part, ThinkingPart):
                output.append(_reasoning_item(ids, index, part.text, part.signature, "completed"))
            elif part.text:
                entries = (choice.logprobs or ()) if rendering.logprobs else ()
                output.append(_message_item(ids, index, part.text, _entries(entries), "completed"))
        return encode(_finished(rendering, ids, output, choice.reason, completion.usage))

    def writer(self, rendering: Rendering, ids: Ids) -> _Writer:
        return _Writer(rendering, ids)


# -- body → Request ------------------------------------------------------------------------------------------------------


def _max_tokens(body: Json) -> int | None:
    options = opt_object(body, "prompt_cache_options")
    if options is not None and options.get("prewarm") is True:
        return 0
    return opt_int(body, "max_output_tokens", 0)


def _logprobs(body: Json) -> int | None:
    include = strings(opt_list(body, "include"), "include")
    top = opt_int(body, "top_logprobs", 0, 20)
    return top or 0 if top or _LOGPROBS in include else None


def _text_extra(body: Json) -> Json:
    """`text` in Chat's words: the same wish is the same question."""
    text = dict(opt_object(body, "text") or {})
    extra: Json = {}
    form, verbosity = text.pop("format", None), text.pop("verbosity", None)
    if isinstance(form, dict) and form.get("type") == "json_schema":
        inner = {key: value for key, value in form.items() if key != "type"}
        extra["response_format"] = {"type": "json_schema", "json_schema": inner}
    elif form is not None and form != {"type": "text"}:
        extra["response_format"] = form
    if verbosity is not None:
        extra["verbosity"] = verbosity
    if text:
        extra["text"] = text
    return extra


def _reasoning_extra(body: Json) -> Json:
    """`reasoning` in Chat's words as far as it has any."""
    reasoning = {key: value for key, value in (opt_object(body, "reasoning") or {}).items() if value is not None}
    extra: Json = {}
    if "effort" in reasoning:
        extra["reasoning_effort"] = reasoning.pop("effort")
    if reasoning:
        extra["reasoning"] = reasoning
    return extra


def _repeated(body: Json) -> Json:
    """What the response object repeats of the request."""
    caching = {key: body[key] for key in ("prompt_cache_key", "prompt_cache_retention") if body.get(key) is not None}
    options = opt_object(body, "prompt_cache_options")
    if options is not None:
        applied = {"mode": options.get("mode") or "implicit", "ttl": options.get("ttl") or DEFAULT_TTL}
        compared = options.get("comparison_response_id")
        caching["prompt_cache_options"] = applied if compared is None else {**applied, "comparison_response_id": compared}
    return {
        **caching,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": body.get("reasoning") or {"effort": None, "summary": None},
        "store": False,
        "temperature": body.get("temperature"),
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": body.get("top_p"),
        "truncation": body.get("truncation") or "disabled",
    }


def _tool(tool: Json) -> Tool:
    check_function_type(tool)
    return function_tool(tool)


def _read_input(body: Json, turns: Turns) -> None:
    value = body.get("input")
    if isinstance(value, str):
        turns.add("user", text_parts(value))
    elif isinstance(value, list):
        each(value, "input", lambda item: _item(item, turns))
    elif value is not None:
        raise wrong_type("string", value, "input")
    if not turns.messages() or value is None:
        raise FieldError("missing", "input")


def _item(item: Json, turns: Turns) -> None:
    kind = opt_string(item, "type") or "message"
    if kind == "message":
        _message(item, turns)
    elif kind == "function_call":
        only(item, _CALL_FIELDS)
        arguments = compact_arguments(string(item, "arguments"))
        turns.add("assistant", (ToolUsePart(named(item, "call_id"), named(item, "name"), arguments),))
    elif kind == "function_call_output":
        only(item, _OUTPUT_FIELDS)
        result = [part for part in _content(item, "output", "user") if isinstance(part, TextPart | MediaPart)]
        turns.add("user", (ToolResultPart(named(item, "call_id"), tuple(result)),))
    elif kind == "reasoning":
        turns.add("assistant", _reasoning(item))
    else:
        raise unsupported(f"Input items of type '{kind}' are not supported.", "type")


# `id` and `status` of items that come back from an answer say nothing that their content does not.
_ITEM_FIELDS = frozenset({"type", "id", "status", "cache_control"})
_MESSAGE_FIELDS = _ITEM_FIELDS | {"role", "content"}
_CALL_FIELDS = _ITEM_FIELDS | {"call_id", "name", "arguments"}
_OUTPUT_FIELDS = _ITEM_FIELDS | {"call_id", "output"}
_REASONING_FIELDS = _ITEM_FIELDS | {"summary", "content", "encrypted_content"}
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _message(item: Json, turns: Turns) -> None:
    role = string(item, "role")
    if role not in _ROLES:
        raise bad_value(one_of(role, "assistant", "system", "developer", "user"), "role")
    only(item, _MESSAGE_FIELDS)
    turns.add(_ROLES[role], _content(item, "content", _ROLES[role]))


def _reasoning(item: Json) -> tuple[Part, ...]:
    only(item, _REASONING_FIELDS)
    pieces = opt_list(item, "content")
    key = "content" if pieces else "summary"
    text = "".join(each(pieces or opt_list(item, "summary"), key, lambda piece: string(piece, "text")))
    signature = opt_string(item, "encrypted_content") or ""
    return (ThinkingPart(text, signature),) if text or signature else ()


def _content(item: Json, key: str, role: Role) -> tuple[Part, ...]:
    value = item.get(key)
    if isinstance(value, str):
        return text_parts(value)
    if value is None:
        raise FieldError("missing", key)
    if not isinstance(value, list):
        raise wrong_type("string", value, key)

    def read(part: Json) -> tuple[Part, ...]:
        kind = string(part, "type")
        if kind == "input_text" or (kind == "output_text" and role == "assistant"):
            if role == "assistant":
                only(part, _ANSWER_FIELDS)
            else:
                only(part, MARKED_TEXT_FIELDS)
                check_breakpoint(part)
            return text_parts(string(part, "text"))
        if kind == "refusal" and role == "assistant":
            return text_parts(string(part, "refusal"))
        if kind in _MEDIA and role == "user":
            return (_media(kind, part),)
        words = {"assistant": ("output_text", "refusal"), "user": ("input_text", *_MEDIA)}.get(role)
        raise bad_value(one_of(kind, *words) if words else f"Invalid value: '{kind}'. Only 'input_text' fits here.", "type")

    return tuple(part for parts in each(value, key, read) for part in parts)


_ANSWER_FIELDS = TEXT_FIELDS | {"logprobs"}  # of an answer that comes back: what else it might have said
_MEDIA = ("input_image", "input_file", "input_audio")


def _media(kind: str, part: Json) -> MediaPart:
    if kind == "input_audio" and part.get(MARK) is not None:
        raise FieldError("unknown", MARK)
    check_breakpoint(part)
    if kind == "input_file":
        return file_part(part)
    if kind == "input_audio":
        return audio_part(part)
    only(part, frozenset({"type", "image_url", "file_id", "detail", "prompt_cache_breakpoint", "cache_control"}))
    detail = opt_string(part, "detail")
    if (file_id := opt_string(part, "file_id")) is not None:
        options: Json = {} if detail in (None, "auto") else {"detail": detail}
        return MediaPart("image", "", {"file_id": file_id}, options)
    return image_from_url(named(part, "image_url"), detail)


# -- answer → body ---------------------------------------------------------------------------------------------------------


def _entries(logprobs: tuple[TokenLogprob, ...]) -> list[Json]:
    return [token_logprob(entry) for entry in logprobs]


def _message_item(ids: Ids, index: int, text: str, logprobs: list[Json], status: str) -> Json:
    content = [] if status == "in_progress" else [_text_part(text, logprobs)]
    return {"id": f"msg_{ids.id}_{index}", "type": "message", "status": status, "role": "assistant", "content": content}


def _text_part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _reasoning_item(ids: Ids, index: int, text: str, signature: str, status: str) -> Json:
    content = [] if status == "in_progress" else [{"type": "reasoning_text", "text": text}]
    item: Json = {"id": f"rs_{ids.id}_{index}", "type": "reasoning", "summary": [], "content": content, "status": status}
    return {**item, "encrypted_content": signature} if signature else item


def _call_item(ids: Ids, index: int, call: int, name: str, arguments: str, status: str) -> Json:
    return {
        "id": f"fc_{ids.id}_{index}",
        "type": "function_call",
        "status": status,
        "call_id": ids.call("call_", 0, call),
        "name": name,
        "arguments": arguments,
    }


def _usage(usage: Usage, rendering: Rendering) -> Json:
    details: Json = {
        "cached_tokens": usage.cache_read_input_tokens,
        "cache_write_tokens": usage.cache_creation_input_tokens,
    }
    if rendering.writes_billed or usage.written:
        written = usage.written
        details["cache_write_tokens_details"] = {
            "ttl_30m_tokens": written.get("30m", 0),
            "ttl_12h_tokens": written.get("12h", 0),
        }
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": details,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }


def _response(rendering: Rendering, ids: Ids, status: str, output: list[Json], **fields: object) -> Json:
    return {
        "id": f"resp_{ids.id}",
        "object": "response",
        "created_at": ids.created_s,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": rendering.model,
        "output": output,
        "usage": None,
        **rendering.repeated,
        **({"prompt_cache_diagnostics": _diagnostics(rendering.diagnosis)} if rendering.diagnosed else {}),
        **fields,
    }


def _diagnostics(diagnosis: Diagnosis | None) -> Json:
    """Nothing to complain about is a hit."""
    if diagnosis is None:
        return {"type": "cache_hit"}
    if diagnosis.reason in ("comparison_response_not_found", "unavailable"):
        return {"type": diagnosis.reason}
    miss: Json = {"type": "cache_miss", "reason": diagnosis.reason, "cache_missed_tokens": diagnosis.missed_tokens}
    if diagnosis.reusable_tokens is not None:
        miss["comparison_reusable_tokens"] = diagnosis.reusable_tokens
    return miss


_INCOMPLETE: dict[FinishReason, str] = {"max_tokens": "max_output_tokens", "refusal": "content_filter"}


def _finished(rendering: Rendering, ids: Ids, output: list[Json], reason: FinishReason, usage: Usage) -> Json:
    """The response object of a whole answer. The item that was being written when the tokens ran out is incomplete too."""
    if reason not in _INCOMPLETE:
        return _response(rendering, ids, "completed", output, usage=_usage(usage, rendering))
    if output:
        output[-1] = {**output[-1], "status": "incomplete"}
    details = {"reason": _INCOMPLETE[reason]}
    return _response(rendering, ids, "incomplete", output, usage=_usage(usage, rendering), incomplete_details=details)


class _Open:
    """The output item that is being written."""

    def __init__(self, kind: str, call: int = -1, call_number: int = 0, name: str = "") -> None:
        self.kind = kind
        self.call = call  # index of the delta
        self.call_number = call_number
        self.name = name
        self.text: list[str] = []
        self.signature = ""
        self.logprobs: list[Json] = []


class _Writer:
    """Output items open and close one after the other; every event carries the next sequence number."""

    def __init__(self, rendering: Rendering, ids: Ids) -> None:
        self._rendering = rendering
        self._ids = ids
        self._sequence = 0
        self._output: list[Json] = []  # items that are done
        self._open: _Open | None = None
        self._calls = 0
        self._reason: FinishReason = "end_turn"

    def feed(self, delta: Said) -> bytes:
        if isinstance(delta, TextDelta):
            return self._text(delta) if delta.text or delta.logprobs else b""
        if isinstance(delta, ToolUseDelta):
            return self._call(delta)
        if isinstance(delta, ThinkingDelta):
            return self._thinking(delta)
        if isinstance(delta, Begin):
            response = _response(self._rendering, self._ids, "in_progress", [])
            created = self._event("response.created", response=response)
            return created + self._event("response.in_progress", response=response)
        if isinstance(delta, Finish):
            self._reason = delta.reason
            return self._close("incomplete" if delta.reason in _INCOMPLETE else "completed")
        return self._end(delta)

    def fail(self, error: ServiceError, passed: bytes = b"") -> bytes:
        self._sequence = max([self._sequence, *(number + 1 for number in _numbers(passed))])
        fields = error_object(error)
        event = self._event("error", code=fields["code"] or fields["type"], message=error.message, param=error.param)
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failure = {"code": code, "message": error.message}
        response = _response(self._rendering, self._ids, "failed", self._output, error=failure)
        return event + self._event("response.failed", response=response)

    def _event(self, kind: str, **fields: object) -> bytes:
        payload = encode({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return sse.event(kind.encode(), payload)

    def _text(self, delta: TextDelta) -> bytes:
        events = b""
        item = self._open
        if item is None or item.kind != "message":
            item, events = self._start(_Open("message"))
        item.text.append(delta.text)
        logprobs = _entries(delta.logprobs) if self._rendering.logprobs else []
        item.logprobs.extend(logprobs)
        return events + self._part_event("response.output_text.delta", delta=delta.text, logprobs=logprobs)

    def _thinking(self, delta: ThinkingDelta) -> bytes:
        events = b""
        item = self._open
        if item is None or item.kind != "reasoning":
            item, events = self._start(_Open("reasoning"))
        item.signature += delta.signature
        if not delta.text:
            return events
        item.text.append(delta.text)
        return events + self._part_event("response.reasoning_text.delta", delta=delta.text)

    def _call(self, delta: ToolUseDelta) -> bytes:
        events = b""
        item = self._open
        if item is None or item.call != delta.index:
            item, events = self._start(_Open("function_call", delta.index, self._calls, delta.name))
            self._calls += 1
        if not delta.arguments:
            return events
        item.text.append(delta.arguments)
        return events + self._item_event("response.function_call_arguments.delta", delta=delta.arguments)

    def _start(self, item: _Open) -> tuple[_Open, bytes]:
        events = self._close("completed")
        self._open = item
        added = self._item(item, "in_progress")
        events += self._event("response.output_item.added", output_index=len(self._output), item=added)
        if item.kind != "function_call":
            events += self._part_event("response.content_part.added", part=self._part(item))
        return item, events

    def _close(self, status: str) -> bytes:
        item = self._open
        if item is None:
            return b""
        text = "".join(item.text)
        if item.kind == "function_call":
            events = self._item_event("response.function_call_arguments.done", name=item.name, arguments=text)
        else:
            if item.kind == "message":
                events = self._part_event("response.output_text.done", text=text, logprobs=item.logprobs)
            else:
                events = self._part_event("response.reasoning_text.done", text=text)
            events += self._part_event("response.content_part.done", part=self._part(item))
        done = self._item(item, status)
        events += self._event("response.output_item.done", output_index=len(self._output), item=done)
        self._output.append(done)
        self._open = None
        return events

    def _item(self, item: _Open, status: str) -> Json:
        index, text = len(self._output), "".join(item.text)
        if item.kind == "function_call":
            return _call_item(self._ids, index, item.call_number, item.name, text, status)
        if item.kind == "reasoning":
            return _reasoning_item(self._ids, index, text, item.signature, status)
        return _message_item(self._ids, index, text, item.logprobs, status)

    def _part(self, item: _Open) -> Json:
        text = "".join(item.text)
        return _text_part(text, item.logprobs) if item.kind == "message" else {"type": "reasoning_text", "text": text}

    def _item_event(self, kind: str, **fields: object) -> bytes:
        """An event about the open item."""
        index = len(self._output)
        prefix = {"message": "msg_", "reasoning": "rs_"}.get(self._open.kind if self._open else "", "fc_")
        return self._event(kind, item_id=f"{prefix}{self._ids.id}_{index}", output_index=index, **fields)

    def _part_event(self, kind: str, **fields: object) -> bytes:
        return self._item_event(kind, content_index=0, **fields)

    def _end(self, delta: End) -> bytes:
        response = _finished(self._rendering, self._ids, self._output, self._reason, delta.usage)
        return self._event(f"response.{response['status']}", response=response)


class _Numbered(msgspec.Struct, frozen=True):
    sequence_number: int


_decode_numbered = msgspec.json.Decoder(_Numbered).decode


def _numbers(stream: bytes) -> Iterator[int]:
    """Of those of its events that have one."""
    for event in sse.Splitter().feed(stream):
        try:
            yield _decode_numbered(event.data or b"").sequence_number
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            continue
