"""Rows for other programs."""

from __future__ import annotations

import csv
import io
import json
import sys

import pytest
from tests.ledger.entries import made

from anaphora.ledger.export import NoParquet, row, text

ENTRY = made(tag='a "quoted", tag', input=5, write_1h=3, first_us=1500, whole_us=2000, paid=10**6, estimated=1)


def test_a_row_has_words_for_everything() -> None:
    told = row(ENTRY)
    assert told["time"] == "2027-01-15T08:00:00.000+00:00"
    assert (told["input_tokens"], told["cache_write_1h_tokens"]) == (5, 3)
    assert (told["first_s"], told["whole_s"]) == (0.0015, 0.002)
    assert (told["paid_usd"], told["estimated"], told["priced"]) == ("0.000001", True, True)
    assert row(made(priced=0))["paid_usd"] is None
    assert row(made(first_us=None))["first_s"] is None


def test_csv_and_json_say_the_same() -> None:
    rows = [row(ENTRY), row(made())]
    assert json.loads(text(rows, "json")) == rows
    read = list(csv.DictReader(io.StringIO(text(rows, "csv").decode(), newline="")))
    assert read == [{name: "" if value is None else str(value) for name, value in told.items()} for told in rows]
    assert (text([], "csv"), json.loads(text([], "json"))) == (b"", [])


def test_parquet_says_the_same_where_it_can_be_written() -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [row(ENTRY), row(made())]
    assert pyarrow.parquet.read_table(io.BytesIO(text(rows, "parquet"))).to_pylist() == rows


def test_without_its_package_parquet_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(NoParquet, match=r"anaphora\[parquet\]"):
        text([row(ENTRY)], "parquet")
