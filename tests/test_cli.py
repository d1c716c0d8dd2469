"""The command line as people meet it: help, exit statuses, output for eyes and for programs."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from anaphora import __version__
from anaphora.cli import build_parser, main
from anaphora.cli.serve import FLAGS
from anaphora.cli.stats import flattened
from anaphora.config import SHORT_VARIABLES, settings


@pytest.fixture(autouse=True)
def _an_empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ANAPHORA_")]:
        monkeypatch.delenv(name)


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every command: ("serve",), ("config",), ("config", "show"), ..."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield (*path, name)
                yield from commands(child, (*path, name))


@pytest.mark.parametrize("path", [(), *commands(build_parser())], ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*path, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert text.startswith("usage: anaphora")
    assert "examples:" in text or "COMMAND" in text


@pytest.mark.parametrize("path", [(), ("config",)])
def test_an_unfinished_command_line_prints_help_and_fails(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(path) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_version_is_quick_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == 0
    versions = json.loads(capsys.readouterr().out)
    assert versions["anaphora"] == __version__
    assert set(versions) == {"anaphora", "python", "torch", "transformers"}


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "anaphora", "version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("anaphora")


def test_config_show_names_value_and_source(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANAPHORA_PORT", "9000")
    monkeypatch.setenv("ANAPHORA_PROT", "9000")
    assert main(["config", "show"]) == 0
    shown = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in shown.out.splitlines()}
    assert rows["server.port"] == ["9000", "environment", "ANAPHORA_PORT"]
    assert rows["engine.kv_memory"] == ["2GiB", "default"]
    assert "did you mean ANAPHORA_PORT?" in shown.err


def test_config_show_as_json_has_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == [setting.path for setting in settings()]
    assert rows["server.port"] == {"value": 8080, "source": "default"}


def test_config_check_accepts_a_good_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANAPHORA_PORT", "not a port")  # the file is what is checked
    Path("good.toml").write_text("[server]\nport = 1")
    assert main(["config", "check", "good.toml"]) == 0
    assert capsys.readouterr().out == "good.toml: ok\n"


def test_config_check_refuses_a_bad_file_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.toml").write_text("[server]\nprot = 1")
    assert main(["config", "check", "bad.toml"]) == 1
    assert capsys.readouterr().err == "anaphora: error: bad.toml: unknown key server.prot; did you mean server.port?\n"


def test_serve_with_a_wrong_setting_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("anaphora: error: server.host: ")
    assert said.count("\n") == 1


def test_serve_has_a_flag_for_every_setting_with_a_short_variable() -> None:
    """One idea of what is worth a short name; messages about a flag are built on it."""
    flags = {setting: flag for setting, flag, *_ in FLAGS}
    assert set(flags) == {*SHORT_VARIABLES, "cache.dir"}
    for path, variable in SHORT_VARIABLES.items():
        assert flags[path] == "--" + variable.removeprefix("ANAPHORA_").lower().replace("_", "-")


@pytest.mark.parametrize("command", ["stats", "chat"])
def test_a_server_that_is_not_there_is_one_clear_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err == (
        "anaphora: error: no server answers at http://127.0.0.1:9; start one with `anaphora serve`\n"
    )


def test_nested_counters_are_named_with_dots() -> None:
    assert list(flattened({"a": 1, "kv": {"hits": 2, "deep": {"x": 3}}})) == [("a", 1), ("kv.hits", 2), ("kv.deep.x", 3)]


@pytest.mark.parametrize("command", ["config show", "config show --json", "version"])
def test_a_reader_that_goes_away_is_not_an_accident(command: str) -> None:
    code = f"import sys; from anaphora.cli import main; sys.exit(main({command.split()!r}))"
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run([sys.executable, "-c", code], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write_end)
    assert done.stderr == ""
    assert done.returncode in {0, 1}  # 1 is what rich makes of it


def test_ctrl_c_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("anaphora.cli.config.load", interrupt)
    assert main(["config", "show"]) == 130
    assert "Traceback" not in capsys.readouterr().err
