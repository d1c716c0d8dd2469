"""A repaired copy of recorded requests, and what it would have saved.

Only what cannot change an answer for the worse is repaired: the same tools in their first order, the same JSON in its first
order of keys, the same text in its first spelling, a changing line of the system prompt at the end of the prompt, and
breakpoints where there were none. Everything else is for people to decide.
"""

from __future__ import annotations

import copy
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence

import msgspec

from anaphora.lint import texts
from anaphora.lint.layout import MARKS, Layout, Piece, lay_out
from anaphora.lint.linting import Options, lint
from anaphora.lint.replay import Account, replay
from anaphora.lint.requests import Recorded
from anaphora.lint.sessions import group
from anaphora.lint.values import Json, Object, Place, at, compact, mapping, objects, parsed, string

MOVABLE = frozenset({"timestamp", "uuid", "request-id", "volatile-value"})
LONGEST_LINE = 300
"""Characters. A longer line is a paragraph; moving it could change what the prompt says."""


class Gain(msgspec.Struct, frozen=True):
    """Both versions charged by the same rules."""

    repairs: dict[str, int]
    """Requests changed, by the code of the finding that the change mends."""
    before: Account
    after: Account
    remaining: int
    """Findings in the repaired copy."""

    def lines(self) -> list[str]:
        """The gain for people to read."""
        done = ", ".join(f"{code} in {num}" for code, num in self.repairs.items()) or "nothing that is safe to repair"
        rows = [f"repaired: {done}", f"replayed: {_line(self.before)}", f"repaired: {_line(self.after)}"]
        return [*rows, f"findings that remain: {self.remaining}"]


def repair(recorded: Sequence[Recorded], options: Options | None = None) -> tuple[list[Recorded], Gain]:
    """The same requests in the same order, repaired, with the gain. What was given is not changed."""
    options = options or Options()
    repairs: Counter[str] = Counter()
    codes = {finding.code for finding in lint(recorded, options).findings}
    copies = {id(one): copy.deepcopy(one.body) for one in recorded}
    for session in group([lay_out(one) for one in recorded]):
        members = session.layouts
        bodies = [copies[id(layout.recorded)] for layout in members]
        _like_first(members, bodies, repairs)
        moved = _move_lines([_again(layout, body) for layout, body in zip(members, bodies, strict=True)], bodies, repairs)
        if "no-breakpoint" in codes and not any(_marked(layout) for layout in members):
            for index, (layout, body) in enumerate(zip(members, bodies, strict=True)):
                if layout.anthropic and _add_marks(body, behind=1 if index in moved else 0):
                    repairs["no-breakpoint"] += 1
    repaired = [_with_body(one, copies[id(one)]) for one in recorded]
    remaining = len(lint(repaired, options).findings)
    gain = Gain(dict(repairs), replay(recorded, options.like), replay(repaired, options.like), remaining)
    return repaired, gain


def line_of(recorded: Recorded) -> str:
    """The request as a line of JSON, in the envelope it came in."""
    if recorded.envelope is None:
        return json.dumps(recorded.body, ensure_ascii=False)
    envelope = copy.deepcopy(recorded.envelope)
    holder = at(envelope, recorded.place[:-1])
    body: Json = json.dumps(recorded.body, ensure_ascii=False) if recorded.encoded else recorded.body
    mapping(holder)[str(recorded.place[-1])] = body
    return json.dumps(envelope, ensure_ascii=False)


# -- the first form seen -----------------------------------------------------------------------------------------------


def _like_first(members: Sequence[Layout], bodies: Sequence[Object], repairs: Counter[str]) -> None:
    """Tools, objects and texts that were seen before in another order or spelling get their first one."""
    first_tools: list[str] = []
    first_objects: dict[str, Json] = {}
    first_texts: dict[tuple[Place, str], str] = {}
    for layout, body in zip(members, bodies, strict=True):
        done: set[str] = set()
        for piece in layout.pieces:
            changed = _object_like_first(piece, body, first_objects) or _text_like_first(piece, body, first_texts)
            done |= {changed} if changed else set()
        if _tools_like_first(body, first_tools):
            done.add("tool-order")
        repairs.update(done)


def _object_like_first(piece: Piece, body: Object, first: dict[str, Json]) -> str | None:
    value = at(body, piece.place)
    if piece.kind not in ("tool", "tool_use") or not isinstance(value, dict):
        return None
    bare = {name: item for name, item in value.items() if name not in MARKS}
    known = mapping(first.setdefault(json.dumps(_unfolded(bare), sort_keys=True), bare))
    if compact(known) == compact(bare):
        return None
    marks = {name: item for name, item in value.items() if name in MARKS}
    _put(body, piece.place, {**copy.deepcopy(known), **marks})
    return "json-key-order"


def _unfolded(value: Json) -> Json:
    """With strings that hold JSON (the arguments of a call) read, so that order does not matter in them either."""
    if isinstance(value, dict):
        return {key: _unfolded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unfolded(item) for item in value]
    found = parsed(value) if isinstance(value, str) else None
    return value if found is None else found


def _text_like_first(piece: Piece, body: Object, first: dict[tuple[Place, str], str]) -> str | None:
    """Only text at the same place: the same words elsewhere may be meant to be spelt otherwise."""
    if piece.text is None:
        return None
    found = parsed(piece.text)
    normal = json.dumps(found, sort_keys=True) if found is not None else _normal(piece.text)
    known = first.setdefault((piece.place, normal), piece.text)
    if known == piece.text:
        return None
    _put(body, piece.text_place, known)
    return next(iter(texts.causes(known, piece.text)), "whitespace-drift")


def _normal(text: str) -> str:
    lines = unicodedata.normalize("NFC", text).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip()


def _tools_like_first(body: Object, first: list[str]) -> bool:
    tools = body.get("tools")
    if not isinstance(tools, list):
        return False
    names = [_tool_name(mapping(tool)) for tool in tools]
    first += [name for name in names if name not in first]
    order = sorted(range(len(tools)), key=lambda index: first.index(names[index]))
    if order == list(range(len(tools))):
        return False
    marks = [mapping(tool).pop("cache_control", None) for tool in tools]
    ordered = [tools[index] for index in order]
    body["tools"] = ordered
    for tool, mark in zip(ordered, marks, strict=True):
        # A breakpoint belongs to the position, not to the tool that happened to stand there.
        if mark is not None and isinstance(tool, dict):
            tool["cache_control"] = mark
    return True


def _tool_name(tool: Object) -> str:
    return string(tool.get("name")) or string(mapping(tool.get("function")).get("name")) or string(tool.get("type"))


# -- volatile lines ----------------------------------------------------------------------------------------------------


def _move_lines(members: Sequence[Layout], bodies: Sequence[Object], repairs: Counter[str]) -> set[int]:
    """Lines of the system prompt that change from request to request go behind the last breakpoint. Which requests changed."""
    places = {piece.text_place for layout in members for piece in layout.pieces if piece.section == "system" and piece.text}
    removed: dict[int, list[str]] = {}
    for place in sorted(places, key=str):
        versions = [at(body, place) for body in bodies]
        lines = [version.split("\n") for version in versions if isinstance(version, str)]
        if len(lines) != len(bodies) or len({len(one) for one in lines}) != 1:
            continue
        volatile = {index: code for index in range(len(lines[0])) if (code := _volatile([one[index] for one in lines]))}
        if not volatile or len(volatile) == len(lines[0]):
            continue
        for number, (body, one) in enumerate(zip(bodies, lines, strict=True)):
            if not _can_append(body):
                continue
            _put(body, place, "\n".join(line for index, line in enumerate(one) if index not in volatile))
            removed.setdefault(number, []).extend(one[index] for index in volatile)
            repairs.update(set(volatile.values()))
    for number, gone in removed.items():
        _append(bodies[number], "\n".join(gone))
    return set(removed)


def _volatile(versions: Sequence[str]) -> str | None:
    """The code of what changes in one line over the session; None where it does not, or is no mere value."""
    if len(set(versions)) == 1 or max(map(len, versions)) > LONGEST_LINE:
        return None
    found = [texts.causes(versions[0], other) for other in versions if other != versions[0]]
    if not all(codes and MOVABLE.issuperset(codes) for codes in found):
        return None
    return found[0][0]


def _can_append(body: Object) -> bool:
    if isinstance(body.get("input"), list):
        return True
    messages = objects(body.get("messages"))
    if not messages:
        return False
    return not _anthropic_shape(body) or messages[-1].get("role") == "user"


def _append(body: Object, text: str) -> None:
    """Behind everything that is stable: an unmarked block of the last user message, or a developer's message of its own."""
    turns = body.get("input") if isinstance(body.get("input"), list) else body.get("messages")
    if not isinstance(turns, list):
        return
    if not _anthropic_shape(body):
        role = next(
            (string(turn.get("role")) for turn in objects(turns) if turn.get("role") in ("system", "developer")), "system"
        )
        turns.append({"role": role, "content": text})
        return
    content = _blocks(mapping(turns[-1]))
    automatic = body.pop("cache_control", None)
    if automatic is not None and content and "cache_control" not in mapping(content[-1]):
        mapping(content[-1])["cache_control"] = automatic
    content.append({"type": "text", "text": text})


def _anthropic_shape(body: Object) -> bool:
    """Told by what `lay_out` read: only Anthropic's bodies keep the system prompt beside the messages."""
    return "system" in body


# -- breakpoints -------------------------------------------------------------------------------------------------------


def _add_marks(body: Object, behind: int) -> bool:
    """On the last system block (else the last tool) and on the last block of the last message but `behind` moved ones."""
    mark: Json = {"type": "ephemeral"}
    if isinstance(body.get("system"), str) and body["system"]:
        body["system"] = [{"type": "text", "text": body["system"]}]
    heads = objects(body.get("system")) or objects(body.get("tools"))
    if heads:
        heads[-1]["cache_control"] = mark
    messages = objects(body.get("messages"))
    if messages:
        content = [
            block for block in objects(_blocks(messages[-1])) if block.get("type") != "thinking" and block.get("text") != ""
        ]
        if len(content) > behind:
            content[len(content) - 1 - behind]["cache_control"] = mark
    return bool(heads or messages)


def _blocks(message: Object) -> list[Json]:
    """The message's content as a list of blocks, changed in place where it was a string (which is the same request, R2)."""
    content = message.get("content")
    if isinstance(content, list):
        return content
    blocks: list[Json] = [{"type": "text", "text": content}]
    message["content"] = blocks
    return blocks


# -- small things ------------------------------------------------------------------------------------------------------


def _marked(layout: Layout) -> bool:
    return layout.automatic is not None or any(piece.mark is not None for piece in layout.pieces)


def _again(layout: Layout, body: Object) -> Layout:
    return lay_out(_with_body(layout.recorded, body))


def _with_body(recorded: Recorded, body: Object) -> Recorded:
    return msgspec.structs.replace(recorded, body=body)


def _put(body: Object, place: Place, value: Json) -> None:
    holder, last = at(body, place[:-1]), place[-1]
    match holder, last:
        case dict(), str():
            holder[last] = value
        case list(), int():
            holder[last] = value


def _line(account: Account) -> str:
    money = f", ${account.usd:.4f}" if account.usd is not None else ", price not known"
    share = account.read / account.total if account.total else 0.0
    read = f"{account.read:,} of {account.total:,} prompt tokens read from the cache ({share:.0%})"
    return f"{read}, {account.written:,} written{money}"
