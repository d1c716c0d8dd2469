"""Cutting event streams into events."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.errors import BackendFailed
from anaphora.wire import sse
from anaphora.wire.sse import Event, Splitter

line_text = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\ufeff"), max_size=12)
event_lines = st.tuples(
    st.lists(line_text.map(lambda text: f": {text}"), max_size=1),
    st.none() | st.sampled_from(["ping", "message_start"]),
    st.lists(line_text, max_size=3),
)


def cut(body: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[start:stop] for start, stop in itertools.pairwise(edges)]


@given(
    st.lists(event_lines, max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(0, 10_000), max_size=12),
    st.booleans(),
)
def test_events_are_the_same_however_the_body_is_cut(
    events: list[tuple[list[str], str | None, list[str]]], end: str, places: list[int], marked: bool
) -> None:
    expected: list[Event] = []
    body = b"\xef\xbb\xbf" if marked else b""
    for comments, name, datas in events:
        lines = [*comments, *([f"event: {name}"] if name else []), *(f"data: {data}" for data in datas)]
        raw = "".join(line + end for line in [*lines, ""]).encode()
        data = "\n".join(datas).encode() if datas else None
        expected.append(Event((body if not expected else b"") + raw, name or "", data))
        body += raw
    splitter = Splitter()
    found = [event for chunk in cut(body, places) for event in splitter.feed(chunk)]
    if end == "\r" and len(found) < len(expected):
        assert len(found) == len(expected) - 1 == 0  # one empty line alone may be the first half of a CRLF
        found += splitter.feed(b"\n")
        assert found[-1].raw.removesuffix(b"\n") == expected[-1].raw
        return
    assert found == expected


def test_separators_of_unicode_end_no_line() -> None:
    data = "a\u2028b\u2029c\u0085d".encode()
    assert Splitter().feed(b"data: " + data + b"\n\n") == [Event(b"data: " + data + b"\n\n", "", data)]


def test_an_unfinished_event_is_none() -> None:
    splitter = Splitter()
    assert splitter.feed(b"data: 1\n") == []
    assert [event.data for event in splitter.feed(b"\ndata: 2")] == [b"1"]


@pytest.mark.parametrize("body", [b"<html>\n\n", b'{"error": "no"}\n\n', b"nonsense\n"])
def test_what_is_no_stream_is_refused(body: bytes) -> None:
    with pytest.raises(BackendFailed, match="malformed"):
        Splitter().feed(body)


def test_an_event_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    splitter = Splitter()
    splitter.feed(b"data: " + b"x" * 90)
    with pytest.raises(BackendFailed, match="more than 100 bytes"):
        splitter.feed(b"x" * 90)
