"""Anthropic's Messages API: `POST /v1/messages`, `/v1/messages/count_tokens`, `GET /v1/models` (API versions below).

Supported: text, thinking, images, documents, custom tools. Server tools, search results, citations and redacted thinking
(`anthropic_provider`) are refused with a clear 400 unless the server stands for Anthropic's own models. A document may have the
source `text`, which is {"text": ...} in `MediaPart.source`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from anaphora.errors import InvalidRequest, LimitReached, NotCached, ServiceError
from anaphora.types import (
    Completion,
    MediaPart,
    ModelInfo,
    Part,
    ProviderPart,
    Request,
    Role,
    Tenant,
    TextPart,
    ThinkingPart,
    Tool,
    ToolChoice,
    ToolResultPart,
    ToolUsePart,
)
from anaphora.wire.anthropic_answer import MessageWriter, error_body, model_object, whole_message, wire_status
from anaphora.wire.anthropic_prompt import check_diagnostics, check_mark, check_marks, read_prompt
from anaphora.wire.anthropic_provider import (
    RESULT_PARTS,
    check_citations,
    cited_text,
    is_provider_block,
    is_server_result,
    opaque,
    provider_block,
    provider_tool,
)
from anaphora.wire.base import (
    NEUTRAL,
    SAMPLING_FIELDS,
    Dialect,
    Ids,
    Parsed,
    Rendering,
    Turns,
    cache_salt,
    encode,
    extra_fields,
    read_sampling,
    settled_choice,
    text_parts,
    tool_extra,
)
from anaphora.wire.fields import (
    FieldError,
    Json,
    bad_value,
    decode_object,
    each,
    list_,
    named,
    object_,
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

VERSIONS = ("2023-06-01", "2026-10-21")
"""API versions understood. A request without one is read as the first."""

# Removed by version 2026-10-21: any value is refused, the default included (spec §1.1).
_REMOVED_2026 = ("temperature", "top_p", "top_k")

_KNOWN = (
    NEUTRAL
    | SAMPLING_FIELDS
    | {"model", "messages", "system", "max_tokens", "stop_sequences", "tools", "tool_choice", "cache_salt"}
)


class _Rules(NamedTuple):
    """How a body is to be read."""

    strict: bool
    """By the latest API version."""
    provider: bool
    """What only the provider's own models can take is accepted."""


class Anthropic(Dialect):
    """`provider_blocks`: the server stands for Anthropic's own models, and takes what only those can."""

    name = "anthropic"
    answer_prefix = "msg_"

    def __init__(self, *, provider_blocks: bool = False) -> None:
        self._provider_blocks = provider_blocks

    def parse(self, body: bytes, *, tenant: Tenant, version: str | None = None) -> Parsed:
        return self._parse(body, tenant, version, answers=True)

    def parse_count_tokens(self, body: bytes, *, tenant: Tenant, version: str | None = None) -> Request:
        """The request alone of `parse_count`."""
        return self.parse_count(body, tenant=tenant, version=version).request

    def parse_count(self, body: bytes, *, tenant: Tenant, version: str | None = None) -> Parsed:
        """The body of `/v1/messages/count_tokens`: `max_tokens` may be missing."""
        return self._parse(body, tenant, version, answers=False)

    def _parse(self, body: bytes, tenant: Tenant, version: str | None, *, answers: bool) -> Parsed:
        version = version or VERSIONS[0]
        if version not in VERSIONS:
            raise InvalidRequest(
                f"anthropic-version: '{version}' is not one of {', '.join(VERSIONS)}", param="anthropic-version"
            )
        fields = decode_object(body)
        try:
            return _read(fields, tenant, version, _Rules(version != VERSIONS[0], self._provider_blocks), answers)
        except FieldError as error:
            raise _refusal(error) from error

    def render(self, completion: Completion, rendering: Rendering, ids: Ids) -> bytes:
        return encode(whole_message(completion, rendering, ids))

    def writer(self, rendering: Rendering, ids: Ids) -> MessageWriter:
        return MessageWriter(rendering, ids)

    def render_error(self, error: ServiceError, request_id: str) -> tuple[int, bytes, dict[str, str]]:
        status = wire_status(error)
        headers = {"content-type": "application/json", "request-id": request_id}
        if error.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        if isinstance(error, NotCached) or (isinstance(error, LimitReached) and not error.soon):
            headers["x-should-retry"] = "false"  # SDKs would by themselves; nothing will be otherwise a second later
        elif status in (429, 529):
            headers["x-should-retry"] = "true"
        return status, encode({**error_body(error), "request_id": request_id}), headers

    def render_count(self, num_tokens: int) -> bytes:
        return encode({"input_tokens": num_tokens})

    def render_models(
        self, models: Sequence[ModelInfo], *, limit: int = 20, after_id: str | None = None, before_id: str | None = None
    ) -> bytes:
        """One page of `models`: those behind `after_id`, or the last ones before `before_id`."""
        ids = [model.id for model in models]
        start = ids.index(after_id) + 1 if after_id in ids else 0
        stop = ids.index(before_id) if before_id in ids else len(ids)
        if before_id in ids and after_id not in ids:
            page, has_more = models[max(start, stop - limit) : stop], stop - limit > start
        else:
            page, has_more = models[start : min(stop, start + limit)], start + limit < stop
        return encode(
            {
                "data": [model_object(model) for model in page],
                "has_more": has_more,
                "first_id": page[0].id if page else None,
                "last_id": page[-1].id if page else None,
            }
        )

    def render_model(self, model: ModelInfo) -> bytes:
        return encode(model_object(model))


# -- body → Request ------------------------------------------------------------------------------------------------------


def _read(body: Json, tenant: Tenant, version: str, rules: _Rules, answers: bool) -> Parsed:
    if rules.strict:
        for key in _REMOVED_2026:
            if key in body:
                raise FieldError("unknown", key)
    model = named(body, "model")
    turns = Turns()
    if system := _text_content(body, "system") if body.get("system") is not None else ():
        turns.add("system", system)
    _read_messages(body, turns, rules)
    max_tokens = opt_int(body, "max_tokens", 0)
    if max_tokens is None and answers:
        raise FieldError("missing", "max_tokens")
    tools = tuple(each(opt_list(body, "tools"), "tools", partial(_tool, rules)))
    stream = opt_bool(body, "stream", False)
    opt_object(body, "metadata")
    check_mark(body)
    check_marks(body)
    check_diagnostics(body)
    _check_thinking(body, rules)
    stop = strings(opt_list(body, "stop_sequences"), "stop_sequences")
    for index, text in enumerate(stop):
        if text.isspace():
            raise bad_value("each stop sequence must contain non-whitespace", "stop_sequences", index)
    request = Request(
        model=model,
        tenant=tenant,
        messages=turns.messages(),
        tools=tools,
        tool_choice=settled_choice(_tool_choice(body), tools, "tool_choice"),
        sampling=read_sampling(body, max_temperature=1, stop=stop),
        max_tokens=max_tokens,
        stream=stream,
        cache_salt=cache_salt(body),
        extra=extra_fields(body, _KNOWN),
    )
    if max_tokens == 0:
        _check_prewarm(request)
    return Parsed(request, Rendering(model=model, stream=stream, version=version), partial(read_prompt, body))


def _check_prewarm(request: Request) -> None:
    """`max_tokens` 0 only fills the cache; what can only matter for an answer is refused (spec §1.8)."""
    sentence = "max_tokens: 0 (pre-warm) cannot be combined with {}"
    thinking, output = request.extra.get("thinking"), request.extra.get("output_config")
    if request.stream:
        raise unsupported(sentence.format("stream"), "stream")
    if isinstance(thinking, dict) and thinking.get("type") == "enabled":
        raise unsupported(sentence.format("thinking"), "thinking")
    if isinstance(output, dict) and output.get("format") is not None:
        raise unsupported(sentence.format("an output format"), "output_config", "format")
    if request.tool_choice.mode in ("any", "tool"):
        raise unsupported(sentence.format("a tool choice that demands a tool"), "tool_choice")


def _check_thinking(body: Json, rules: _Rules) -> None:
    config = opt_object(body, "thinking")
    if config is None or (rules.provider and config.get("type") == "between_tools"):
        return
    if config.get("type") not in ("enabled", "disabled", "adaptive"):
        raise bad_value("Input should be 'enabled', 'disabled' or 'adaptive'", "thinking", "type")
    if config["type"] == "enabled":
        try:
            if opt_int(config, "budget_tokens", 1024) is None:
                raise FieldError("missing", "budget_tokens")
        except FieldError as error:
            error.under("thinking", "enabled")
            raise


def _read_messages(body: Json, turns: Turns, rules: _Rules) -> None:
    items = list_(body, "messages")
    if not items:
        raise bad_value("at least one message is required", "messages")
    roles: list[Role] = []

    def read(message: Json) -> None:
        role = _role(message)
        only(message, _MESSAGE_FIELDS)
        if role == "system":
            turns.add(role, _text_content(message, "content"))
        elif isinstance(content := message.get("content"), str):
            turns.add(role, text_parts(content))
        elif isinstance(content, list):
            turns.add(role, _blocks(content, role, rules))
        elif content is None:
            raise FieldError("missing", "content")
        else:
            raise wrong_type("string", content, "content")
        roles.append(role)

    each(items, "messages", read)
    for index, role in enumerate(roles):
        if role == "system":
            _check_system_place(roles, index, after_server_tool=index > 0 and _ends_in_server_tool(items[index - 1]))


_MESSAGE_FIELDS = frozenset({"role", "content"})


def _role(message: Json) -> Role:
    match message.get("role"):
        case "user":
            return "user"
        case "assistant":
            return "assistant"
        case "system":
            return "system"
        case _:
            string(message, "role")
            raise bad_value("Input should be 'user', 'assistant' or 'system'", "role")


def _ends_in_server_tool(message: object) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    last = content[-1] if isinstance(content, list) and content else None
    kind = str(last.get("type")) if isinstance(last, dict) else ""
    return kind == "server_tool_use" or is_server_result(kind)


def _check_system_place(roles: Sequence[Role], index: int, *, after_server_tool: bool) -> None:
    """Spec §1.7. Instructions that hold from the start go into the top-level `system` field."""
    if index == 0 or (roles[index - 1] != "user" and not after_server_tool):
        sentence = "a message with role 'system' must follow a user message; use the top-level `system` parameter otherwise"
        raise bad_value(sentence, "messages", index)
    if index + 1 < len(roles) and roles[index + 1] != "assistant":
        raise bad_value("a message with role 'system' must be last or be followed by an assistant message", "messages", index)


def _text_content(owner: Json, key: str) -> tuple[TextPart, ...]:
    """A string or text blocks."""
    value = owner.get(key)
    if isinstance(value, str):
        return text_parts(value)
    if value is None:
        raise FieldError("missing", key)
    if not isinstance(value, list):
        raise wrong_type("string", value, key)

    def read(block: Json) -> tuple[TextPart, ...]:
        if block.get("type") != "text":
            string(block, "type")
            raise bad_value("Input should be 'text'", "type")
        return _text(block)

    return tuple(part for parts in each(value, key, read) for part in parts)


def _blocks(items: list[object], role: Role, rules: _Rules) -> list[Part]:
    parts: list[Part] = []

    def read(block: Json) -> None:
        kind = string(block, "type")
        if kind == "text":
            cited = cited_text(block, role, strict=rules.strict) if rules.provider else None
            parts.extend(_text(block) if cited is None else (cited,))
        elif kind in _PLACES and role not in _PLACES[kind]:
            raise bad_value(f"`{kind}` blocks cannot be in messages of role '{role}'", "type")
        elif kind == "document" and role == "assistant" and rules.strict:
            raise bad_value("`document` blocks cannot be in messages of role 'assistant'", "type")
        elif kind in _BLOCKS:
            parts.append(_BLOCKS[kind](block, rules))
        elif rules.provider and is_provider_block(kind):
            parts.append(provider_block(block, kind, role))
        else:
            raise unsupported(f"Input tag '{kind}' is not supported here", "type")

    each(items, "content", read)
    return parts


def _text(block: Json) -> tuple[TextPart, ...]:
    only(block, _TEXT_FIELDS)
    text = string(block, "text")
    if "cache_control" in block:
        check_mark(block)
        if not text and block["cache_control"] is not None:
            raise bad_value("cache_control cannot be set for empty text blocks", "text")
    return text_parts(text)


_TEXT_FIELDS = frozenset({"type", "text", "cache_control"})


def _thinking(block: Json, rules: _Rules) -> ThinkingPart:
    if block.get("cache_control") is not None:
        raise FieldError("unknown", "thinking", "cache_control")
    only(block, frozenset({"type", "thinking", "signature"}))
    return ThinkingPart(string(block, "thinking"), opt_string(block, "signature") or "")


def _tool_use(block: Json, rules: _Rules) -> ToolUsePart:
    # `caller` says who called it; with custom tools only, that is always the model.
    only(block, _TOOL_USE_FIELDS | _TOOLSET_FIELDS if rules.provider else _TOOL_USE_FIELDS)
    check_mark(block)
    return ToolUsePart(named(block, "id"), named(block, "name"), encode(object_(block, "input")).decode())


_TOOL_USE_FIELDS = frozenset({"type", "id", "name", "input", "cache_control", "caller"})
_TOOL_RESULT_FIELDS = frozenset({"type", "tool_use_id", "content", "is_error", "cache_control"})
_TOOLSET_FIELDS = frozenset({"toolset_name"})


def _tool_result(block: Json, rules: _Rules) -> ToolResultPart:
    only(block, _TOOL_RESULT_FIELDS | _TOOLSET_FIELDS if rules.provider else _TOOL_RESULT_FIELDS)
    check_mark(block)
    content: list[TextPart | MediaPart | ProviderPart] = []
    value = block.get("content")
    if isinstance(value, str):
        content.extend(text_parts(value))
    elif isinstance(value, list):

        def read(inner: Json) -> None:
            kind = string(inner, "type")
            if kind == "text":
                content.extend(_text(inner))
            elif kind == "image":
                content.append(_image(inner, rules))
            elif kind == "document":
                content.append(_document(inner, rules))
            elif rules.provider and kind in RESULT_PARTS:
                content.append(opaque(inner, kind))
            else:
                raise unsupported(f"Input tag '{kind}' is not supported here", "type")

        each(value, "content", read)
    elif value is not None:
        raise wrong_type("string", value, "content")
    return ToolResultPart(named(block, "tool_use_id"), tuple(content), opt_bool(block, "is_error", False))


def _image(block: Json, rules: _Rules) -> MediaPart | ProviderPart:
    if rules.provider and opt_object(block, "transformations"):
        return opaque(block, "image")
    only(block, frozenset({"type", "source", "cache_control"}))
    check_mark(block)
    media_type, source = _source(object_(block, "source"))
    return MediaPart("image", media_type, source)


def _document(block: Json, rules: _Rules) -> MediaPart | ProviderPart:
    only(block, frozenset({"type", "source", "title", "context", "citations", "cache_control"}))
    check_mark(block)
    if rules.provider and (check_citations(block) or object_(block, "source").get("type") == "content"):
        return opaque(block, "document")
    media_type, source = _source(object_(block, "source"))
    options: Json = {}
    for key in ("title", "context"):
        if (value := opt_string(block, key)) is not None:
            options[key] = value
    if check_citations(block):
        raise unsupported("citations are not supported", "citations")
    return MediaPart("document", media_type, source, options)


def _source(source: Json) -> tuple[str, dict[str, str]]:
    """Media type (empty if the sender did not say) and the neutral source."""
    try:
        only(source, _SOURCE_FIELDS)
        match string(source, "type"):
            case "base64":
                return named(source, "media_type"), {"base64": string(source, "data")}
            case "url":
                return "", {"url": named(source, "url")}
            case "file":
                return "", {"file_id": named(source, "file_id")}
            case "text":
                return "text/plain", {"text": string(source, "data")}
            case kind:
                raise unsupported(f"Input tag '{kind}' is not supported here", "type")
    except FieldError as error:
        error.under("source")
        raise


_SOURCE_FIELDS = frozenset({"type", "media_type", "data", "url", "file_id", "content"})

_BLOCKS: dict[str, Callable[[Json, _Rules], Part]] = {
    "thinking": _thinking,
    "tool_use": _tool_use,
    "tool_result": _tool_result,
    "image": _image,
    "document": _document,
}
_PLACES: dict[str, tuple[Role, ...]] = {"thinking": ("assistant",), "tool_use": ("assistant",), "tool_result": ("user",)}


def _tool(rules: _Rules, tool: Json) -> Tool:
    kind = opt_string(tool, "type")
    if kind not in (None, "custom"):
        if rules.provider:
            return provider_tool(tool, kind)
        raise unsupported(f"Input tag '{kind}' is not supported: only custom tools are", "type")
    check_mark(tool)
    return Tool(
        name=named(tool, "name"),
        description=opt_string(tool, "description") or "",
        parameters=object_(tool, "input_schema"),
        extra=tool_extra(tool, _TOOL_FIELDS),
    )


_TOOL_FIELDS = frozenset({"type", "name", "description", "input_schema", "cache_control"})


def _tool_choice(body: Json) -> ToolChoice:
    choice = opt_object(body, "tool_choice")
    if choice is None:
        return ToolChoice()
    try:
        only(choice, frozenset({"type", "name", "disable_parallel_tool_use"}))
        parallel = not opt_bool(choice, "disable_parallel_tool_use", False)
        match string(choice, "type"):
            case "auto":
                return ToolChoice(parallel=parallel)
            case "any":
                return ToolChoice("any", parallel=parallel)
            case "none":
                return ToolChoice("none")
            case "tool":
                return ToolChoice("tool", named(choice, "name"), parallel)
            case kind:
                tags = "'auto', 'any', 'tool', 'none'"
                raise bad_value(f"Input tag '{kind}' found using 'type' does not match any of the expected tags: {tags}")
    except FieldError as error:
        error.under("tool_choice")
        raise


def _refusal(error: FieldError) -> InvalidRequest:
    path = ".".join(map(str, error.path))
    if not path:
        return InvalidRequest(error.detail)
    match error.kind:
        case "missing":
            sentence = "Field required"
        case "unknown":
            sentence = "Extra inputs are not permitted"
        case "type":
            names = {"object": "an object", "array": "a valid array"}
            sentence = f"Input should be {names.get(error.detail, f'a valid {error.detail}')}"
        case "above":
            sentence = f"Input should be less than or equal to {error.detail}"
        case "below":
            sentence = f"Input should be greater than or equal to {error.detail}"
        case _:
            sentence = error.detail
    return InvalidRequest(f"{path}: {sentence}", param=path)
