from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from anaphora.cli import main
from anaphora.routing import traces


def test_a_small_load_is_replayed_without_any_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("ANAPHORA_DATA", raising=False)
    file = tmp_path / "figures.json"
    command = ["bench", "routing", "--replicas", "2", "--loads", "0.5", "--strategies", "expected,oracle", "--requests", "40"]
    assert main([*command, "--json", "--output", str(file)]) == 0
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert figures == json.loads(file.read_text())
    assert "skipped" in said.err
    (trace,) = figures["traces"]
    assert (trace["trace"], trace["num_requests"]) == ("generated", 40)
    assert [row["strategy"] for row in trace["rows"]] == ["expected", "oracle"]
    assert all(0 <= row["hit_rate"] <= 1 and row["first_p50_s"] <= row["first_p99_s"] for row in trace["rows"])


def test_several_draws_are_told_together_too(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "routing", "--trace", "generated", "--replicas", "2", "--loads", "0.5", "--requests", "40"]
    assert main([*command, "--strategies", "expected,prefix,usage", "--seeds", "1,2,3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [trace["seed"] for trace in figures["traces"]] == [1, 2, 3]
    strategies = ("expected", "prefix", "usage")
    assert [(one["strategy"], one["num_draws"]) for one in figures["spreads"]] == [(name, 3) for name in strategies]
    assert main([*command, "--strategies", "expected,prefix", "--seeds", "1,2,3"]) == 0
    assert "Over all draws" in capsys.readouterr().out


def test_sessions_are_two_for_each_replica_and_have_no_load(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "routing", "--trace", "sessions", "--replicas", "2", "--strategies", "expected,prefix"]
    assert main([*command, "--token-s", "5e-3", "--json"]) == 0
    (trace,) = json.loads(capsys.readouterr().out)["traces"]
    assert (trace["num_requests"], trace["saturation_per_s"]) == (16, None)
    assert [row["load"] for row in trace["rows"]] == [None, None]
    assert main([*command, "--seeds", "1,2,3"]) == 0
    assert "Over all draws" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        ["--loads", "much"],
        ["--loads", "0"],
        ["--strategies", "guessing"],
        ["--trace", "mooncake"],
        ["--trace", "mooncake", "--seeds", "1"],
        ["--capacity", "-1"],
    ],
)
def test_what_cannot_be_run_is_said(
    wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ANAPHORA_DATA", raising=False)
    assert main(["bench", "routing", *wrong]) == 2
    assert "anaphora: error: " in capsys.readouterr().err


def test_traces_are_read_with_full_blocks_only_and_sessions_apart(tmp_path: Path) -> None:
    (tmp_path / "mooncake").mkdir()
    with gzip.open(tmp_path / "mooncake" / "conversation_first6015.jsonl.gz", "wt") as lines:
        row = {"timestamp": 3000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 5, 6]}
        lines.write(json.dumps(row) + "\n")
    (arrival,) = traces.mooncake(tmp_path)
    assert (arrival.at_s, arrival.output_tokens) == (3.0, 7)
    assert (len(arrival.question.blocks), arrival.question.ends, arrival.question.num_tokens) == (2, (512, 1024), 1100)

    (tmp_path / "kv-cache-tester").mkdir()
    with tarfile.open(tmp_path / "kv-cache-tester" / "claude_code_traces_mod8_1.tar.gz", "w:gz") as archive:
        for name in ("one", "two"):
            row = {"t": 5.0, "in": 1000, "out": 3, "hash_ids": list(range(16))}
            inner = {"requests": [{**row, "t": 6.0}]}
            requests = [row, inner, {**row, "in": traces.MAX_TOKENS + 1}]
            content = json.dumps({"id": name, "requests": requests}).encode()
            about = tarfile.TarInfo(f"{name}.json")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    arrivals = traces.claude_code(tmp_path)
    assert [one.at_s for one in arrivals] == [5.0, 6.0, 125.0, 126.0]
    assert arrivals[0].question == arrivals[1].question
    assert not set(arrivals[0].question.blocks) & set(arrivals[2].question.blocks)
    assert arrivals[0].question.ends == (512,)
    drawn = traces.claude_code(tmp_path, seed=1)
    assert {one.question.blocks for one in drawn} == {one.question.blocks for one in arrivals}
    assert drawn == traces.claude_code(tmp_path, seed=1) != traces.claude_code(tmp_path, seed=2)
    for number in range(2):  # one session each two minutes, begun at some moment of them
        first, second = drawn[2 * number : 2 * number + 2]
        assert 120 * number <= first.at_s - 5.0 <= 120 * (number + 1)
        assert second.at_s == pytest.approx(first.at_s + 1.0)
