"""`anaphora lint` as people run it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from tests.lint import test_planted as planted
from tests.lint.sample import SESSION, Line

from anaphora.cli import main


def written(path: Path, lines: list[Line]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def test_a_clean_file_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(SESSION)]) == 0
    assert capsys.readouterr().out.startswith("no findings in 8 requests in 1 session.")


def test_a_finding_exits_with_1_and_names_place_loss_and_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "a.jsonl", planted.timestamp())
    assert main(["lint", str(file)]) == 1
    shown = capsys.readouterr().out
    assert f"{file}:2: warning: timestamp:" in shown
    for text in ("system.0.text, character", "before", "after", "tokens, $", "in 7 requests", "fix  "):
        assert text in shown


def test_fail_on_error_lets_warnings_pass_but_not_errors(tmp_path: Path) -> None:
    assert main(["lint", "--fail-on", "error", str(written(tmp_path / "a.jsonl", planted.timestamp()))]) == 0
    assert main(["lint", "--fail-on", "error", str(written(tmp_path / "b.jsonl", planted.five_marks()))]) == 1


def test_directories_are_read_and_their_files_are_sessions_of_their_own(tmp_path: Path) -> None:
    written(tmp_path / "logs" / "deep" / "a.jsonl", planted.timestamp())
    written(tmp_path / "logs" / "b.ndjson", [])
    (tmp_path / "logs" / "notes.txt").write_text("no JSON")
    assert main(["lint", str(tmp_path / "logs")]) == 1


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{json.dumps(line)}\n" for line in planted.uuid())))
    assert main(["lint", "-", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"][0]["file"] == "<stdin>"
    assert report["findings"][0]["code"] == "uuid"
    assert report["tokens_counted"].startswith("4 bytes")


def test_sarif_is_printed_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "--sarif", str(written(tmp_path / "a.jsonl", planted.uuid()))]) == 1
    assert json.loads(capsys.readouterr().out)["runs"][0]["results"][0]["ruleId"] == "uuid"


def test_unusable_input_exits_with_2_and_names_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"messages": []}\n{"messages": [}\n')
    assert main(["lint", str(file)]) == 2
    assert f"{file}:2:15: not JSON" in capsys.readouterr().err
    file.write_bytes(b'{"messages": ["\xff"]}\n')
    assert main(["lint", str(file)]) == 2
    assert main(["lint", str(tmp_path / "missing.jsonl")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["lint", str(tmp_path / "empty")]) == 2
    assert main(["lint", "--like", "nothing-known", str(SESSION)]) == 2


def test_fix_writes_a_copy_that_lints_clean_and_tells_the_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = written(tmp_path / "a.jsonl", planted.timestamp()), tmp_path / "out" / "a.jsonl"
    before = file.read_bytes()
    assert main(["lint", str(file), "--fix", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "timestamp in 8" in shown
    assert "findings that remain: 0" in shown
    assert main(["lint", str(out)]) == 0
    assert file.read_bytes() == before


def test_fix_of_several_files_writes_a_directory(tmp_path: Path) -> None:
    files = [written(tmp_path / name, planted.tool_order()) for name in ("a.jsonl", "b.jsonl")]
    assert main(["lint", *map(str, files), "--fix", str(tmp_path / "out"), "--json"]) == 1
    assert main(["lint", str(tmp_path / "out")]) == 0


def test_fix_never_writes_over_its_input(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", planted.tool_order())
    before = file.read_bytes()
    assert main(["lint", str(file), "--fix", str(file)]) == 2
    assert file.read_bytes() == before
