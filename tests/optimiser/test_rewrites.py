"""Rewrites move and sort, and say so; they neither add nor drop a word."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.optimiser.traffic import M5, Json, body, says, text, user

from anaphora.optimiser.rewrites import looks_volatile, move_volatile_lines, sort_schema_keys, sort_tools


def tool(name: str, *keys: str, **more: Any) -> Json:
    return {"name": name, "input_schema": {"type": "object", "properties": {key: {} for key in keys}}, **more}


def test_tools_are_sorted_by_name_and_breakpoints_stay_in_their_places() -> None:
    request = body(user("?"), tools=[tool("b"), tool("a", **M5)])
    found, changes = sort_tools(request)
    assert [one["name"] for one in found["tools"]] == ["a", "b"]
    assert [("cache_control" in one) for one in found["tools"]] == [False, True]
    assert [(change.kind, change.text) for change in changes] == [("tools-sorted", "a, b")]
    assert sort_tools(found) == (found, [])


def test_keys_of_schemas_are_sorted_and_the_rest_of_a_tool_is_not() -> None:
    chat = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": {"y": 1, "b": 2}}}}]}
    found, changes = sort_schema_keys(chat)
    assert json.dumps(found["tools"][0]) == (
        '{"type": "function", "function": {"name": "f", "parameters": {"a": {"b": 2, "y": 1}, "z": 1}}}'
    )
    assert [change.kind for change in changes] == ["keys-sorted"]


def test_a_line_with_the_time_goes_behind_the_last_message() -> None:
    request = body(user("?"), system="Be kind.\nIt is 2026-11-22 10:30:00.\nBe brief.", cache_control={"type": "ephemeral"})
    found, changes = move_volatile_lines(request)
    assert found["system"] == "Be kind.\nBe brief."
    assert found["messages"][-1]["content"] == [text("?", **M5), text("It is 2026-11-22 10:30:00.")]
    assert "cache_control" not in found
    assert [change.kind for change in changes] == ["line-moved", "mark-moved"]


def test_in_openais_bodies_it_becomes_a_message_of_the_same_role() -> None:
    system = {"role": "developer", "content": "Be kind.\nRequest 3f2504e0-4f89-11d3-9a0c-0305e82c3301."}
    found, _ = move_volatile_lines({"messages": [system, user("?")]})
    assert found["messages"][-1] == {"role": "developer", "content": "Request 3f2504e0-4f89-11d3-9a0c-0305e82c3301."}


def test_nothing_is_moved_where_the_model_speaks_last_or_nothing_would_be_left() -> None:
    for request in (body(user("?"), says("So"), system="Rules.\n12:00:00"), body(user("?"), system="It is 12:00:00.")):
        assert move_volatile_lines(request) == (request, [])


LINES = st.sampled_from(
    ["Be kind.", "Be brief.", "It is 2026-11-22.", "At 10:30:00", "", "id 1700000000", "x" * 400 + " 2026-11-22"]
)
texts = st.lists(LINES, min_size=1, max_size=5).map("\n".join)
systems = texts | st.lists(texts, min_size=1, max_size=3).map(lambda many: [text(one) for one in many])
tools = st.lists(
    st.builds(tool, st.sampled_from("abcde"), st.sampled_from("xyz")), max_size=4, unique_by=lambda one: one["name"]
)


@given(systems, tools, texts, st.booleans())
def test_every_word_is_still_there_and_nothing_else(system: Any, given_tools: list[Json], last: str, automatic: bool) -> None:
    request = body(user(last), system=system, tools=given_tools, **(M5 if automatic else {}))
    before = copy.deepcopy(request)
    found, changes = request, []
    for rewrite in (sort_tools, sort_schema_keys, move_volatile_lines):
        found, more = rewrite(found)
        changes += more
    assert request == before
    assert _content(found) == _content(request)
    assert (json.dumps(found) == json.dumps(request)) == (not changes)
    moved = {change.text for change in changes if change.kind == "line-moved"}
    assert all(looks_volatile(line) for line in moved)


def _content(value: Any) -> Counter[str]:
    """All lines of texts, and all keys and values of everything else."""
    found: Counter[str] = Counter()
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("cache_control", "type", "role"):
                found += Counter([] if key in ("text", "content", "system") else [key]) + _content(item)
    elif isinstance(value, list):
        for item in value:
            found += _content(item)
    else:
        found += Counter(line for line in str(value).split("\n") if line)
    return found
