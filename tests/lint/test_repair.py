"""`--fix`: what is repaired, that nothing else is touched, and that the gain is real."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.lint import test_planted as planted
from tests.lint.sample import Line, chat, session

from anaphora.lint import lint, read
from anaphora.lint.repair import Gain, line_of, repair


def repaired(lines: list[Line]) -> tuple[list[Line], Gain]:
    recorded = list(read("f", map(json.dumps, lines)))
    given = copy.deepcopy([one.body for one in recorded])
    result, gain = repair(recorded)
    assert [one.body for one in recorded] == given, "the input was changed"
    return [json.loads(line_of(one)) for one in result], gain


@pytest.mark.parametrize(
    "plant",
    [
        planted.timestamp,
        planted.uuid,
        planted.counter,
        planted.tool_order,
        planted.tool_keys,
        planted.call_keys,
        planted.line_endings,
        planted.unicode_form,
        planted.no_marks,
        planted.chat_timestamp,
        planted.chat_argument_keys,
    ],
    ids=lambda plant: plant.__name__,
)
def test_a_repair_leaves_no_finding_and_reads_as_much_as_the_clean_session(plant: Callable[[], list[Line]]) -> None:
    clean = chat() if plant.__name__.startswith("chat") else session()
    _, ideal = repaired(clean)
    lines, gain = repaired(plant())
    assert gain.remaining == 0
    assert not lint(read("f", map(json.dumps, lines))).findings
    assert gain.after.read > gain.before.read
    assert gain.after.usd is not None
    assert gain.before.usd is not None
    assert gain.after.usd < gain.before.usd
    assert gain.after.read >= 0.97 * ideal.before.read


def test_a_clean_session_is_written_as_it_was() -> None:
    lines, gain = repaired(session())
    assert lines == session()
    assert gain.repairs == {}
    assert gain.before == gain.after


def test_a_changing_line_goes_behind_the_last_breakpoint() -> None:
    lines, _ = repaired(planted.timestamp())
    content: list[dict[str, Any]] = lines[3]["request"]["messages"][-1]["content"]
    assert content[-1] == {"type": "text", "text": "Current time: 2026-03-02T09:03:05Z"}
    assert "cache_control" in content[-2]
    assert "Current time" not in lines[3]["request"]["system"][0]["text"]


def test_an_automatic_breakpoint_becomes_an_explicit_one_before_the_moved_line() -> None:
    lines = planted.timestamp()
    for line in lines:
        line["request"]["messages"][-1]["content"][-1].pop("cache_control")
        line["request"]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
        line["request"]["system"][0]["cache_control"]["ttl"] = "1h"
    fixed, gain = repaired(lines)
    assert "cache_control" not in fixed[3]["request"]
    assert fixed[3]["request"]["messages"][-1]["content"][-2]["cache_control"] == {"type": "ephemeral", "ttl": "1h"}
    assert gain.after.read > 0.5 * gain.after.total


def test_what_is_not_safe_is_left_alone() -> None:
    for plant in (planted.tool_schema, planted.edited_history, planted.user_between_sessions, planted.edited_system):
        given = plant()
        lines, gain = repaired(given)
        assert lines == given
        assert gain.remaining == 1


def test_a_body_recorded_as_text_stays_text() -> None:
    lines = [{**line, "request": json.dumps(line["request"])} for line in planted.tool_order()]
    fixed, gain = repaired(lines)
    assert gain.repairs == {"tool-order": 6}
    assert all(isinstance(line["request"], str) for line in fixed)
