"""`anaphora ledger` over a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.ledger.entries import AT_US, made

from anaphora.cli import main
from anaphora.ledger.book import Book

DAY_US = 86_400 * 10**6


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.db"
    book = Book(path, writes=True)
    book.append(
        [
            made(tenant="a", input=1200, output=10, paid=5 * 10**9),
            made(tenant="a", level="exact", saved_answers=5 * 10**9, at_us=AT_US + DAY_US),
            made(tenant="b", model="unknown-model", priced=0, input=7),
            made(tenant="b", outcome="left", estimated=1, saved_prompts=-(10**9)),
        ]
    )
    book.close()
    return path


def test_sums_are_a_table_with_a_last_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", "show", "--file", str(file), "--by", "tenant, level"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "computed", "1", "1,200", "0", "0", "10", "$0.005000", "$0.000000", "$0.000000", "$0.005000"] in lines
    assert ["a", "exact", "1", "0", "0", "0", "0", "$0.000000", "$0.005000", "$0.000000", "$0.005000"] in lines
    assert ["all", "4", "1,207", "0", "0", "10", "$0.005000", "$0.005000", "-$0.001000", "$0.009000"] in lines


def test_what_the_sums_do_not_hold_is_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["ledger", "show", "--file", str(file)])
    out = capsys.readouterr().out
    assert "1 requests whose price is not known are not in the money" in out
    assert "1 requests were cut before their tokens were counted" in out
    assert next(line for line in out.splitlines() if line.startswith("unknown-model")).split()[-4:] == ["?"] * 4


def test_a_period_and_a_tenant_can_be_picked(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["ledger", "show", "--file", str(file), "--by", "day", "--tenant", "a", "--from", "2027-01-16", "--json"])
    (group,) = json.loads(capsys.readouterr().out)
    assert (group["day"], group["num_requests"], group["saved_by_answer_cache_usd"]) == ("2027-01-16", 1, "0.005")
    main(["ledger", "show", "--file", str(file), "--to", "2020-01-01"])
    assert capsys.readouterr().out == "no requests in this period\n"


def test_requests_and_sums_are_exported(file: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["ledger", "export", "--file", str(file)]) == 0
    assert len(capsysbinary.readouterr().out.splitlines()) == 5
    assert main(["ledger", "export", "--file", str(file), "--by", "tenant", "--output", str(tmp_path / "sums.csv")]) == 0
    assert [line.split(",")[0] for line in (tmp_path / "sums.csv").read_text().splitlines()] == ["tenant", "a", "b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--file", "nowhere.db"], "there is no ledger at nowhere.db"),
        (["--by", "colour"], "there is no dimension 'colour'"),
        (["--since", "yesterday"], "a span such as"),
        (["--url", "http://127.0.0.1:1"], "no server answers"),
    ],
)
def test_mistakes_are_one_line(file: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments if {"--file", "--url"} & set(arguments) else [*arguments, "--file", str(file)]
    assert main(["ledger", "show", *given]) in (1, 2)
    assert words in capsys.readouterr().err
    assert main(["ledger", "export", "--file", str(file), "--output", "/nowhere/at/all"]) == 2


def test_the_ledger_of_the_configuration_is_read(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANAPHORA_CACHE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["ledger", "show", "--by", "tenant", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
