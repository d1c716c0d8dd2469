from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from anaphora.cli import bench_semantic, main
from anaphora.levels.semantic.evaluation import sets


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "checklist-qqp").mkdir(parents=True)
    words = ("otters", "herons", "badgers", "weasels", "falcons", "beavers")
    with gzip.open(folder / "checklist-qqp" / "checklist_qqp.jsonl.gz", "wt", encoding="utf-8") as lines:
        for n in range(sets.TRAINED_ON + 24):
            same = n % 2
            word, other = words[n % 6], words[n % 6 if same else (n + 1) % 6]
            row = {"a": f"How do {word} live in a forest {n}?", "b": f"How do {other} live in a forest {n} ?", "same": same}
            lines.write(json.dumps({**row, "test": "animals", "capability": "Vocabulary"}) + "\n")
    return folder


def test_pairs_are_measured_with_the_real_encoder_and_verifier(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANAPHORA_DATA", str(data))
    file = tmp_path / "figures.json"
    command = ["bench", "semantic", "--data-set", "checklist-qqp", "--quick", "--cache-dir", str(tmp_path / "cache")]
    assert main([*command, "--json", "--output", str(file)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(file.read_text())
    assert {"commit", "machine", "version"} <= told.keys()
    (one,) = told["data_sets"]
    assert (one["data_set"], one["seen"], one["weak"]) == ("checklist-qqp", "like them", False)
    ours = one["filled"]["rows"][0]
    assert (ours["num_asked"], ours["num_answerable"], ours["num_traps"]) == (24, 12, 12)
    assert ours["num_traps_served"] == 0  # another animal
    assert ours["num_right"] == 12  # the same but for a space
    assert one["streams"]["rows"][0]["way"] == "ours, risk 1%"
    assert one["streams"]["rows"][0]["num_served"] == 0  # so few say nothing about 1 %

    assert len(list((tmp_path / "cache" / "bench").glob("*.npy"))) == 1
    assert main(command) == 0
    said = capsys.readouterr()
    assert "encoding" not in said.err  # the vectors were kept
    assert "by kind" not in said.out or "Vocabulary" in said.out
    assert "ours, sure" in said.out


@pytest.mark.parametrize(
    "wrong", [["--risk", "2"], ["--risk", "0"], ["--risk", "much"], ["--streams", "-1"], ["--data-set", "nothing"]]
)
def test_a_wrong_flag_is_said(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "semantic", *wrong])
    assert f"argument {wrong[0]}: invalid" in capsys.readouterr().err


def test_a_data_set_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("ANAPHORA_DATA", raising=False)
    assert main(["bench", "semantic", "--data-set", "banking77"]) == 2
    assert "banking77: set ANAPHORA_DATA" in capsys.readouterr().err


def test_without_any_data_it_says_where_to_get_some(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ANAPHORA_DATA", raising=False)
    monkeypatch.setattr(sets, "PACKAGED", dict.fromkeys(sets.PACKAGED, _absent))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None if name == "fow_cache" else object())
    assert main(["bench", "semantic"]) == 2
    said = capsys.readouterr().err
    assert sets.INSTALL in said
    assert "set ANAPHORA_DATA" in said


def _absent(_package: object) -> object:
    raise AssertionError("it is not installed")


def test_the_names_of_the_command_are_those_of_the_sets() -> None:
    assert set(bench_semantic.DATA_SETS) == set(sets.NAMES)
