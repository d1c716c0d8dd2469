"""Outlines: the cause of a difference, told from digests and short excerpts of the earlier prompt."""

from __future__ import annotations

import unicodedata
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.breakpoints import chain
from anaphora.outline import EXCERPT, Outline, Parting, Piece, outline, part
from anaphora.profiles import find
from anaphora.prompt import Prompt
from anaphora.types import Tenant
from anaphora.wire.anthropic import Anthropic

RULES = "\n".join(f"- Rule {number}: keep the {number}th thing in order." for number in range(1, 40))


def prompt(system: Any = RULES, messages: Any = "hello", **more: Any) -> Prompt:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    body = {"model": "claude-opus-5", "max_tokens": 1, "system": system, "messages": messages, **more}
    return Anthropic().parse(msgspec.json.encode(body), tenant=Tenant("alice")).prompt


def outlined(one: Prompt, known: dict[bytes, Piece] | None = None) -> Outline:
    return outline(one, chain(one, find("claude-opus-5", "anthropic")), {} if known is None else known)


def parted(before: Prompt, now: Prompt) -> Parting | None:
    return part(outlined(before), outlined(now), now)


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "description": f"does {name}", "input_schema": {"type": "object", "properties": {}}, **more}


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("timestamp", {"system": f"Now: 2026-03-02T09:00:05Z\n{RULES}"}, {"system": f"Now: 2026-03-02T11:30:07Z\n{RULES}"}),
    (
        "uuid",
        {"system": f"{RULES}\nid 0b8f6c1e-1111-4a4a-9d9d-0123456789ab"},
        {"system": f"{RULES}\nid 7c2d9e4f-2222-4b4b-8e8e-ba9876543210"},
    ),
    ("request-id", {"system": f"trace req_9f8e7d6c5b4a\n{RULES}"}, {"system": f"trace req_1a2b3c4d5e6f\n{RULES}"}),
    ("user-field", {"system": f"{RULES}\nUser: Ada"}, {"system": f"{RULES}\nUser: Bob"}),
    ("line-endings", {"system": RULES}, {"system": RULES.replace("\n", "\r\n")}),
    ("whitespace-drift", {"system": RULES}, {"system": RULES.replace(" ", "  ")}),
    (
        "unicode-drift",
        {"system": RULES + " caf\u00e9"},
        {"system": unicodedata.normalize("NFD", RULES + " caf\u00e9")},
    ),
    ("few-shot-shuffle", {"system": RULES}, {"system": "\n".join(reversed(RULES.split("\n")))}),
    ("system-changed", {"system": RULES}, {"system": RULES.replace("Rule 7", "Law seven")}),
    ("tool-order", {"tools": [tool("a"), tool("b")]}, {"tools": [tool("b"), tool("a")]}),
    ("tool-set-changed", {"tools": [tool("a"), tool("b")]}, {"tools": [tool("a"), tool("c")]}),
    ("tool-set-changed", {}, {"tools": [tool("a")]}),
    ("tool-schema-drift", {"tools": [tool("a")]}, {"tools": [tool("a", description="does it")]}),
    (
        "json-key-order",
        {"tools": [tool("a", input_schema={"type": "object", "properties": {"x": {}, "y": {}}})]},
        {"tools": [tool("a", input_schema={"properties": {"y": {}, "x": {}}, "type": "object"})]},
    ),
    ("history-dropped", {"messages": turns("a", "b", "c", "d", "e")}, {"messages": turns("c", "d", "e", "f", "g")}),
    ("history-edited", {"messages": turns("a", "b", "c")}, {"messages": turns("x", "y", "a", "b", "c")}),
    ("same-message-extended", {"messages": "read this\nand that"}, {"messages": "read this\nand that\nand more"}),
    ("", {"messages": "hello"}, {"messages": "good bye"}),
]


@pytest.mark.parametrize(("code", "before", "after"), CHANGES)
def test_the_cause_is_the_linters(code: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    found = parted(prompt(**before), prompt(**after))
    assert found is not None
    assert found.code == code


def test_a_conversation_that_goes_on_parts_nowhere() -> None:
    assert parted(prompt(messages=turns("a")), prompt(messages=turns("a", "b", "c"))) is None


def test_place_and_excerpts_are_those_of_the_line_that_changed() -> None:
    text = f"Be kind.\n{RULES}\nNow: 2026-03-02T09:00:05Z"
    found = parted(prompt(text), prompt(text.replace("09:00", "10:00")))
    assert found is not None
    assert found.path == "system"
    assert found.offset == text.index("09:00")
    assert "09:00:05Z" in found.before
    assert "10:00:05Z" in found.after
    assert found.share == pytest.approx(found.offset / len(text))


def test_pieces_of_a_shared_prefix_are_made_once() -> None:
    known: dict[bytes, Piece] = {}
    one, other = outlined(prompt(messages="a"), known), outlined(prompt(messages="b"), known)
    assert one.pieces[0] is other.pieces[0]
    assert one.pieces[1] is not other.pieces[1]


@given(st.text(min_size=2_000, max_size=4_000), st.text(max_size=300))
def test_no_more_than_short_excerpts_of_a_text_are_kept(system: str, message: str) -> None:
    for piece in outlined(prompt(system, message or "x")).pieces:
        assert all(len(excerpt) <= EXCERPT for _, excerpt in piece.excerpts.values())
        assert len(piece.label) <= 60
        assert len(piece.excerpts) <= 8


@given(st.lists(st.text(max_size=80), min_size=1, max_size=6), st.lists(st.text(max_size=80), min_size=1, max_size=6))
def test_any_two_prompts_can_be_compared(one: list[str], other: list[str]) -> None:
    before, now = (prompt(texts[0], turns(*(text or "x" for text in texts))) for texts in (one, other))
    found = parted(before, now)
    assert (found is None) == (outlined(now).pieces[: len(before.blocks)] == outlined(before).pieces)
    if found is not None and found.offset is not None:
        assert 0 <= found.share <= 1
