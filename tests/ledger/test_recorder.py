"""From events to the book: nothing is lost, nothing fails a request, and a computation is paid for once."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.ledger.entries import rows_of

from anaphora.clock import ManualClock
from anaphora.events import Answered, Computed, Dropped, Event, Failed, Miss, MissReason
from anaphora.ledger import recorder as module
from anaphora.ledger.book import Book
from anaphora.ledger.entry import Entry
from anaphora.ledger.prices import Price, Prices
from anaphora.ledger.recorder import Recorder
from anaphora.types import Scope, Tenant, Usage

PRICES = Prices((Price(model="m", input=Decimal(1), output=Decimal(1)),))
USAGE = Usage(input_tokens=10, output_tokens=5)
T = Tenant("t")


class Told:
    """What a recorder told on its thread; `heard` is set by the first."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.heard = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.heard.set()


class Settled:
    """What was said to have been used; the latest first."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def settle(self, request_id: str, tokens: int, paid: int) -> None:
        self.calls.append((request_id, tokens, paid))

    def spend(self, tenant: str, tokens: int, paid: int) -> None:
        self.calls.append((tenant, tokens, paid))


def answered(source: Any = "miss", outcome: Any = "finished", **more: Any) -> Answered:
    usage = USAGE if outcome == "finished" else Usage()
    return Answered(T, "m", source, outcome, usage, ("end_turn",), 1.0, None, **({"request_id": "r"} | more))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def recorded(path: Path, *happened: Event | Scope, **more: Any) -> list[Entry]:
    """All of it recorded by one recorder, closed in the end."""
    recorder = Recorder(path, PRICES, ManualClock(), tell=more.pop("tell", Told()), **more)
    for what in happened:
        recorder.forget(what) if isinstance(what, Scope) else recorder.record(what)
    recorder.start()
    recorder.close()
    return rows_of(path)


def test_every_answer_is_a_row_when_it_is_closed(path: Path) -> None:
    num = 2 * module.BATCH + 7
    entries = recorded(path, *[answered(request_id=str(number)) for number in range(num)])
    assert [entry.request_id for entry in entries] == [str(number) for number in range(num)]
    assert sum(entry.paid for entry in entries) == num * 15 * 10**6


def test_what_is_no_answer_is_no_row(path: Path) -> None:
    assert recorded(path, Miss("exact", MissReason.ABSENT), Computed(T, "m", USAGE, 1.0, "r")) == []


@pytest.mark.parametrize("told_first", [True, False])
def test_a_computation_whose_first_client_left_is_paid_for_once_with_what_it_cost_in_the_end(
    path: Path, told_first: bool
) -> None:
    left = answered(outcome="left", begun=Usage(input_tokens=10, output_tokens=1))
    computed = Computed(T, "m", USAGE, 1.0, "r")
    settled = Settled()
    happened = (computed, left) if told_first else (left, computed)
    stayed = answered("collapsed", request_id="s")
    entries = recorded(path, *happened, stayed, settles=settled)
    assert [(entry.outcome, entry.tokens, entry.estimated) for entry in entries] == [("left", 15, 0), ("finished", 0, 0)]
    assert (entries[0].paid, entries[1].paid, entries[1].saved_answers) == (15 * 10**6, 0, 15 * 10**6)
    assert sum(tokens for _, tokens, _ in settled.calls) == 15
    assert sum(paid for _, _, paid in settled.calls) == 15 * 10**6


def test_an_entry_that_was_written_already_is_amended(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, append = threading.Event(), Book.append

    def appending(book: Book, entries: Iterable[Entry]) -> None:
        append(book, entries)
        written.set()

    monkeypatch.setattr(Book, "append", appending)
    recorder = Recorder(path, PRICES, ManualClock(), tell=Told())
    recorder.start()
    recorder.record(answered(outcome="left", begun=Usage(input_tokens=10, output_tokens=1)))
    assert written.wait(30)
    recorder.record(Computed(T, "m", USAGE, 1.0, "r"))
    recorder.close()
    assert [(entry.output, entry.estimated) for entry in rows_of(path)] == [(5, 0)]


def test_while_another_process_holds_the_file_answers_wait_and_it_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anaphora.ledger.book.BUSY_S", 0.05)
    with Book(path, writes=True) as book:
        book.append([])
    told = Told()
    recorder = Recorder(path, PRICES, ManualClock(), tell=told)
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        recorder.record(answered())
        recorder.start()
        assert told.heard.wait(30)
        holder.execute("COMMIT")
    recorder.close()
    assert isinstance(told.events[0], Failed)
    assert (told.events[0].tier, told.events[0].operation) == ("ledger", "write")
    assert len(rows_of(path)) == 1


def test_what_could_never_be_written_is_counted_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = Told()
    recorded(tmp_path / "file" / "ledger.db", answered(), answered(), tell=told)
    assert told.events[-1] == Dropped("ledger", 2)


def test_too_many_that_wait_are_lost_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)
    (tmp_path / "file").touch()
    told = Told()
    recorded(tmp_path / "file" / "ledger.db", *[answered()] * 5, tell=told)
    assert sum(event.num_entries for event in told.events if isinstance(event, Dropped)) == 5


def test_forgetting_drops_the_labels_of_what_came_before(path: Path) -> None:
    first, second = answered(request_id="r1", tag="private"), answered(request_id="r2", tag="later")
    entries = recorded(path, first, Scope(tenant=T), second)
    assert [(entry.request_id, entry.tag, entry.paid) for entry in entries] == [
        ("", "", 15 * 10**6),
        ("r2", "later", 15 * 10**6),
    ]
    recorded(path, Scope(tenant=Tenant("u")))
    assert rows_of(path)[1].tag == "later"


def test_what_is_too_old_goes_where_that_is_wanted(path: Path) -> None:
    assert len(recorded(path, answered())) == 1
    clock = ManualClock()
    clock.advance(3 * 86_400)
    recorder = Recorder(path, PRICES, clock, tell=Told(), keep_days=2)
    recorder.record(answered(request_id="young"))
    recorder.start()
    recorder.close()
    assert [entry.request_id for entry in rows_of(path)] == ["young"]


def test_a_bug_in_a_consumer_does_not_end_the_ledger(path: Path) -> None:
    class Broken(Settled):
        def settle(self, request_id: str, tokens: int, paid: int) -> None:
            if request_id == "bad":
                raise RuntimeError("a bug")

    told = Told()
    recorder = Recorder(path, PRICES, ManualClock(), tell=told, settles=Broken())
    recorder.start()
    recorder.record(answered(request_id="bad"))
    assert told.heard.wait(30)
    recorder.record(answered(request_id="good"))
    recorder.close()
    assert "good" in [entry.request_id for entry in rows_of(path)]
