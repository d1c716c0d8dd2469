"""Changes of a body that move or sort what is in it, so that prompts begin alike. Pure, each on its own, and only if wanted.

None of them adds, drops or changes a word: tools and keys change places, and lines move. What was done is returned as a list.
Orders can matter to a model, which is why nobody gets these by default.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from anaphora.optimiser.plans import Body

LONGEST_LINE = 300
"""Characters. A longer line is a paragraph; moving it could change what the prompt says."""

_VOLATILE = re.compile(
    r"\d{4}-\d{2}-\d{2}|\b\d{1,2}:\d{2}:\d{2}\b|\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"
    r"|\b[0-9a-f]{24,64}\b|\b1[0-9]{9}(?:[0-9]{3})?\b",
    re.IGNORECASE,
)
_MARK = "cache_control"


class Change(msgspec.Struct, frozen=True):
    kind: Literal["tools-sorted", "keys-sorted", "line-moved", "mark-moved"]
    path: str
    text: str = ""
    """The line, or the names in their new order."""


def looks_volatile(line: str) -> bool:
    """A date, a time, an id or a time stamp is in it."""
    return _VOLATILE.search(line) is not None


def sort_tools(body: Body) -> tuple[Body, list[Change]]:
    """Tools by name. Breakpoints stay at their places: they are about how much stands before them."""
    tools = body.get("tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return body, []
    ordered = sorted(tools, key=_name)
    if [_name(tool) for tool in ordered] == [_name(tool) for tool in tools]:
        return body, []
    placed = [_with_mark_of(before, tool) for tool, before in zip(ordered, tools, strict=True)]
    return {**body, "tools": placed}, [Change("tools-sorted", "tools", ", ".join(map(_name, ordered)))]


def sort_schema_keys(body: Body) -> tuple[Body, list[Change]]:
    """Keys of every tool's JSON schema in the order of the alphabet."""
    tools = body.get("tools")
    if not isinstance(tools, list):
        return body, []
    changes: list[Change] = []
    out = []
    for index, tool in enumerate(tools):
        new = _schema_sorted(tool)
        if msgspec.json.encode(new) != msgspec.json.encode(tool):
            changes.append(Change("keys-sorted", f"tools.{index}", _name(tool)))
        out.append(new)
    return ({**body, "tools": out} if changes else body), changes


def move_volatile_lines(body: Body, volatile: Callable[[str], bool] = looks_volatile) -> tuple[Body, list[Change]]:
    """Lines of the system prompt that change with every request go behind the last message. No block loses all its lines."""
    turns = body.get("input") if "input" in body else body.get("messages")
    anthropic = "system" in body  # only Anthropic's bodies keep the system prompt beside the messages
    if not isinstance(turns, list) or not turns or (anthropic and not _ends_with_user(turns)):
        return body, []
    out, changes, gone = copy.deepcopy(body), list[Change](), list[str]()
    for holder, key, path in _system_texts(out):
        lines = holder[key].split("\n")
        moved = [line for line in lines if 0 < len(line) <= LONGEST_LINE and volatile(line)]
        rest = [line for line in lines if line not in moved]
        if moved and any(line.strip() for line in rest):
            holder[key] = "\n".join(rest)
            gone += moved
            changes += [Change("line-moved", path, line) for line in moved]
    if not changes:
        return body, []
    text = "\n".join(gone)
    if anthropic:
        changes += _append(out, text)
    else:
        turns = out["input"] if "input" in out else out["messages"]
        role = next((turn["role"] for turn in turns if _is_system(turn)), "developer")
        turns.append({"role": role, "content": text})
    return out, changes


def _append(body: Body, text: str) -> list[Change]:
    """As a block of the last message. An automatic breakpoint becomes one on the block that was the last until now."""
    message, changes = body["messages"][-1], list[Change]()
    content = message["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    last = blocks[-1] if blocks else {}
    if body.get(_MARK) is not None and last.get("type") != "thinking" and last.get("text") != "":
        last.setdefault(_MARK, body.pop(_MARK))
        changes.append(Change("mark-moved", f"messages.{len(body['messages']) - 1}.content.{len(blocks) - 1}"))
    message["content"] = [*blocks, {"type": "text", "text": text}]
    return changes


def _system_texts(body: Body) -> list[tuple[Any, str, str]]:
    """Where the texts of the system prompt stand: holder, key and path."""
    found: list[tuple[Any, str, str]] = [
        (body, key, key) for key in ("system", "instructions") if isinstance(body.get(key), str)
    ]
    parts = [("system", body.get("system"))]
    turns = body.get("input") if isinstance(body.get("input"), list) else body.get("messages")
    for index, turn in enumerate(turns or []):
        if not _is_system(turn):
            break
        if isinstance(turn.get("content"), str):
            found.append((turn, "content", f"{index}.content"))
        parts.append((f"{index}.content", turn.get("content")))
    for path, content in parts:
        blocks = content if isinstance(content, list) else []
        texts = (isinstance(part, dict) and isinstance(part.get("text"), str) for part in blocks)
        found += [(part, "text", f"{path}.{i}") for i, (part, is_text) in enumerate(zip(blocks, texts, strict=True)) if is_text]
    return found


def _is_system(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") in ("system", "developer")


def _ends_with_user(turns: list[Any]) -> bool:
    last = turns[-1]
    return isinstance(last, dict) and last.get("role") == "user" and isinstance(last.get("content"), (str, list))


def _name(tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, dict) else None
    holder = function if isinstance(function, dict) else tool if isinstance(tool, dict) else {}
    return str(holder.get("name") or holder.get("type") or "")


def _schema_sorted(tool: Any) -> Any:
    if not isinstance(tool, dict):
        return tool
    out = dict(tool)
    for key in ("input_schema", "parameters"):
        if key in out:
            out[key] = _keys_sorted(out[key])
    if isinstance(out.get("function"), dict):
        out["function"] = _schema_sorted(out["function"])
    return out


def _with_mark_of(before: Body, tool: Body) -> Body:
    bare = {key: value for key, value in tool.items() if key != _MARK}
    return {**bare, _MARK: before[_MARK]} if _MARK in before else bare


def _keys_sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _keys_sorted(value[key]) for key in sorted(value)}
    return [_keys_sorted(item) for item in value] if isinstance(value, list) else value
