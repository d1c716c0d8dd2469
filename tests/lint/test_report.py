"""What a finding says, and the report as SARIF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.lint import test_planted as planted
from tests.lint.sample import bodies, report, session

from anaphora import profiles
from anaphora.lint import RULES
from anaphora.lint.sarif import sarif


def test_a_finding_names_the_character_and_shows_both_versions() -> None:
    (finding,) = report(planted.timestamp()).findings
    text = bodies(planted.timestamp())[1]["system"][0]["text"]
    assert finding.offset is not None
    assert text[finding.offset - 15 : finding.offset] == "2026-03-02T09:0"
    assert text[finding.offset] == "1"
    assert "09:00:05Z" in finding.before
    assert "09:01:05Z" in finding.after
    assert (finding.line, finding.against_line, finding.occurrences) == (2, 1, 7)


def test_the_loss_is_that_of_reading_against_writing_again() -> None:
    (finding,) = report(planted.timestamp()).findings
    profile = profiles.find("claude-opus-5-5", "anthropic")
    assert profile.price is not None
    per_token = float(profile.price.input * (profile.rates.write["5m"] - profile.rates.read)) / 1e6
    assert finding.lost_usd == pytest.approx(finding.lost_tokens * per_token)


def test_the_loss_of_an_early_break_is_most_of_every_prompt() -> None:
    (finding,) = report(planted.timestamp()).findings
    later = sum(len(json.dumps([body["system"], body["messages"]])) // 4 for body in bodies(session())[:-1])
    assert 0.6 * later < finding.lost_tokens < later


def test_a_model_without_a_price_is_reported_without_money() -> None:
    lines = planted.timestamp()
    for body in bodies(lines):
        body["model"] = "smollm2"
    (finding,) = report(lines).findings
    assert finding.lost_usd is None
    assert finding.lost_tokens > 0


def test_a_local_model_can_be_read_like_another_one() -> None:
    lines = planted.no_marks()
    for body in bodies(lines):
        body["model"] = "local"
    (finding,) = report(lines, like="claude-opus-5-5").findings
    assert (finding.code, finding.lost_usd is not None) == ("no-breakpoint", True)


def test_breaks_that_lose_little_are_passed_over() -> None:
    assert report(planted.timestamp(), min_lost=1_000_000).findings == ()


def test_the_same_cause_between_many_sessions_is_one_finding() -> None:
    lines = planted.parallel()
    (finding,) = report(lines).findings
    assert finding.occurrences == 3


def test_sarif_has_the_structure_that_hosts_read() -> None:
    made: Any = sarif(report([*planted.timestamp()], file="logs/a b.jsonl"))
    assert made["version"] == "2.1.0"
    (run,) = made["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == list(RULES)
    assert all(rule["shortDescription"]["text"] and rule["help"]["text"] for rule in rules)
    (result,) = run["results"]
    assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == "timestamp"
    assert result["level"] in ("none", "note", "warning", "error")
    (place,) = result["locations"]
    assert place["physicalLocation"]["artifactLocation"]["uri"] == "logs/a%20b.jsonl"
    assert place["physicalLocation"]["region"]["startLine"] == 2
    assert result["relatedLocations"][0]["physicalLocation"]["region"]["startLine"] == 1
    json.dumps(made)


def test_every_code_is_documented_with_its_fix() -> None:
    page = (Path(__file__).parents[2] / "docs" / "linting.md").read_text("utf-8")
    assert [code for code, rule in RULES.items() if f"| `{code}` |" not in page or rule.fix not in page] == []
