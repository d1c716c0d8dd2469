"""The demo, with real servers: over the real model where there is one, and over one that keeps no promise about KV."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anaphora.cli import main
from anaphora.cli.demo import DOCUMENT


@pytest.fixture(autouse=True)
def _an_empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ANAPHORA_")]:
        monkeypatch.delenv(name)


def demo(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any], str]:
    """Status, figures, and what was told."""
    status = main(["demo", "--json", *flags])
    said = capsys.readouterr()
    return status, json.loads(said.out), said.err


def test_on_the_real_model_every_step_is_as_promised(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, figures, told = demo(capsys, "--tokens", "300")
    assert (status, figures["ok"]) == (0, True), told
    steps = {step["step"]: step for step in figures["steps"] if step["from"] != "answer on disk"}
    assert [step["from"] for step in figures["steps"]] == [
        "computed",
        "KV in memory",
        "KV in memory",
        "answer in memory",
        "answer on disk",
        "KV on disk",
        "KV in memory",
    ]
    assert steps["cold"]["computed_prompt_tokens"] == steps["cold"]["prompt_tokens"] > 250
    assert steps["warm"]["computed_prompt_tokens"] < 60
    assert steps["after restart"]["computed_prompt_tokens"] < 60
    assert steps["repeated"]["computed_prompt_tokens"] == 0
    assert figures["computed_prompt_tokens"] < figures["prompt_tokens"] / 2
    assert "own answer" in told
    assert "Not as promised" not in told


def test_a_server_that_reuses_nothing_fails_the_demo(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANAPHORA_ENGINE", "echo")
    monkeypatch.setenv("ANAPHORA_CACHE_ENABLED", "true")
    status, figures, told = demo(capsys, "--cache-dir", str(tmp_path))
    assert (status, figures["ok"]) == (1, False)
    broken = {step["step"] for step in figures["steps"] if step["broken"]}
    assert broken == {"warm", "follow-up", "after restart", "warm again"}  # the echo engine has no KV to reuse
    assert "Not as promised: 0 tokens were reused" in told
    assert (tmp_path / "models").is_dir()


def test_api_keys_of_the_users_own_configuration_are_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANAPHORA_ENGINE", "echo")
    monkeypatch.setenv("ANAPHORA_CACHE_ENABLED", "true")
    monkeypatch.setenv("ANAPHORA_SERVER_KEYS", "acme=secret")
    _, figures, _ = demo(capsys, "--cache-dir", str(tmp_path))
    assert len(figures["steps"]) == 7


def test_a_model_that_cannot_be_served_is_an_error_in_the_servers_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["demo", "--model", str(tmp_path / "nowhere.gguf"), "--cache-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "the server cannot serve" in error
    assert "nowhere.gguf" in error


def test_too_short_a_document_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--tokens", "10"]) == 2
    assert "--tokens" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(
    number: signal.Signals, tiny_llama: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    left = tmp_path_factory.mktemp("l")  # short: the path of a socket in it has about a hundred characters at most
    command = [sys.executable, "-m", "anaphora", "demo", "--json", "--model", str(tiny_llama), "--cache-dir", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(left)}) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "loading" in line or "starting" in line:
                break
        assert list(left.glob("anaphora-demo-*"))
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert not list(left.iterdir())


def test_the_document_says_where_it_is_from() -> None:
    assert DOCUMENT.read_text(encoding="utf-8").startswith("CHAPTER I")
    assert "public domain" in (DOCUMENT.parent / "SOURCE.md").read_text(encoding="utf-8")
