"""`serve`, `chat` and `stats` together: a real server process, and the commands that talk to it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from anaphora.cli import main

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the echo engine on a free port; stopped as by Ctrl-C, which must be a clean end."""
    folder = tmp_path_factory.mktemp("serve")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ANAPHORA_")}
    environ["ANAPHORA_CACHE_ENABLED"] = "true"
    command = [sys.executable, "-m", "anaphora", "serve", "--engine", "echo", "--port", "0", "--cache-dir", str(folder)]
    with subprocess.Popen(command, cwd=folder, env=environ, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            first = process.stderr.readline()
            assert "listening on http://" in first, first + process.stderr.read()
            address = first.split()[-1]
            # The port is open before the server answers on it: this waits until it does.
            assert httpx2.get(f"{address}/ready", timeout=PATIENCE_S).is_success
            yield address
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode in {0, 130}
    assert "Traceback" not in rest


def test_a_piped_question_is_answered_on_standard_output(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("compute once\n"))
    assert main(["chat", "--url", url]) == 0
    said = capsys.readouterr()
    assert "compute once" in said.out
    assert "first token" in said.err
    assert "cache: fwd=miss" in said.err


def test_the_same_question_again_is_shown_as_a_hit(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("reuse everywhere"))
        assert main(["chat", "--url", url, "--temperature", "0"]) == 0
        answers.append(capsys.readouterr())
    assert answers[0].out == answers[1].out
    assert "cache: hit" in answers[1].err


def test_a_conversation_goes_on_until_quit(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["first words", "", "second words", "/reset", "third words", "/quit"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert main(["chat", "--url", url, "--system", "Be brief."]) == 0
    said = capsys.readouterr().out
    assert said.count("first token") == 3
    assert "third words" in said


def test_a_conversation_survives_a_question_that_fails(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["too long " * 20_000, "short", "/quit"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert main(["chat", "--url", url]) == 0
    said = capsys.readouterr().out
    assert "the server answered 400" in said
    assert said.count("first token") == 1


def test_an_unknown_model_is_said_in_the_servers_words(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert main(["chat", "--url", url, "--model", "nonesuch"]) == 1
    assert "the server answered 404: The model 'nonesuch' does not exist" in capsys.readouterr().err


def test_stats_are_a_table_or_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--url", url]) == 0
    table = capsys.readouterr().out
    assert main(["stats", "--url", url, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tenant"] == "local"
    assert "answers.num_requests" in table


def test_prompts_of_a_file_are_warmed_and_refusals_are_named(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    turn = [{"role": "user", "content": "warm me"}]
    bad = [{"role": "nobody", "content": "x"}]
    lines = [{"model": "echo", "messages": turn}, {"model": "claude-x", "max_tokens": 5, "messages": turn}]
    file.write_text("\n".join(json.dumps(line) for line in [*lines, {"model": "echo", "messages": bad}]))
    assert main(["kv", "warm", str(file), "--model", "echo", "--url", url, "--json"]) == 1
    said = capsys.readouterr()
    shown = json.loads(said.out)
    assert (shown["requests"], shown["refused"]) == (2, 1)
    assert shown["computed_tokens"] > 0
    assert f"{file}:3: the server answered 400" in said.err
    assert main(["kv", "pin", str(file), "--for", "45m", "--model", "echo", "--url", url]) == 1
    assert "2 prompts" in capsys.readouterr().out
