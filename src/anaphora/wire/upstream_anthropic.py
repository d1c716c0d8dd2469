"""Anthropic's Messages API as an upstream: how a `Request` is written for it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable

import msgspec

from anaphora.types import (
    Delta,
    MediaPart,
    Message,
    Part,
    ProviderPart,
    Request,
    Sampling,
    TextPart,
    ThinkingPart,
    Tool,
    ToolChoice,
    ToolUsePart,
)
from anaphora.wire.fields import Json
from anaphora.wire.upstream import EFFORTS, UNKNOWN_FILE, Reader, UpstreamError, cannot_say, is_own, object_of, renamed
from anaphora.wire.upstream_anthropic_answer import MessageReader, read_error, read_message

_JSON_SCHEMA_FIELDS = frozenset({"name", "schema", "strict"})
_EMPTY_SCHEMA: Json = {"type": "object", "properties": {}}
"""Of a tool without parameters: a schema must have a type."""


class UpstreamAnthropic:
    """`max_tokens`: of an answer whose client set no limit, as the API demands one."""

    name = "anthropic"
    path = "/v1/messages"

    def __init__(self, *, max_tokens: int = 4096, extensions: bool = False) -> None:
        self._max_tokens = max_tokens
        self._extensions = extensions

    def write(self, request: Request, *, model: str) -> Json:
        own = is_own(request, self.name)
        if request.prompts:
            raise cannot_say("prompt", "this upstream takes messages, no raw prompts")
        body: Json = {
            "model": model,
            "max_tokens": self._max_tokens if request.max_tokens is None else request.max_tokens,
            **_conversation(request.messages, own=own),
        }
        if request.tools:
            body["tools"] = [_tool(tool, f"tools[{index}]", own=own) for index, tool in enumerate(request.tools)]
        if request.tool_choice != ToolChoice():
            body["tool_choice"] = _tool_choice(request.tool_choice)
        body |= _sampling(request.sampling, extensions=own or self._extensions)
        if request.cache_salt is not None:
            if not (own or self._extensions):
                raise cannot_say("cache_salt", "this provider cannot keep prompts of one key apart")
            body["cache_salt"] = request.cache_salt
        body |= request.extra if own else _extra(request.extra)
        if request.stream:
            body["stream"] = True
        return body

    def passed(self, native: bytes, *, model: str) -> Json:
        return renamed(native, model)

    def reader(self, body: Json) -> Reader:
        return MessageReader()

    def read_whole(self, data: bytes) -> list[Delta]:
        return read_message(data)

    def read_error(self, status: int, data: bytes) -> UpstreamError:
        return read_error(status, data)


# -- messages --------------------------------------------------------------------------------------------------------------


def _conversation(messages: tuple[Message, ...], *, own: bool) -> Json:
    fields: Json = {}
    written: list[Json] = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if message.name is not None:
            raise cannot_say(f"{path}.name", "this upstream's messages have no names")
        blocks = [
            block
            for number, part in enumerate(message.content)
            if (block := _block(part, f"{path}.content[{number}]", own=own)) is not None
        ]
        if message.role == "system" and index == 0:
            fields["system"] = blocks
        elif blocks or not message.content:
            if message.role == "system" and not own:
                _check_system_place(messages, index)
            written.append({"role": message.role, "content": blocks})
    if not written:
        raise cannot_say("messages", "this upstream needs at least one message beside the system's")
    return {**fields, "messages": written}


def _check_system_place(messages: tuple[Message, ...], index: int) -> None:
    after = messages[index + 1].role if index + 1 < len(messages) else "assistant"
    if messages[index - 1].role != "user" or after != "assistant":
        raise cannot_say(
            f"messages[{index}]", "this upstream takes system messages at the start, or behind a user's and last in its turn"
        )


def _block(part: Part, path: str, *, own: bool) -> Json | None:
    """None: what is left out."""
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, ToolUsePart):
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": _tool_input(part.arguments)}
    if isinstance(part, ThinkingPart):
        # Only what the provider signed may be sent back to it.
        signed = part.signature or own
        return {"type": "thinking", "thinking": part.text, "signature": part.signature} if signed else None
    if isinstance(part, ProviderPart):
        return {"type": part.kind, **part.body}
    if isinstance(part, MediaPart):
        return _media(part, path, own=own)
    content = [_block(inner, f"{path}.content[{index}]", own=own) for index, inner in enumerate(part.content)]
    block: Json = {"type": "tool_result", "tool_use_id": part.tool_use_id, "content": content}
    return {**block, "is_error": True} if part.is_error else block


def _tool_input(arguments: str) -> object:
    """`input` is an object; arguments that are none are wrapped the way Anthropic's guide tells clients to."""
    if not arguments.strip():
        return {}
    try:
        return msgspec.json.decode(arguments, type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError):
        return {"INVALID_JSON": arguments}


def _media(part: MediaPart, path: str, *, own: bool) -> Json:
    if part.kind == "audio":
        raise cannot_say(path, "this upstream takes no audio")
    known = frozenset() if part.kind == "image" else frozenset({"title", "context"})
    for option in part.options:
        if option not in known:
            raise cannot_say(f"{path}.{option}", "this upstream does not have it")
    return {"type": part.kind, "source": _source(part, path, own=own), **part.options}


def _source(part: MediaPart, path: str, *, own: bool) -> Json:
    source = part.source
    if (url := source.get("url")) is not None:
        return {"type": "url", "url": url}
    if (file_id := source.get("file_id")) is not None:
        if not own:
            raise cannot_say(path, UNKNOWN_FILE)
        return {"type": "file", "file_id": file_id}
    if (text := source.get("text")) is not None:
        return {"type": "text", "media_type": "text/plain", "data": text}
    data = source["base64"]
    if not part.media_type:
        raise cannot_say(path, "this upstream needs the media type of the data")
    if part.kind == "document" and part.media_type == "text/plain":
        try:
            return {"type": "text", "media_type": "text/plain", "data": base64.b64decode(data, validate=True).decode()}
        except (binascii.Error, UnicodeDecodeError) as error:
            raise cannot_say(path, f"the document is no UTF-8 text in base64: {error}") from error
    return {"type": "base64", "media_type": part.media_type, "data": data}


# -- tools, sampling, the rest -----------------------------------------------------------------------------------------------


def _tool(tool: Tool, path: str, *, own: bool) -> Json:
    if tool.kind != "custom":
        named = {} if tool.name == tool.kind else {"name": tool.name}
        return {"type": tool.kind, **named, **tool.extra}
    if not own:
        for field in tool.extra:
            if field != "strict":
                raise cannot_say(f"{path}.{field}", "this upstream does not have it")
    described = {"description": tool.description} if tool.description else {}
    schema = tool.parameters or ({} if own else _EMPTY_SCHEMA)
    return {"name": tool.name, **described, "input_schema": schema, **tool.extra}


def _tool_choice(choice: ToolChoice) -> Json:
    fields: Json = {"type": choice.mode}
    if choice.name is not None:
        fields["name"] = choice.name
    if not choice.parallel:
        fields["disable_parallel_tool_use"] = True
    return fields


def _sampling(sampling: Sampling, *, extensions: bool) -> Json:
    if sampling.n > 1:
        raise cannot_say("n", "this upstream gives one answer for a request")
    if sampling.logprobs is not None:
        raise cannot_say("logprobs", "this upstream gives no log-probabilities")
    if sampling.temperature is not None and sampling.temperature > 1:
        raise cannot_say("temperature", "this upstream takes 0 to 1")
    for index, text in enumerate(sampling.stop):
        if text.isspace():
            raise cannot_say(f"stop[{index}]", "this upstream's stop sequences must have more than white space")
    fields: Json = {key: getattr(sampling, key) for key in ("temperature", "top_p", "top_k")}
    more: Json = {key: getattr(sampling, key) for key in ("min_p", "seed")}
    more |= {key: getattr(sampling, key) or None for key in ("frequency_penalty", "presence_penalty")}
    for key, value in more.items():
        if value is not None and not extensions:
            raise cannot_say(key, "this upstream does not have it")
    stop = {"stop_sequences": list(sampling.stop)} if sampling.stop else {}
    return {key: value for key, value in (fields | more).items() if value is not None} | stop


def _extra(extra: Json) -> Json:
    """OpenAI's words for the same, and the two of Anthropic's own that are asked of its models in any dialect."""
    thinking, output = object_of(extra.get("thinking")), dict(object_of(extra.get("output_config")))
    for key, value in extra.items():
        if key in ("thinking", "output_config"):
            continue
        if key not in _TRANSLATED:
            raise cannot_say(key, "this upstream's dialect does not have it")
        added, thought = _TRANSLATED[key](value)
        output |= added
        thinking = thinking | thought
    fields: Json = {}
    if thinking:
        fields["thinking"] = thinking
    if output:
        fields["output_config"] = output
    return fields


_Translation = tuple[Json, Json]
"""What is added to `output_config` and to `thinking`."""


def _response_format(value: object) -> _Translation:
    form = object_of(value)
    if form.get("type") != "json_schema":
        raise cannot_say("response_format", "this upstream knows text and JSON schemas")
    inner = object_of(form.get("json_schema"))
    for key, wish in inner.items():
        if key not in _JSON_SCHEMA_FIELDS and wish is not None:
            raise cannot_say(f"response_format.json_schema.{key}", "this upstream does not have it")
    if not isinstance(inner.get("schema"), dict):
        raise cannot_say("response_format.json_schema.schema", "this upstream needs it")
    return {"format": {"type": "json_schema", "schema": inner["schema"]}}, {}


def _reasoning_effort(value: object) -> _Translation:
    if value == "none":
        return {}, {"type": "disabled"}
    if value not in EFFORTS:
        raise cannot_say("reasoning_effort", f"this upstream has no effort {value!r}")
    return {"effort": value}, {}


def _reasoning(value: object) -> _Translation:
    for key, wish in object_of(value).items():
        if (key, wish) != ("summary", "auto"):
            raise cannot_say(f"reasoning.{key}", "this upstream does not have it")
    return {}, {"type": "adaptive", "display": "summarized"}


_TRANSLATED: dict[str, Callable[[object], _Translation]] = {
    "response_format": _response_format,
    "reasoning_effort": _reasoning_effort,
    "reasoning": _reasoning,
}
