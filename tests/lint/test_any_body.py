"""The linter reads what people really sent: no body, however odd, makes it fail."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from anaphora.lint import lint, read
from anaphora.lint.repair import line_of, repair
from anaphora.lint.sarif import sarif

NAMES = st.sampled_from(
    ["type", "text", "role", "content", "name", "function", "input", "cache_control", "ttl", "source", "tool_calls", "id"]
)
WORDS = st.sampled_from(
    ["", "user", "assistant", "system", "tool", "text", "tool_use", "tool_result", "image", "ephemeral", "1h"]
)
LEAVES = st.none() | st.booleans() | st.integers(-5, 5) | WORDS | st.text(max_size=8)
JSON: st.SearchStrategy[Any] = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)
FIELDS = [
    "model",
    "system",
    "tools",
    "tool_choice",
    "thinking",
    "output_config",
    "cache_control",
    "prompt_cache_options",
    "text",
]
BODIES = st.fixed_dictionaries(
    {"messages": st.lists(JSON, max_size=4)}, optional=dict.fromkeys(FIELDS, JSON)
) | st.fixed_dictionaries({"model": JSON, "input": JSON}, optional=dict.fromkeys(FIELDS[1:], JSON))


@settings(max_examples=60, deadline=None)
@given(st.lists(BODIES, min_size=1, max_size=4))
def test_no_body_makes_the_linter_fail(bodies: list[Any]) -> None:
    lines = [json.dumps({"request": body, "session": "s"}) for body in bodies]
    recorded = list(read("f", lines))
    report = lint(recorded)
    assert report.num_requests == len(bodies)
    json.dumps(sarif(report))
    given_bodies = copy.deepcopy([one.body for one in recorded])
    repaired, gain = repair(recorded)
    assert [one.body for one in recorded] == given_bodies
    assert gain.before.total >= 0
    assert all(json.loads(line_of(one)) for one in repaired)


@settings(max_examples=20, deadline=None)
@given(BODIES)
def test_a_request_sent_again_as_it_was_breaks_nothing(body: Any) -> None:
    findings = lint(read("f", [json.dumps(body)] * 3)).findings
    assert not {finding.code for finding in findings} - {"no-breakpoint", "too-many-marks", "ttl-order", "prefix-too-short"}
