"""Entries for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from anaphora.ledger.book import Book
from anaphora.ledger.entry import LIFETIMES, Entry
from anaphora.ledger.query import Query

AT_US = 1_800_000_000_000_000

names = st.sampled_from(["", "a", "b"])
tokens = st.integers(0, 10**6)
money = st.integers(0, 10**16)
entries = st.builds(
    Entry,
    at_us=st.integers(0, 80 * 86_400).map(lambda seconds: AT_US + seconds * 10**6),
    request_id=st.just("req"),
    tenant=st.sampled_from(["t", "u", "v"]),
    workspace=names,
    tag=names,
    asked=names,
    model=st.sampled_from(["m", "n"]),
    upstream=names,
    level=st.sampled_from(["exact", "computed", "collapsed", "bypass", "refresh"]),
    outcome=st.sampled_from(["finished", "failed", "left"]),
    input=tokens,
    cache_read=tokens,
    output=tokens,
    **{f"write_{lifetime}": tokens for lifetime in LIFETIMES},
    off=st.integers(-5, 5),
    priced=st.integers(0, 1),
    first_us=st.none() | tokens,
    whole_us=tokens,
    paid=money,
    saved_answers=money,
    saved_prompts=st.integers(-(10**16), 10**16),
)


def made(**fields: Any) -> Entry:
    told: dict[str, Any] = {
        "at_us": AT_US,
        "request_id": "req_1",
        "tenant": "t",
        "workspace": "",
        "tag": "",
        "asked": "m",
        "model": "m",
        "upstream": "",
        "level": "computed",
        "outcome": "finished",
    }
    return Entry(**(told | fields))


def rows_of(path: Path) -> list[Entry]:
    """All that is in the book at `path`."""
    with Book(path) as book:
        return [entry for _, entry in book.rows(Query())]
