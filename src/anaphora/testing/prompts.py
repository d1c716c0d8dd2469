"""Prompts in short notation, for tests of caching: `prompt("tool:300, sys:1000*5m, user:50")`.

An item is `word:tokens`, then perhaps `*ttl` (a mark) and `=name` (other content: items of equal word, tokens and name are
equal). Words: tool, sys, dev, user, a (assistant), think, use, result, image, search, empty. `&` in front puts the item into
the message before it; with Anthropic, neighbours of one role are one message anyway.
"""

from __future__ import annotations

import re
import zlib
from typing import Any, get_args

import msgspec

from anaphora.breakpoints import steps
from anaphora.prompt import TTL, Block, BlockKind, Lengths, Prompt, Section

WORDS: dict[str, tuple[Section, BlockKind, str]] = {
    "tool": ("tools", "tool", ""),
    "sys": ("system", "text", "system"),
    "dev": ("messages", "text", "developer"),
    "user": ("messages", "text", "user"),
    "a": ("messages", "text", "assistant"),
    "think": ("messages", "thinking", "assistant"),
    "use": ("messages", "tool_use", "assistant"),
    "search": ("messages", "server_tool_result", "assistant"),
    "result": ("messages", "tool_result", "user"),
    "image": ("messages", "image", "user"),
    "empty": ("messages", "empty", "user"),
}

_ITEM = re.compile(r"(?P<and>&?)(?P<word>[a-z]+):(?P<tokens>\d+)(?:\*(?P<ttl>\w+))?(?:=(?P<name>.+))?")


class Built(msgspec.Struct, frozen=True):
    prompt: Prompt
    lengths: Lengths


def prompt(notation: str, *, dialect: str = "anthropic", model: str = "claude-opus-5", behind: int = 0, **fields: Any) -> Built:
    """The prompt, and its lengths with `behind` tokens of template behind it. `fields` go into the `Prompt` as they are."""
    blocks: list[Block] = []
    ends: list[int] = []
    tokens: list[int] = []
    message = -1
    for item in filter(None, (part.strip() for part in notation.split(","))):
        found = _ITEM.fullmatch(item)
        if found is None:
            raise ValueError(f"not an item of a prompt: {item!r}")
        word, ttl, name = found["word"], found["ttl"], found["name"] or ""
        section, kind, role = WORDS[word]
        if section == "messages":
            before = blocks[-1] if blocks else None
            joins = before is not None and before.section == "messages" and before.role == role and dialect == "anthropic"
            message += not (joins or found["and"])
        content = f"{role}|{kind}|{found['tokens']}|{name}".encode()
        place = len(blocks)
        blocks.append(
            Block(
                section=section,
                kind=kind,
                content=content,
                path=f"{section}.{place}" if section != "messages" else f"messages.{message}.content.{place}",
                role=role,
                message=message if section == "messages" else -1,
                mark=_ttl(ttl),
            )
        )
        seed = zlib.crc32(content) << 20
        tokens.extend(range(seed, seed + int(found["tokens"])))
        ends.append(len(tokens))
    tokens.extend(range(behind))
    made = Prompt(dialect="anthropic" if dialect == "anthropic" else "openai", model=model, blocks=tuple(blocks), **fields)
    return Built(prompt=made, lengths=Lengths(ends=tuple(ends), total=len(tokens), steps=steps(tokens)))


def _ttl(text: str | None) -> TTL | None:
    for ttl in get_args(TTL):
        if ttl == text:
            return ttl  # type: ignore[no-any-return]  # get_args gives no types
    if text is not None:
        raise ValueError(f"not a lifetime: {text!r}")
    return None
