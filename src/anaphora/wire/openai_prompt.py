"""Prompt caching in OpenAI's bodies: the fields about it (spec §2.2), and the `Prompt` that is read off them.

The same conversation has the same block contents in Chat and in Responses. Marks may stand on parts of a user's, a
developer's or a tool's content, in Chat also on an assistant's text. Whether a model knows a field is for its profile to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from anaphora.prompt import TTL, Block, BlockKind, Prompt
from anaphora.wire.base import encode
from anaphora.wire.blocks import block_content, envelope, json_text, media_digest, objects, text_envelope, tool_content
from anaphora.wire.fields import FieldError, Json, bad_value, only, opt_bool, opt_object, opt_string

MARK = "prompt_cache_breakpoint"
DEFAULT_TTL: TTL = "30m"

_Words = tuple[str, ...]


# -- rules ---------------------------------------------------------------------------------------------------------------


def one_of(found: str, *words: str) -> str:
    names = [f"'{word}'" for word in words]
    listed = f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]
    return f"Invalid value: '{found}'. Supported values are: {listed}."


def check_breakpoint(part: Json) -> None:
    """`prompt_cache_breakpoint` of a content part."""
    mark = opt_object(part, MARK)
    if mark is None:
        return
    try:
        only(mark, frozenset({"mode", "ttl"}))
        if mark.get("mode") is None:
            raise FieldError("missing", "mode")
        _check_word(mark, "mode", "explicit")
        _check_word(mark, "ttl", "30m", "12h")
    except FieldError as error:
        error.under(MARK)
        raise


def check_caching(body: Json, *, ttls: _Words, responses: bool) -> None:
    """The fields at the top of a body. `ttls`: what `prompt_cache_options.ttl` may be; some of the rest is Responses' own."""
    opt_string(body, "prompt_cache_key")
    _check_word(body, "prompt_cache_retention", "in_memory", "24h")
    options = opt_object(body, "prompt_cache_options")
    if options is None:
        return
    try:
        only(options, _OPTIONS | _RESPONSES_OPTIONS if responses else _OPTIONS)
        _check_word(options, "mode", "implicit", "explicit")
        _check_word(options, "ttl", *ttls)
        opt_bool(options, "prewarm", False)
        opt_string(options, "comparison_response_id")
    except FieldError as error:
        error.under("prompt_cache_options")
        raise


_OPTIONS = frozenset({"mode", "ttl"})
_RESPONSES_OPTIONS = frozenset({"prewarm", "comparison_response_id"})


def _check_word(owner: Json, key: str, *words: str) -> None:
    value = opt_string(owner, key)
    if value is not None and value not in words:
        raise bad_value(one_of(value, *words), key)


# -- body → Prompt -------------------------------------------------------------------------------------------------------


def read_chat(body: Json) -> Prompt:
    """Chat Completions. `body` is one that parses; of others, what can be made out. So below."""
    blocks = [
        Block("tools", "tool", _tool(tool, tool.get("function")), f"tools[{index}]")
        for index, tool in objects(body.get("tools"))
    ]
    ttl = _default_ttl(body)
    for index, message in objects(body.get("messages")):
        blocks += _chat_message(message, index, ttl)
    return _prompt(body, blocks, body.get("response_format"), body.get("reasoning_effort"), body.get("verbosity"))


def read_responses(body: Json) -> Prompt:
    blocks = [Block("tools", "tool", _tool(tool, tool), f"tools[{index}]") for index, tool in objects(body.get("tools"))]
    if isinstance(text := body.get("instructions"), str):
        kind = _text_kind(text)
        blocks.append(Block("system", kind, block_content("system", text_envelope(text)), "instructions", "system"))
    if isinstance(text := body.get("input"), str):
        blocks.append(Block("messages", _text_kind(text), block_content("user", text_envelope(text)), "input", "user", 0))
    ttl = _default_ttl(body)
    for index, item in objects(body.get("input")):
        blocks += _item(item, index, ttl)
    text, reasoning = body.get("text"), body.get("reasoning")
    form = text.get("format") if isinstance(text, dict) else None
    if isinstance(form, dict) and form.get("type") == "json_schema":  # as Chat nests it
        form = {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}
    effort = reasoning.get("effort") if isinstance(reasoning, dict) else None
    return _prompt(body, blocks, form, effort, text.get("verbosity") if isinstance(text, dict) else None)


def read_completion(body: Json) -> Prompt:
    """Completions: the raw text, or the token ids, are one block."""
    prompt = body.get("prompt")
    kind: BlockKind = "text" if prompt else "empty"
    block = Block("messages", kind, block_content("prompt", prompt), "prompt", "user", 0)
    return _prompt(body, [block], None, None, None)


def _prompt(body: Json, blocks: list[Block], form: object, effort: object, verbosity: object) -> Prompt:
    salts = {
        "parallel_tool_use": "off" if body.get("parallel_tool_calls") is False else "on",
        "format": "text" if form in (None, {"type": "text"}) else json_text(form),
        "effort": str(effort or "default"),
        "verbosity": str(verbosity or "medium"),
        "context_management": json_text(body["context_management"]) if body.get("context_management") else "none",
        "service_tier": str(tier if (tier := body.get("service_tier")) not in (None, "auto") else "default"),
    }
    given = body.get("prompt_cache_options")
    options: Json = given if isinstance(given, dict) else {}
    fields = [key for key in _FIELDS if body.get(key) is not None]
    if any(block.mark is not None for block in blocks):
        fields.append(MARK)
    key, previous = body.get("prompt_cache_key"), options.get("comparison_response_id")
    return Prompt(
        dialect="openai",
        model=str(body.get("model")),
        blocks=tuple(blocks),
        message_salt=encode(list(salts.values())),
        salts=salts,
        mode=_mode(options.get("mode")),
        ttl=_ttl(options.get("ttl")),
        retention=_retention(body.get("prompt_cache_retention")),
        cache_key=key if isinstance(key, str) else None,
        options_given=tuple(fields),
        diagnose="comparison_response_id" in options,
        previous_id=previous if isinstance(previous, str) else None,
    )


_FIELDS = ("prompt_cache_options", "prompt_cache_retention", "prompt_cache_key")


def _mode(word: object) -> Literal["implicit", "explicit"] | None:
    return "implicit" if word == "implicit" else "explicit" if word == "explicit" else None


def _ttl(word: object) -> TTL | None:
    return "30m" if word == "30m" else "12h" if word == "12h" else None


def _retention(word: object) -> Literal["in_memory", "24h"] | None:
    return "in_memory" if word == "in_memory" else "24h" if word == "24h" else None


def _default_ttl(body: Json) -> TTL:
    options = body.get("prompt_cache_options")
    return (_ttl(options.get("ttl")) if isinstance(options, dict) else None) or DEFAULT_TTL


def _mark(part: Json, default: TTL) -> TTL | None:
    mark = part.get(MARK)
    return (_ttl(mark.get("ttl")) or default) if isinstance(mark, dict) else None


def _tool(tool: Json, function: object) -> bytes:
    if tool.get("type") == "function" and isinstance(function, dict):
        return tool_content(function, "parameters")
    return block_content("tool", envelope(tool))


def _text_kind(text: object) -> BlockKind:
    return "text" if text else "empty"


def _role(role: object) -> str:
    return "system" if role == "developer" else str(role)


def _chat_message(message: Json, index: int, ttl: TTL) -> Iterator[Block]:
    role, path = _role(message.get("role")), f"messages[{index}]"
    more = [message[key] for key in ("name", "tool_call_id") if message.get(key) is not None]
    if thinking := message.get("reasoning_content"):
        yield _thinking(thinking, f"{path}.reasoning_content", index)
    yield from _content(message.get("content"), role, more, f"{path}.content", index, ttl)
    if refusal := message.get("refusal"):
        yield Block("messages", "text", block_content(role, text_envelope(refusal), *more), f"{path}.refusal", role, index)
    for number, call in objects(message.get("tool_calls")):
        function = call.get("function")
        fields: Json = function if isinstance(function, dict) else {}
        yield _call(call.get("id"), fields, f"{path}.tool_calls[{number}]", index)


def _item(item: Json, index: int, ttl: TTL) -> Iterator[Block]:
    path = f"input[{index}]"
    match item.get("type"):
        case None | "message":
            yield from _content(item.get("content"), _role(item.get("role")), [], f"{path}.content", index, ttl)
        case "function_call":
            yield _call(item.get("call_id"), item, path, index)
        case "function_call_output":
            yield from _content(item.get("output"), "tool", [item.get("call_id")], f"{path}.output", index, ttl)
        case "reasoning":
            pieces = item.get("content") or item.get("summary")
            text = "".join(str(piece.get("text") or "") for _, piece in objects(pieces))
            signature = item.get("encrypted_content")
            if text or signature:
                yield _thinking(text, path, index, *([signature] if signature else []))
        case _:  # no kind of ours: what its fields say
            yield Block("messages", "text", block_content("", envelope(item)), path, "", index)


def _thinking(text: object, path: str, message: int, *signature: object) -> Block:
    body = {"thinking": text, "type": "thinking"}
    return Block("messages", "thinking", block_content("assistant", body, *signature), path, "assistant", message)


def _call(call_id: object, function: Json, path: str, message: int) -> Block:
    body = {"arguments": function.get("arguments"), "id": call_id, "name": function.get("name"), "type": "tool_use"}
    return Block("messages", "tool_use", block_content("assistant", body), path, "assistant", message)


def _content(content: object, role: str, more: list[object], path: str, message: int, ttl: TTL) -> Iterator[Block]:
    """A string is one text part. Every part of a tool's answer is a `tool_result`."""
    if isinstance(content, str):
        kind: BlockKind = "tool_result" if role == "tool" else _text_kind(content)
        yield Block("messages", kind, block_content(role, text_envelope(content), *more), path, role, message)
        return
    for index, part in objects(content):
        kind, body = _part(part)
        if role == "tool":
            kind = "tool_result"
        yield Block("messages", kind, block_content(role, body, *more), f"{path}[{index}]", role, message, _mark(part, ttl))


def _part(part: Json) -> tuple[BlockKind, Json]:
    """A content part in words that Chat and Responses share."""
    match part.get("type"):
        case "text" | "input_text" | "output_text":
            return _text_kind(part.get("text")), text_envelope(part.get("text"))
        case "refusal":
            return _text_kind(part.get("refusal")), text_envelope(part.get("refusal"))
        case "image_url" | "input_image":
            return "image", _image(part)
        case "input_audio":
            audio = part.get("input_audio")
            sound: Json = audio if isinstance(audio, dict) else {}
            return "audio", {"format": sound.get("format"), "sha256": media_digest(sound.get("data")), "type": "audio"}
        case "file" | "input_file":
            return "document", _file(part)
        case _:
            return "text", envelope(part)


def _image(part: Json) -> Json:
    """`detail` decides how many tokens an image is; "auto" is the default."""
    inner = part.get("image_url")
    fields: Json = inner if isinstance(inner, dict) else {**part, "url": inner}
    detail = fields.get("detail")
    source = {"file_id": fields["file_id"]} if fields.get("file_id") else _url(fields.get("url"))
    return {**source, "type": "image", **({"detail": detail} if detail not in (None, "auto") else {})}


def _file(part: Json) -> Json:
    inner = part.get("file")
    fields: Json = inner if isinstance(inner, dict) else part
    name: Json = {"filename": fields["filename"]} if fields.get("filename") else {}
    if fields.get("file_id"):
        return {"file_id": fields["file_id"], "type": "file", **name}
    return {**_url(fields.get("file_url") or fields.get("file_data")), "type": "file", **name}


def _url(url: object) -> Json:
    """The bytes where they are there, the address where they are not."""
    if not isinstance(url, str) or "://" in url[:16]:
        return {"url": url}
    return {"sha256": media_digest(url.rpartition(",")[2])}
