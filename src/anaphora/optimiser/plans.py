"""What is to be put into a body for its provider's cache to hit, and putting it there. Pure.

A plan only adds: marks behind blocks and fields at the top. What the client wrote stays as it is; the one change of shape is
that a string becomes a list with one text block where a mark must stand on it, which is the same request (R2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

import msgspec

from anaphora.prompt import TTL

Body = dict[str, Any]
Code = Literal[
    "marked",  # a breakpoint was put there
    "kept",  # the client's own breakpoint
    "reach",  # a breakpoint where an entry lies that the look-back of the others would miss
    "one-shot",  # nobody is likely to ask for it again
    "varying",  # another text with every request, so nothing behind it is worth keeping
    "too-short",  # below the model's minimum
    "no-slot",  # all breakpoints are taken
    "lifetime",  # the longer lifetime, or why not
    "explicit",  # nothing is written but what is marked
    "cache-key",  # a field or header that sends what belongs together to one place
    "dear",  # so long that every token costs more
    "retention",  # how long the provider may keep it
]


class Mark(msgspec.Struct, frozen=True):
    """A breakpoint behind a block."""

    path: str
    """As in `Block.path`."""
    ttl: TTL
    block: int
    """The block's place in the prompt."""


class Reason(msgspec.Struct, frozen=True, omit_defaults=True):
    """One decision, also one against doing something."""

    code: Code
    text: str
    path: str = ""
    tokens: int = 0
    """Expected saving, in tokens at the plain input price; below 0: what it would have cost."""
    usd: Decimal | None = None
    """The same in money; None: the price is not known."""


class Lane(msgspec.Struct, frozen=True):
    """Where a request's prefix is looked for, among several machines."""

    beginning: bytes
    conversation: bytes
    number: int


class Plan(msgspec.Struct, frozen=True, omit_defaults=True):
    marks: tuple[Mark, ...] = ()
    """The most important one first."""
    fields: dict[str, Any] = {}
    """At the top of the body; only such as the client did not give."""
    headers: dict[str, str] = {}
    reasons: tuple[Reason, ...] = ()
    max_marks: int | None = None
    """A body with more of them, the client's own included, is refused. None: it never is for that."""
    lane: Lane | None = None

    @property
    def empty(self) -> bool:
        return not (self.marks or self.fields or self.headers)


def apply(body: Mapping[str, Any], plan: Plan) -> Body:
    """`body` with the plan's marks and fields. `body` itself is not changed, and what need not be copied is shared."""
    out = dict(body)
    free = len(plan.marks) if plan.max_marks is None else plan.max_marks - _count(out)
    for mark in plan.marks[: max(0, free)]:
        _put(out, mark)
    for name, value in plan.fields.items():
        out.setdefault(name, value)
    return out


def _count(value: Any) -> int:
    """Marks in an Anthropic body, those on parts of a tool's result included. A tool's input may have a key of this name."""
    if not isinstance(value, dict):
        return 0
    blocks = [value, *_objects(value.get("tools")), *_objects(value.get("system"))]
    for message in _objects(value.get("messages")):
        for block in _objects(message.get("content")):
            blocks += [block, *(_objects(block.get("content")) if block.get("type") == "tool_result" else [])]
    return sum(block.get("cache_control") is not None for block in blocks)


def _objects(value: Any) -> list[Body]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


_STEP = re.compile(r"[^.\[\]]+")


def _put(body: Body, mark: Mark) -> None:
    """The mark, on copies of whatever holds its block."""
    steps: list[str | int] = [int(step) if step.isdigit() else step for step in _STEP.findall(mark.path)]
    holder: Any = body
    for step in steps[:-1]:
        holder[step] = holder[step].copy()
        holder = holder[step]
    block = holder[steps[-1]]
    anthropic = "[" not in mark.path
    key = "cache_control" if anthropic else "prompt_cache_breakpoint"
    if isinstance(block, str):
        kind = "input_text" if steps[0] == "input" else "text"
        holder[steps[-1]] = [{"type": kind, "text": block, key: _value(mark, anthropic=anthropic)}]
    else:
        holder[steps[-1]] = {**block, key: _value(mark, anthropic=anthropic)}


def _value(mark: Mark, *, anthropic: bool) -> Body:
    if not anthropic:
        return {"mode": "explicit", "ttl": mark.ttl}
    return {"type": "ephemeral"} if mark.ttl == "5m" else {"type": "ephemeral", "ttl": mark.ttl}
