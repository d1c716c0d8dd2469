"""A recorded body as the provider's cache sees it: pieces in render order, each with the place it stands at.

Not `wire`'s reading of a request: the linter must also read bodies that a server refuses (five breakpoints, 1h after 5m), and
it needs every piece's place and text to say where a prefix breaks. The words are those of `prompt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import msgspec

from anaphora.lint.requests import Recorded
from anaphora.lint.values import Json, Object, Place, compact, dotted, mapping, objects, string, without
from anaphora.prompt import TTL, Block, BlockKind, Lengths, Prompt, Section

Count: TypeAlias = Callable[[str], int]
"""Tokens of a text."""

MARKS = frozenset({"cache_control", "prompt_cache_breakpoint"})
IMAGE_TOKENS = 1000
"""A flat estimate for one picture; its size in tokens depends on pixels, which the linter does not decode."""

_KINDS: dict[str, BlockKind] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "thinking": "thinking",
    "redacted_thinking": "thinking",
    "reasoning": "thinking",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "input_audio": "audio",
    "document": "document",
    "file": "document",
    "input_file": "document",
    "tool_use": "tool_use",
    "function_call": "tool_use",
    "function": "tool_use",
    "tool_result": "tool_result",
    "function_call_output": "tool_result",
}
_SYSTEM_ROLES = ("system", "developer")


def estimate(text: str) -> int:
    """Four bytes a token: right within a quarter for English and code, without any tokenizer."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)


class Piece(msgspec.Struct, frozen=True):
    """One block, or one string that stands for a block."""

    section: Section
    kind: BlockKind
    place: Place
    value: Json
    """As sent, marks taken out."""
    content: bytes
    """What makes two pieces the same; a string equals the one text block it stands for (R2)."""
    tokens: int
    role: str = ""
    message: int = -1
    mark: TTL | None = None

    @property
    def text(self) -> str | None:
        """The text of a text block; None for every other kind."""
        if isinstance(self.value, str):
            return self.value
        found = mapping(self.value).get("text") if self.kind in ("text", "empty") else None
        return found if isinstance(found, str) else None

    @property
    def text_place(self) -> Place:
        return self.place if isinstance(self.value, str) else (*self.place, "text")


class Layout(msgspec.Struct, frozen=True):
    recorded: Recorded
    model: str
    pieces: tuple[Piece, ...]
    ends: tuple[int, ...]
    """Tokens up to and including each piece."""
    automatic: TTL | None
    system_salts: dict[str, str]
    """By the code of the finding that a change of it is: what invalidates from the system on."""
    message_salts: dict[str, str]
    """The same for what invalidates the messages only; for OpenAI what must be identical beside the blocks (P10)."""
    cache_key: str | None = None
    mode: str | None = None
    """OpenAI `prompt_cache_options.mode`."""
    ttl: TTL | None = None
    partial: bool = False
    """The body continues a stored answer or conversation, so most of its prefix is not in it."""

    @property
    def anthropic(self) -> bool:
        return self.recorded.dialect == "anthropic"

    @property
    def total(self) -> int:
        return self.ends[-1] if self.ends else 0

    def path(self, place: Place) -> str:
        return dotted(place, brackets=not self.anthropic)

    def end(self, num_pieces: int) -> int:
        """Tokens of the first pieces."""
        return self.ends[num_pieces - 1] if num_pieces else 0

    def prompt(self) -> Prompt:
        """The same in the words of the accounting."""
        salts = {code.removesuffix("-changed"): value for code, value in {**self.system_salts, **self.message_salts}.items()}
        blocks = tuple(
            Block(
                section=piece.section,
                kind=piece.kind,
                content=piece.content,
                path=self.path(piece.place),
                role=piece.role,
                message=piece.message,
                mark=piece.mark,
            )
            for piece in self.pieces
        )
        return Prompt(
            dialect="anthropic" if self.anthropic else "openai",
            model=self.model,
            blocks=blocks,
            automatic=self.automatic,
            system_salt=msgspec.json.encode(sorted(self.system_salts.items())),
            message_salt=msgspec.json.encode(sorted(self.message_salts.items())),
            salts=salts,
            mode="explicit" if self.mode == "explicit" else "implicit" if self.mode == "implicit" else None,
            ttl=self.ttl,
            cache_key=self.cache_key,
        )

    def lengths(self) -> Lengths:
        return Lengths(ends=self.ends, total=self.total)


def lay_out(recorded: Recorded, count: Count = estimate) -> Layout:
    """The pieces of one body. Never fails: what cannot be understood is one piece of text."""
    body = recorded.body
    read = {"anthropic": _anthropic, "openai-chat": _chat, "openai-responses": _responses}[recorded.dialect]
    pieces = tuple(_piece(*found, count=count) for found in read(body))
    ends: list[int] = []
    for piece in pieces:
        ends.append((ends[-1] if ends else 0) + piece.tokens)
    settings = _anthropic_settings if recorded.dialect == "anthropic" else _openai_settings
    system_salts, message_salts = settings(body, pieces)
    options = mapping(body.get("prompt_cache_options"))
    key = body.get("prompt_cache_key")
    return Layout(
        recorded=recorded,
        model=string(body.get("model")),
        pieces=pieces,
        ends=tuple(ends),
        automatic=_mark(body) if recorded.dialect == "anthropic" else None,
        system_salts=system_salts,
        message_salts=message_salts,
        cache_key=key if isinstance(key, str) else None,
        mode=string(options.get("mode")) or None,
        ttl=_ttl(options.get("ttl")) if options else None,
        partial=any(body.get(name) for name in ("previous_response_id", "conversation")),
    )


_Found: TypeAlias = tuple[Section, Place, Json, str, int]
"""section, place, value, role, index of the message."""


def _anthropic(body: Object) -> Iterator[_Found]:
    yield from _tools(body)
    yield from _content("system", ("system",), body.get("system"), "system", -1)
    for index, message in _indexed(body.get("messages")):
        yield from _content("messages", ("messages", index, "content"), message.get("content"), _who(message), index)


def _chat(body: Object) -> Iterator[_Found]:
    yield from _tools(body)
    leading = True
    for index, message in _indexed(body.get("messages")):
        leading = leading and message.get("role") in _SYSTEM_ROLES
        section: Section = "system" if leading else "messages"
        if message.get("role") == "tool":
            yield section, ("messages", index), {**message, "type": "tool_result"}, "tool", index
            continue
        yield from _content(section, ("messages", index, "content"), message.get("content"), _who(message), index)
        for number, call in _indexed(message.get("tool_calls")):
            yield section, ("messages", index, "tool_calls", number), {"type": "function", **call}, "assistant", index


def _responses(body: Object) -> Iterator[_Found]:
    yield from _tools(body)
    yield from _content("system", ("instructions",), body.get("instructions"), "system", -1)
    if isinstance(body.get("input"), str):
        yield from _content("messages", ("input",), body["input"], "user", 0)
    leading = True
    for index, item in _indexed(body.get("input")):
        leading = leading and item.get("role") in _SYSTEM_ROLES
        section: Section = "system" if leading else "messages"
        if "content" in item and item.get("type", "message") == "message":
            yield from _content(section, ("input", index, "content"), item["content"], _who(item), index)
        else:
            yield section, ("input", index), item, _who(item), index


def _tools(body: Object) -> Iterator[_Found]:
    for index, tool in _indexed(body.get("tools")):
        yield "tools", ("tools", index), tool, "", -1


def _content(section: Section, place: Place, content: Json, role: str, message: int) -> Iterator[_Found]:
    if content is None:
        return
    if isinstance(content, list):
        for index, block in enumerate(content):
            yield section, (*place, index), block, role, message
    else:
        yield section, place, content, role, message


def _indexed(value: Json) -> Iterator[tuple[int, Object]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, dict):
                yield index, item


def _who(message: Object) -> str:
    """The role, and the name beside it where there is one: both are rendered."""
    name = string(message.get("name"))
    return string(message.get("role")) + (f":{name}" if name else "")


def _piece(section: Section, place: Place, value: Json, role: str, message: int, *, count: Count) -> Piece:
    mark = _mark(mapping(value))
    bare = {key: item for key, item in value.items() if key not in MARKS} if isinstance(value, dict) else value
    if section != "tools" and isinstance(bare, dict) and isinstance(bare.get("content"), list):
        bare = {**bare, "content": without(bare["content"], MARKS)}
    kind: BlockKind = "tool" if section == "tools" else _kind(bare)
    whole: Json = {"type": "text", "text": bare} if isinstance(bare, str) else bare
    if kind == "text" and isinstance(whole, dict):
        kind = "text" if whole.get("text") else "empty"
    content = compact([role, whole]).encode("utf-8", "surrogatepass")
    return Piece(section, kind, place, bare, content, _tokens(kind, bare, count), role, message, mark)


def _kind(value: Json) -> BlockKind:
    if isinstance(value, str):
        return "text"
    name = string(mapping(value).get("type"))
    if name.endswith("_tool_result"):
        return "server_tool_result"
    return _KINDS.get(name, "text" if "text" in mapping(value) else "document")


def _tokens(kind: BlockKind, value: Json, count: Count) -> int:
    if kind == "image":
        return IMAGE_TOKENS
    if isinstance(value, str):
        return count(value)
    holder = mapping(value)
    if kind in ("text", "empty"):
        return count(string(holder.get("text")))
    nested = holder.get("content")
    if kind == "tool_result" and isinstance(nested, list):
        return sum(_tokens(_kind(part), part, count) for part in nested)
    if kind == "tool_result":
        return count(string(nested) or string(holder.get("output")) or compact(value))
    if kind == "thinking":
        return count(string(holder.get("thinking")) or compact(value))
    return count(compact(value))


def _mark(holder: Object) -> TTL | None:
    control = holder.get("cache_control")
    if isinstance(control, dict):
        return _ttl(control.get("ttl")) or "5m"
    point = holder.get("prompt_cache_breakpoint")
    if isinstance(point, dict):
        return _ttl(point.get("ttl")) or "30m"
    return None


def _ttl(value: Json) -> TTL | None:
    match value:
        case "5m" | "1h" | "30m" | "12h":
            return value
        case _:
            return None


def _has_image(pieces: tuple[Piece, ...]) -> bool:
    return any(
        piece.kind == "image"
        or (
            piece.kind == "tool_result" and any(_kind(part) == "image" for part in objects(mapping(piece.value).get("content")))
        )
        for piece in pieces
    )


def _anthropic_settings(body: Object, pieces: tuple[Piece, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Spec §1.7; an explicit default counts as left out."""
    choice = mapping(body.get("tool_choice")) or {"type": "auto"}
    thinking = mapping(body.get("thinking")) or {"type": "disabled"}
    effort = string(mapping(body.get("output_config")).get("effort")) or "high"
    types = sorted(string(tool.get("type")) for tool in objects(body.get("tools")))
    cited = any(mapping(mapping(piece.value).get("citations")).get("enabled") is True for piece in pieces)
    return {
        "tier-changed": string(body.get("speed")) or "standard",
        "server-tools-changed": compact([name for name in types if name.startswith(("web_search", "web_fetch"))])
        + (" citations" if cited else ""),
    }, {
        "tool-choice-changed": compact({key: item for key, item in choice.items() if key != "disable_parallel_tool_use"}),
        "parallel-calls-changed": compact(choice.get("disable_parallel_tool_use") is True),
        "thinking-changed": compact(thinking),
        "effort-changed": effort,
        "image-presence": "images" if _has_image(pieces) else "no images",
    }


def _openai_settings(body: Object, pieces: tuple[Piece, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Rule P10. `tool_choice` is not among them: it is the switch that OpenAI recommends."""
    text = mapping(body.get("text"))
    form = text.get("format") or body.get("response_format") or {"type": "text"}
    verbosity = text.get("verbosity") or body.get("verbosity") or "medium"
    effort = body.get("reasoning_effort") or mapping(body.get("reasoning")).get("effort") or "default"
    tier = string(body.get("service_tier")) or "auto"
    return {}, {
        "parallel-calls-changed": compact(body.get("parallel_tool_calls") is not False),
        "effort-changed": string(effort),
        "format-changed": compact(form) + (f" verbosity {verbosity}" if verbosity != "medium" else ""),
        "tier-changed": "auto" if tier == "default" else tier,
    }
