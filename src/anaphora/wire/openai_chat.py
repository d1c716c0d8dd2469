"""OpenAI's Chat Completions: `POST /v1/chat/completions`.

Extensions: `top_k`, `min_p`, `cache_salt`; `max_tokens: 0` pre-warms; `reasoning_content` on an assistant message and in
answers is what Anthropic calls thinking.
"""

from __future__ import annotations

from functools import partial

from anaphora.errors import ServiceError
from anaphora.types import (
    Begin,
    Choice,
    Completion,
    Finish,
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
    list_,
    named,
    object_,
    only,
    opt_bool,
    opt_int,
    opt_list,
    opt_string,
    string,
    unsupported,
    wrong_type,
)
from anaphora.wire.openai_common import (
    FINISH_REASONS,
    MARKED_TEXT_FIELDS,
    OpenAIDialect,
    audio_part,
    chat_usage,
    check_function_type,
    check_neutral,
    error_object,
    file_part,
    function_tool,
    image_from_url,
    openai_sampling,
    read_n,
    read_stream,
    read_tool_choice,
    token_logprob,
)
from anaphora.wire.openai_prompt import MARK, check_breakpoint, check_caching, one_of, read_chat

_KNOWN = (
    NEUTRAL
    | SAMPLING_FIELDS
    | {"model", "messages", "max_tokens", "max_completion_tokens", "n", "stop", "logprobs", "top_logprobs"}
    | {"tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "cache_salt"}
)


class OpenAIChat(OpenAIDialect):
    name = "openai_chat"
    answer_prefix = "chatcmpl-"

    def _read(self, body: Json, tenant: Tenant) -> Parsed:
        for key in ("functions", "function_call"):
            if body.get(key) is not None:
                raise unsupported(f"'{key}' is no longer supported: use 'tools' and 'tool_choice'.", key)
        model = named(body, "model")
        turns = Turns()
        items = list_(body, "messages")
        if not items:
            raise bad_value("Invalid 'messages': empty array. Expected an array with minimum length 1.", "messages")
        each(items, "messages", lambda message: _message(message, turns))
        tools = tuple(each(opt_list(body, "tools"), "tools", _tool))
        stream, include_usage = read_stream(body)
        check_neutral(body)
        check_caching(body, ttls=("30m",), responses=False)
        n, logprobs = read_n(body), _logprobs(body)
        request = Request(
            model=model,
            tenant=tenant,
            messages=turns.messages(),
            tools=tools,
            tool_choice=read_tool_choice(body, tools, _chosen_function),
            sampling=openai_sampling(body, stop=read_stop(body, "stop"), n=n, logprobs=logprobs),
            max_tokens=_max_tokens(body),
            stream=stream,
            cache_salt=cache_salt(body),
            extra=extra_fields(body, _KNOWN),
        )
        rendering = Rendering(model, stream, include_usage, num_choices=n, logprobs=logprobs is not None)
        return Parsed(request, rendering, partial(read_chat, body))

    def render(self, completion: Completion, rendering: Rendering, ids: Ids) -> bytes:
        return encode(
            {
                "id": f"chatcmpl-{ids.id}",
                "object": "chat.completion",
                "created": ids.created_s,
                "model": rendering.model,
                "choices": [_choice(i, choice, rendering, ids) for i, choice in enumerate(completion.choices)],
                "usage": chat_usage(completion.usage, rendering),
            }
        )

    def writer(self, rendering: Rendering, ids: Ids) -> _Writer:
        return _Writer(rendering, ids)


# -- body → Request ------------------------------------------------------------------------------------------------------


def _max_tokens(body: Json) -> int | None:
    old, new = opt_int(body, "max_tokens", 0), opt_int(body, "max_completion_tokens", 0)
    if old is not None and new is not None and old != new:
        raise bad_value("Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.", "max_tokens")
    return old if new is None else new


def _logprobs(body: Json) -> int | None:
    wanted, top = opt_bool(body, "logprobs", False), opt_int(body, "top_logprobs", 0, 20)
    if wanted:
        return top or 0
    if top:
        raise bad_value("The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.", "top_logprobs")
    return None


def _tool(tool: Json) -> Tool:
    check_function_type(tool)
    only(tool, frozenset({"type", "function", "cache_control"}))
    try:
        return function_tool(object_(tool, "function"))
    except FieldError as error:
        if error.path[0] != "function":
            error.under("function")
        raise


def _chosen_function(choice: Json) -> str:
    function = object_(choice, "function")
    try:
        return named(function, "name")
    except FieldError as error:
        error.under("function")
        raise


_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user"}
_MESSAGE_FIELDS = frozenset({"role", "content", "name", "cache_control"})
_TOOL_MESSAGE_FIELDS = frozenset({"role", "content", "tool_call_id", "cache_control"})
_ASSISTANT_FIELDS = _MESSAGE_FIELDS | {"tool_calls", "refusal", "reasoning_content"}


def _message(message: Json, turns: Turns) -> None:
    role = string(message, "role")
    if role in _ROLES:
        only(message, _MESSAGE_FIELDS)
        turns.add(_ROLES[role], _content(message, role), opt_string(message, "name"))
    elif role == "assistant":
        only(message, _ASSISTANT_FIELDS)
        turns.add("assistant", _answer_parts(message), opt_string(message, "name"))
    elif role == "tool":
        only(message, _TOOL_MESSAGE_FIELDS)
        result = [part for part in _content(message, role) if isinstance(part, TextPart | MediaPart)]
        turns.add("user", (ToolResultPart(named(message, "tool_call_id"), tuple(result)),))
    else:
        raise bad_value(one_of(role, "system", "developer", "user", "assistant", "tool"), "role")


def _answer_parts(message: Json) -> list[Part]:
    parts: list[Part] = []
    if thinking := opt_string(message, "reasoning_content"):
        parts.append(ThinkingPart(thinking))
    if message.get("content") is not None:
        parts.extend(_content(message, "assistant"))
    # What the model refused with is what it said.
    parts.extend(text_parts(opt_string(message, "refusal") or ""))
    parts.extend(each(opt_list(message, "tool_calls"), "tool_calls", _tool_call))
    return parts


def _tool_call(call: Json) -> ToolUsePart:
    check_function_type(call)
    # Clients that glue a stream together keep the chunk's `index`.
    only(call, frozenset({"type", "id", "function", "index"}))
    function = object_(call, "function")
    try:
        only(function, frozenset({"name", "arguments"}))
        name, arguments = named(function, "name"), string(function, "arguments")
    except FieldError as error:
        error.under("function")
        raise
    return ToolUsePart(named(call, "id"), name, compact_arguments(arguments))


def _content(message: Json, role: str) -> tuple[Part, ...]:
    value = message.get("content")
    if isinstance(value, str):
        return text_parts(value)
    if value is None:
        raise FieldError("missing", "content")
    if not isinstance(value, list):
        raise wrong_type("string", value, "content")

    def read(part: Json) -> tuple[Part, ...]:
        kind = string(part, "type")
        if kind == "text":
            only(part, MARKED_TEXT_FIELDS)
            if MARK in part:
                check_breakpoint(part)
            return text_parts(string(part, "text"))
        if kind == "refusal" and role == "assistant":
            return text_parts(string(part, "refusal"))
        if role == "user" and kind in ("image_url", "input_audio", "file"):
            return (_media(kind, part),)
        allowed = {"user": ("text", "image_url", "input_audio", "file"), "assistant": ("text", "refusal")}
        words = allowed.get(role, ("text",))
        raise bad_value(one_of(kind, *words) if len(words) > 1 else f"Invalid value: '{kind}'. Only 'text' fits here.", "type")

    return tuple(part for parts in each(value, "content", read) for part in parts)


_FILE_FIELDS = frozenset({"file_id", "file_url", "file_data", "filename"})


def _media(kind: str, part: Json) -> MediaPart:
    check_breakpoint(part)
    if kind == "input_audio":
        return audio_part(part)
    if kind == "image_url":
        only(part, frozenset({"type", "image_url", "prompt_cache_breakpoint", "cache_control"}))
    else:
        only(part, frozenset({"type", "file", "prompt_cache_breakpoint", "cache_control"}))
    inner = object_(part, kind)
    try:
        if kind == "file":
            only(inner, _FILE_FIELDS)
            return file_part(inner)
        only(inner, frozenset({"url", "detail"}))
        return image_from_url(named(inner, "url"), opt_string(inner, "detail"))
    except FieldError as error:
        error.under(kind)
        raise


# -- answer → body, SSE ----------------------------------------------------------------------------------------------------


def _choice(index: int, choice: Choice, rendering: Rendering, ids: Ids) -> Json:
    text = "".join(part.text for part in choice.content if isinstance(part, TextPart))
    thinking = "".join(part.text for part in choice.content if isinstance(part, ThinkingPart))
    calls = [part for part in choice.content if isinstance(part, ToolUsePart)]
    message: Json = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = [
            {
                "id": ids.call("call_", index, i),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(calls)
        ]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs_object(choice.logprobs or ()) if rendering.logprobs else None,
        "finish_reason": FINISH_REASONS[choice.reason],
    }


def _logprobs_object(entries: tuple[TokenLogprob, ...]) -> Json:
    return {"content": [token_logprob(entry) for entry in entries], "refusal": None}


class _Writer:
    """Chunks differ only in the choice they carry: everything around it is encoded once."""

    def __init__(self, rendering: Rendering, ids: Ids) -> None:
        self._rendering = rendering
        self._ids = ids
        self._head = b'data: {"id":"chatcmpl-%b","object":"chat.completion.chunk","created":%d,"model":%b,"choices":[' % (
            ids.id.encode(),
            ids.created_s,
            sse.line(encode(rendering.model)),
        )
        self._tail = b'],"usage":null}\n\n' if rendering.include_usage else b"]}\n\n"

    def feed(self, delta: Said) -> bytes:
        if isinstance(delta, TextDelta):
            if not delta.text and not delta.logprobs:
                return b""
            logprobs = encode(_logprobs_object(delta.logprobs)) if self._rendering.logprobs else b"null"
            return self._chunk(delta.choice, b'{"content":%b}' % encode(delta.text), logprobs)
        if isinstance(delta, ToolUseDelta):
            return self._chunk(delta.choice, encode({"tool_calls": [self._call(delta)]}))
        if isinstance(delta, ThinkingDelta):
            # A signature alone has no place in this dialect.
            return self._chunk(delta.choice, encode({"reasoning_content": delta.text})) if delta.text else b""
        if isinstance(delta, Begin):
            role = b'{"role":"assistant","content":"","refusal":null}'
            return b"".join(self._chunk(choice, role) for choice in range(self._rendering.num_choices))
        if isinstance(delta, Finish):
            return self._chunk(delta.choice, b"{}", finish=b'"%b"' % FINISH_REASONS[delta.reason].encode())
        if not self._rendering.include_usage:
            return sse.DONE
        return self._head + b'],"usage":%b}\n\n' % encode(chat_usage(delta.usage, self._rendering)) + sse.DONE

    def fail(self, error: ServiceError, passed: bytes = b"") -> bytes:
        return sse.data(encode({"error": error_object(error)}))

    def _call(self, delta: ToolUseDelta) -> Json:
        if not delta.name:
            return {"index": delta.index, "function": {"arguments": delta.arguments}}
        call_id = self._ids.call("call_", delta.choice, delta.index)
        function = {"name": delta.name, "arguments": delta.arguments}
        return {"index": delta.index, "id": call_id, "type": "function", "function": function}

    def _chunk(self, choice: int, delta: bytes, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
        body = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (choice, delta, logprobs, finish)
        return self._head + sse.line(body) + self._tail
