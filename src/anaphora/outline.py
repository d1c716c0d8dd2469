"""What is kept of a prompt's text, to say later where another prompt parts from it and why. Pure.

An outline holds digests of lines, and short excerpts of those lines that look as if they change with every request. From two
of them the causes of `anaphora lint` can be told, for requests that nobody recorded.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import MutableMapping, Sequence
from itertools import accumulate, islice
from operator import eq
from typing import Any

import msgspec

from anaphora.lint import texts
from anaphora.prompt import Block, BlockKind, Prompt, Section

EXCERPT = 120
"""Characters of one line that are kept at most."""
_MAX_LINES = 4_096
"""Lines of one block that are told apart; longer blocks are compared as wholes."""
_MAX_EXCERPTS = 8
"""Of one block."""

_LABEL = 48
_OPAQUE = frozenset({"tool", "image", "audio", "document"})
_SUSPECT = re.compile(r"[0-9][0-9a-fA-FT:.,/-]{3}")
_WHO = frozenset(
    ("user", "username", "customer", "client", "account", "tenant", "session", "member", "name", "email", "locale", "timezone")
)


class Piece(msgspec.Struct, frozen=True, weakref=True):
    """One block of a prompt."""

    section: Section
    kind: BlockKind
    role: str
    content: int
    """Digest of the block."""
    label: str
    """A tool's name; else how the text begins."""
    lines: array[int]
    """Digests of its lines (and sentences); empty where there are too many."""
    squeezed: int
    """Digest of the text without any white space,"""
    normal: int
    """of its Unicode normal form NFC,"""
    unordered: int
    """and of its JSON with sorted keys, where it is an object."""
    excerpts: dict[int, tuple[int, str]]
    """By line: where in the line an excerpt begins, and the excerpt."""


class Outline(msgspec.Struct, frozen=True):
    pieces: tuple[Piece, ...]


class Parting(msgspec.Struct, frozen=True):
    """Where a prompt stops being like an earlier one."""

    path: str
    code: str = ""
    """The cause, as `anaphora lint` calls it; empty where nothing but another text is there."""
    offset: int | None = None
    """Characters of the block's text before the difference, or before the line with it; None where that is not known."""
    before: str = ""
    after: str = ""
    """Short excerpts; `before` is empty where none was kept."""
    block: int = 0
    share: float = 0.0
    """Part of the block's text that is before the difference, as far as that is known."""


def outline(prompt: Prompt, chain: Sequence[bytes], known: MutableMapping[bytes, Piece]) -> Outline:
    """`known`: pieces made before, by the digest in `breakpoints.chain`; new ones are put there."""
    pieces: list[Piece] = []
    for name, block in zip(chain, prompt.blocks, strict=True):
        piece = known.get(name)
        if piece is None:
            known[name] = piece = _piece(block)
        pieces.append(piece)
    return Outline(tuple(pieces))


def part(before: Outline, now: Outline, prompt: Prompt) -> Parting | None:
    """Where `prompt`, whose outline is `now`, parts from `before`; None where it begins with all of it."""
    found = _part(before, now, prompt)
    if found is None:
        return None
    index, parting = found
    share = parting.offset / max(1, len(_text(prompt.blocks[index]))) if parting.offset else 0.0
    return msgspec.structs.replace(parting, block=index, share=share)


def _part(before: Outline, now: Outline, prompt: Prompt) -> tuple[int, Parting] | None:
    pairs = enumerate(zip(before.pieces, now.pieces, strict=False))
    index = next((i for i, (one, other) in pairs if one.content != other.content), min(len(before.pieces), len(now.pieces)))
    if index == len(before.pieces):
        return None
    one = before.pieces[index]
    if index == len(now.pieces):
        return index, Parting("", before=one.label)
    other, path = now.pieces[index], prompt.blocks[index].path
    if one.section == other.section == "tools":
        return index, Parting(path, _tools(before, now, one, other), None, one.label, other.label)
    if "tools" in (one.section, other.section):
        return index, Parting(path, "tool-set-changed", None, one.label, other.label)
    moved = _moved(before.pieces[index:], now.pieces[index:])
    if moved:
        return index, Parting(path, moved, None, one.label, other.label)
    if one.kind == other.kind == "image":
        return index, Parting(path, "image-reencoded")
    return index, _texts(one, other, path, _text(prompt.blocks[index]))


def _tools(before: Outline, now: Outline, one: Piece, other: Piece) -> str:
    names, others = ([piece.label for piece in each.pieces if piece.section == "tools"] for each in (before, now))
    if Counter(names) != Counter(others):
        return "tool-set-changed"
    if one.label != other.label:
        return "tool-order"
    return "json-key-order" if one.unordered == other.unordered else "tool-schema-drift"


def _moved(before: Sequence[Piece], now: Sequence[Piece]) -> str:
    """What became of the history: something was left out, or put in between, while later messages are the same."""
    one, other = before[0], now[0]
    if one.section != "messages" or other.section != "messages":
        return ""
    if other.content in {piece.content for piece in before[1:]}:
        return "history-dropped"
    if one.content in {piece.content for piece in now[1:]}:
        return "history-edited"
    return ""


def _texts(one: Piece, other: Piece, path: str, text: str) -> Parting:
    """Two versions of one block; `text` is the new one."""
    if one.lines == other.lines and one.lines:
        return Parting(path, "line-endings", None, one.label, other.label)
    if one.unordered == other.unordered != 0:
        return Parting(path, "json-key-order", None, one.label, other.label)
    if one.normal == other.normal:
        return Parting(path, "unicode-drift", None, one.label, other.label)
    if one.squeezed == other.squeezed:
        return Parting(path, "whitespace-drift", None, one.label, other.label)
    if not one.lines or not other.lines:
        return Parting(path, "", None, one.label, other.label)
    return _line_by_line(one, other, path, _lines(text))


def _line_by_line(one: Piece, other: Piece, path: str, lines: list[str]) -> Parting:
    """`lines` are those of the new text."""
    num, num_2 = len(one.lines), len(other.lines)
    changed = [i for i, same in enumerate(map(eq, one.lines, other.lines)) if not same]
    if not changed:
        line = min(num, num_2)
        grown = other.role == "user" and num_2 > num
        code, before = ("same-message-extended", "(end of the text)") if grown else ("", "")
        return Parting(path, code, _start(lines, line), before, texts.excerpt(lines[line], 0) if line < num_2 else "")
    line = changed[0]
    if num == num_2 and sorted(one.lines) == sorted(other.lines):
        return Parting(path, "few-shot-shuffle", _start(lines, line), _kept(one, line), texts.excerpt(lines[line], 0))
    code = ""
    if num == num_2 and len(changed) <= max(4, num // 4):
        found = [_cause(one, i, lines[i]) for i in changed]
        if all(found):
            code = found[0]
    if not code and other.section == "system" and _similar(one, other, num_same=min(num, num_2) - len(changed)):
        code = "system-changed"
    if line not in one.excerpts:
        return Parting(path, code, _start(lines, line), _kept(one, line), texts.excerpt(lines[line], 0))
    start, before = one.excerpts[line]
    inside = texts.first_offset(before, lines[line][start : start + EXCERPT])
    after = texts.excerpt(lines[line], start + inside)
    return Parting(path, code, _start(lines, line) + start + inside, texts.excerpt(before, inside), after)


def _similar(one: Piece, other: Piece, *, num_same: int) -> bool:
    """At least half of the lines are the same; `num_same` are, at the same place."""
    enough = -(-max(len(one.lines), len(other.lines)) // 2)
    return num_same >= enough or sum((Counter(one.lines) & Counter(other.lines)).values()) >= enough


def _cause(one: Piece, number: int, line: str) -> str:
    if number not in one.excerpts:
        return ""
    start, before = one.excerpts[number]
    codes = texts.causes(before, line[start : start + EXCERPT])
    return codes[0] if codes else ""


def _kept(piece: Piece, line: int) -> str:
    return piece.excerpts[line][1] if line in piece.excerpts else piece.label if line == 0 else ""


def _start(lines: list[str], number: int) -> int:
    """Characters before the line."""
    return sum(map(len, lines[:number])) + number


# -- pieces --------------------------------------------------------------------------------------------------------------


def _piece(block: Block) -> Piece:
    body = msgspec.json.decode(block.content)[1]
    text = _text_of(body)
    lines = _lines(text)
    encoded = text.encode()
    plain = not isinstance(body, dict) or "text" in body
    if block.section == "tools":
        label = body if isinstance(body, str) else str(body.get("name", body.get("type", "")))
    else:
        label = texts.excerpt(text, 0, _LABEL)
    return Piece(
        section=block.section,
        kind=block.kind,
        role=block.role,
        content=zlib.crc32(block.content),
        label=label,
        lines=array("I", map(zlib.crc32, _lines_of(encoded)) if len(lines) <= _MAX_LINES else ()),
        squeezed=zlib.crc32(encoded.translate(None, b" \t\r\n\v\f")),
        normal=zlib.crc32(encoded if text.isascii() else unicodedata.normalize("NFC", text).encode()),
        unordered=0 if plain and block.section != "tools" else _unordered(block.content),
        excerpts=_suspects(text, lines, block.section) if len(lines) <= _MAX_LINES and block.kind not in _OPAQUE else {},
    )


def _text(block: Block) -> str:
    return _text_of(msgspec.json.decode(block.content)[1])


def _text_of(body: Any) -> str:
    """Of a text block its text, of any other its compact JSON."""
    if isinstance(body, dict) and isinstance(body.get("text"), str) and body.get("type") == "text":
        return str(body["text"])
    return msgspec.json.encode(body).decode()


def _lines(text: str) -> list[str]:
    """Lines and sentences; behind every one but the last there is exactly one character that is no part of any."""
    return text.replace(". ", ".\n").split("\n")


def _lines_of(encoded: bytes) -> list[bytes]:
    """The same, whatever the line endings are."""
    return encoded.replace(b"\r\n", b"\n").replace(b". ", b".\n").split(b"\n")


def _unordered(content: bytes) -> int:
    return zlib.crc32(msgspec.json.encode(msgspec.json.decode(content), order="sorted"))


def _suspects(text: str, lines: list[str], section: Section) -> dict[int, tuple[int, str]]:
    """Excerpts of the lines that hold a date, an id, a longer number, or (in instructions) a field of a user."""
    found: dict[int, tuple[int, str]] = {}
    ends: list[int] = []
    for match in _SUSPECT.finditer(text):
        ends = ends or [end + number for number, end in enumerate(accumulate(map(len, lines)))]
        number = bisect_left(ends, match.start())
        if number not in found:
            line = lines[number]
            at = match.start() - (ends[number] - len(line))
            start = max(0, at - EXCERPT // 3) if len(line) > EXCERPT else 0
            found[number] = start, line[start : start + EXCERPT]
            if len(found) == _MAX_EXCERPTS:
                return found
    if section == "system":
        users = (number for number, line in enumerate(lines) if number not in found and _is_of_a_user(line))
        found |= {number: (0, lines[number][:EXCERPT]) for number in islice(users, _MAX_EXCERPTS - len(found))}
    return found


def _is_of_a_user(line: str) -> bool:
    """`User: Ada`, `locale = en`, an address."""
    end = line.find(":", 0, _LABEL)
    if end < 0:
        end = line.find("=", 0, _LABEL)
    return "@" in line or (end > 0 and not _WHO.isdisjoint(line[:end].lower().replace("_", " ").split()))
