"""Groups and entries as CSV, JSON and Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from anaphora.errors import AnaphoraError
from anaphora.ledger.entry import Entry, usd_text

Row = Mapping[str, "str | int | float | bool | None"]
FORMATS = ("csv", "json", "parquet")
_MONEY = {"paid": "paid_usd", "saved_answers": "saved_by_answer_cache_usd", "saved_prompts": "saved_by_prompt_caching_usd"}
_TOKENS = (
    "input",
    "cache_read",
    "output",
    "reasoning",
    "audio_input",
    "audio_output",
    "image_input",
    "saved_input",
    "saved_output",
)


class NoParquet(AnaphoraError):
    """The package that writes it is not installed."""


def row(entry: Entry) -> dict[str, str | int | float | bool | None]:
    """An entry as it is written down: dollars as exact decimals in text, times in seconds."""
    told: dict[str, str | int | float | bool | None] = {
        "time": datetime.fromtimestamp(entry.at_us / 1e6, UTC).isoformat(timespec="milliseconds")
    }
    for name, value in msgspec.structs.asdict(entry).items():
        if name in _MONEY:
            told[_MONEY[name]] = usd_text(value) if entry.priced else None
        elif name in _TOKENS or name.startswith("write_"):
            told[f"{name}_tokens" if name in _TOKENS else f"cache_{name}_tokens"] = value
        elif name.endswith("_us") and name != "at_us":
            told[name.replace("_us", "_s")] = None if value is None else value / 1e6
        elif name in ("estimated", "priced"):
            told[name] = bool(value)
        elif name == "off":
            told["tokens_counted_otherwise"] = value
        elif name != "at_us":
            told[name] = value
    return told


def text(rows: Sequence[Row], form: str) -> bytes:
    """`rows` in one of `FORMATS`. Raises NoParquet."""
    if form == "json":
        return (json.dumps(rows, indent=2) + "\n").encode()
    return _parquet(rows) if form == "parquet" else _csv(rows)


def _csv(rows: Sequence[Row]) -> bytes:
    written = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(written, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return written.getvalue().encode()


def _parquet(rows: Sequence[Row]) -> bytes:
    """Money as text, like everywhere: a column of decimals would have to agree on how many."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise NoParquet("Parquet needs the package pyarrow: pip install 'anaphora[parquet]'") from error
    written = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), written)
    return bytes(written.getvalue().to_pybytes())
