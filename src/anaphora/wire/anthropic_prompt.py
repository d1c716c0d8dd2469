"""Prompt caching in an Anthropic body: the rules about marks (spec §1.2, §1.6, §1.9), and the `Prompt` that is read off it.

Marks on parts inside a `tool_result` count among the four and stand for a mark on the whole result.
"""

from __future__ import annotations

from collections.abc import Iterator

from anaphora.prompt import TTL, Block, BlockKind, Prompt, Section
from anaphora.wire.base import encode
from anaphora.wire.blocks import MARKS, block_content, envelope, json_text, media_digest, objects, text_envelope, tool_content
from anaphora.wire.fields import FieldError, Json, bad_value, only, opt_object, opt_string

MAX_MARKS = 4

Path = tuple[str | int, ...]

_ORDER = (
    "a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block. "
    "Note that blocks are processed in the following order: `tools`, `system`, `messages`."
)


# -- rules ---------------------------------------------------------------------------------------------------------------


def check_mark(owner: Json) -> None:
    """One mark must be well formed, wherever it stands."""
    mark = opt_object(owner, "cache_control")
    if mark is None:
        return
    if "type" not in mark:
        raise bad_value("Unable to extract tag using discriminator 'type'", "cache_control")
    if mark["type"] != "ephemeral":
        found = f"'{mark['type']}' found using 'type' does not match any of the expected tags: 'ephemeral'"
        raise bad_value(f"Input tag {found}", "cache_control")
    try:
        only(mark, _MARK_FIELDS)
        if mark.get("ttl") not in (None, "5m", "1h"):
            raise bad_value("Input should be '5m' or '1h'", "ttl")
    except FieldError as error:
        error.under("cache_control", "ephemeral")
        raise


# `scope` comes from Claude Code under a beta: it shares entries between organisations, of which there are none here.
_MARK_FIELDS = frozenset({"type", "ttl", "scope"})


def check_marks(body: Json) -> None:
    """What marks must be to each other (R7, R13, R18). Every one of them is well formed already."""
    marks = [(path, owner) for place in _places(body) for path, owner in _marked(*place)]
    automatic = _ttl(body)
    num_marks = len(marks) + (automatic is not None)
    if num_marks > MAX_MARKS:
        raise bad_value(f"A maximum of {MAX_MARKS} blocks with cache_control may be provided. Found {num_marks}.")
    any_short = False
    for path, owner in marks:
        if _ttl(owner) == "5m":
            any_short = True
        elif any_short:
            raise bad_value(_ORDER, *path, "cache_control", "ttl")
    if automatic is not None:
        _check_automatic(body, automatic, any_short)


def _check_automatic(body: Json, ttl: TTL, any_short: bool) -> None:
    """R18. The automatic mark goes to the last block that can have one (R19); without any there is none."""
    found, given = _target(body)
    if not found:
        return
    if given is not None and given != ttl:
        raise bad_value(
            f"Top-level cache_control has ttl='{ttl}' but the target block already has cache_control with ttl='{given}'"
        )
    if ttl == "1h" and any_short:
        raise bad_value(_ORDER, "cache_control", "ttl")


def _target(body: Json) -> tuple[bool, TTL | None]:
    """Whether there is a block for the automatic mark, and the TTL of the mark that it has already."""
    for _, content in reversed(list(_places(body))):
        if isinstance(content, str):
            if content:
                return True, None
            continue
        for _, block in reversed(list(objects(content))):
            if _kind(block) not in ("thinking", "empty"):
                return True, _mark(block)
    return False, None


def _places(body: Json) -> Iterator[tuple[Path, object]]:
    """Where blocks stand, in the order of rendering (R1)."""
    yield ("tools",), body.get("tools")
    yield ("system",), body.get("system")
    for index, message in objects(body.get("messages")):
        yield ("messages", index, "content"), message.get("content")


def _marked(path: Path, blocks: object) -> list[tuple[Path, Json]]:
    """The blocks that have a mark; parts of a tool's result come before the result."""
    found: list[tuple[Path, Json]] = []
    if not isinstance(blocks, list):
        return found
    for index, block in enumerate(blocks):
        if block.get("type") == "tool_result":
            found += _marked((*path, index, "content"), block.get("content"))
        if block.get("cache_control") is not None:
            found.append(((*path, index), block))
    return found


def check_diagnostics(body: Json) -> None:
    options = opt_object(body, "diagnostics")
    if options is None:
        return
    try:
        only(options, frozenset({"previous_message_id"}))
        opt_string(options, "previous_message_id")
    except FieldError as error:
        error.under("diagnostics")
        raise


# -- body → Prompt -------------------------------------------------------------------------------------------------------


def read_prompt(body: Json) -> Prompt:
    """Blocks as they were sent, none joined. `body` is one that parses; of others, what can be made out."""
    blocks = [
        Block("tools", "tool", _tool(tool), f"tools.{index}", mark=_ttl(tool)) for index, tool in objects(body.get("tools"))
    ]
    blocks += _blocks(body.get("system"), "system", "system", "system", -1)
    cites = images = False
    for index, message in objects(body.get("messages")):
        content = message.get("content")
        blocks += _blocks(content, "messages", str(message.get("role")), f"messages.{index}.content", index)
        some_cite, some_images = _features(content)
        cites, images = cites or some_cite, images or some_images
    system, messages = _system_salts(body, cites), _message_salts(body, images)
    diagnostics = body.get("diagnostics")
    previous = diagnostics.get("previous_message_id") if isinstance(diagnostics, dict) else None
    return Prompt(
        dialect="anthropic",
        model=str(body.get("model")),
        blocks=tuple(blocks),
        automatic=_ttl(body),
        system_salt=encode(list(system.values())),
        message_salt=encode(list(messages.values())),
        salts={**system, **messages},
        options_given=tuple(key for key in ("cache_control", "diagnostics") if body.get(key) is not None),
        diagnose=isinstance(diagnostics, dict),
        previous_id=previous if isinstance(previous, str) else None,
    )


def _blocks(content: object, section: Section, role: str, path: str, message: int) -> Iterator[Block]:
    """A string is one text block."""
    if isinstance(content, str):
        kind: BlockKind = "text" if content else "empty"
        yield Block(section, kind, block_content(role, text_envelope(content)), path, role, message)
        return
    for index, block in objects(content):
        body = block_content(role, _envelope(block))
        yield Block(section, _kind(block), body, f"{path}.{index}", role, message, _mark(block))


_KINDS: dict[str, BlockKind] = {
    "thinking": "thinking",
    "redacted_thinking": "thinking",
    "image": "image",
    "document": "document",
    "search_result": "document",
    "container_upload": "document",
    "tool_use": "tool_use",
    "server_tool_use": "tool_use",
    "mcp_tool_use": "tool_use",
    "tool_result": "tool_result",
}


def _kind(block: Json) -> BlockKind:
    kind = str(block.get("type"))
    if kind == "text":
        return "text" if block.get("text") else "empty"
    return _KINDS.get(kind) or ("server_tool_result" if kind.endswith("_tool_result") else "text")


def _ttl(owner: Json) -> TTL | None:
    mark = owner.get("cache_control")
    if not isinstance(mark, dict):
        return None
    return "1h" if mark.get("ttl") == "1h" else "5m"


def _mark(block: Json) -> TTL | None:
    if (ttl := _ttl(block)) is not None or block.get("type") != "tool_result":
        return ttl
    inner = [ttl for _, part in objects(block.get("content")) if (ttl := _ttl(part)) is not None]
    return inner[-1] if inner else None


def _tool(tool: Json) -> bytes:
    # Tools of the provider have no schema; they are what their fields say.
    return tool_content(tool, "input_schema") if tool.get("type") in (None, "custom") else block_content("tool", envelope(tool))


def _envelope(block: Json) -> Json:
    if _PLAIN.issuperset(block):
        return text_envelope(block.get("text"))
    fields = envelope(block, _SILENT)
    if fields.get("is_error") is False:
        del fields["is_error"]
    if block.get("type") == "tool_result" and "content" in fields:
        content = fields["content"]
        inner = [text_envelope(content)] if isinstance(content, str) else [_envelope(part) for _, part in objects(content)]
        fields["content"] = inner
    source = fields.get("source")
    if isinstance(source, dict) and source.get("type") == "base64":
        fields["source"] = {"sha256": media_digest(source.get("data")), "media_type": source.get("media_type")}
    return fields


_PLAIN = frozenset({"type", "text", "cache_control"})
_SILENT = MARKS | {"caller"}  # who called a tool, not what was called


def _system_salts(body: Json, cites: bool) -> dict[str, str]:
    """What is rendered behind the tools and ahead of the system text (§1.7)."""
    kinds = [str(tool.get("type")) for _, tool in objects(body.get("tools"))]
    output = body.get("output_config")
    # A format puts its description into the system prompt.
    form = output.get("format") if isinstance(output, dict) else None
    return {
        "speed": str(body.get("speed") or "standard"),
        "web_search": _on(any(kind.startswith("web_search") for kind in kinds)),
        "web_fetch": _on(any(kind.startswith("web_fetch") for kind in kinds)),
        "citations": _on(cites),
        "format": "text" if form is None else json_text(form),
    }


def _message_salts(body: Json, images: bool) -> dict[str, str]:
    """What the messages depend on beside themselves (§1.7)."""
    output = body.get("output_config")
    effort = output.get("effort") if isinstance(output, dict) else None
    choice, parallel = _tool_choice(body)
    return {
        "tool_choice": choice,
        "parallel_tool_use": parallel,
        "images": "present" if images else "absent",
        "thinking": _thinking(body),
        "effort": str(effort or "high"),
    }


def _on(value: bool) -> str:
    return "on" if value else "off"


def _features(blocks: object) -> tuple[bool, bool]:
    """(a citation is wanted, an image is there) among blocks and the parts of tool results."""
    cites = images = False
    for _, block in objects(blocks):
        kind = block.get("type")
        if kind == "image":
            images = True
        elif kind == "tool_result":
            inner_cites, inner_images = _features(block.get("content"))
            cites, images = cites or inner_cites, images or inner_images
        elif kind in ("document", "search_result"):
            citations = block.get("citations")
            cites = cites or (isinstance(citations, dict) and citations.get("enabled") is True)
    return cites, images


def _tool_choice(body: Json) -> tuple[str, str]:
    """(choice, "on" or "off" for parallel calls). Without tools there is nothing to choose."""
    choice = body.get("tool_choice")
    if not isinstance(choice, dict) or not body.get("tools"):
        return "auto", "on"
    kind = str(choice.get("type"))
    if kind == "none":
        return kind, "on"
    name = f":{choice.get('name')}" if kind == "tool" else ""
    return kind + name, _on(choice.get("disable_parallel_tool_use") is not True)


def _thinking(body: Json) -> str:
    config = body.get("thinking")
    if not isinstance(config, dict):
        return "disabled"
    budget = config.get("budget_tokens")
    return str(config.get("type")) + ("" if budget is None else f":{budget}")
