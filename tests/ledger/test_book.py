"""The book: what is written is there, and sums are the same whatever they are taken over."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.ledger.entries import AT_US, entries, made, rows_of

from anaphora.ledger.book import Book, BookProblem
from anaphora.ledger.entry import Entry
from anaphora.ledger.query import DIMENSIONS, Query, Sums, total


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    with Book(tmp_path / "deep" / "ledger.db", writes=True) as book:
        yield book


@given(st.lists(entries, max_size=20), st.sets(st.sampled_from(sorted(DIMENSIONS))))
def test_any_grouping_adds_up_to_the_same(written: list[Entry], by: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        book = Book(Path(folder, "ledger.db"), writes=True)
        book.append(written)
        everything = book.groups((), Query())
        grouped = book.groups(tuple(by), Query())
        tenants = [group for name in "tuv" for group in book.groups((), Query(tenant=name))]
        book.close()
    assert total(grouped) == total(everything) == total(tenants) == by_hand(written)


def by_hand(written: Sequence[Entry]) -> Sums:
    sums = Sums(
        num_requests=sum(entry.level != "refresh" for entry in written),
        num_failed=sum(entry.outcome == "failed" for entry in written),
        num_left=sum(entry.outcome == "left" for entry in written),
        num_unpriced=sum(not entry.priced for entry in written),
        num_estimated=sum(entry.estimated for entry in written),
        num_off=sum(entry.off != 0 for entry in written),
        off=sum(abs(entry.off) for entry in written),
        num_first=sum(entry.first_us is not None for entry in written),
    )
    for name in Sums.__struct_fields__:
        if not name.startswith("num_") and name != "off":
            setattr(sums, name, sum(getattr(entry, name) or 0 for entry in written))
    return sums


def test_amounts_beyond_what_a_database_integer_holds_are_exact(book: Book) -> None:
    most = 2**63 - 1
    book.append([made(paid=most, saved_prompts=-most)] * 3)
    (group,) = book.groups((), Query())
    assert (group.sums.paid, group.sums.saved_prompts) == (3 * most, -3 * most)


def test_groups_come_by_day_and_hour_in_utc(book: Book) -> None:
    hour = 3600 * 10**6
    book.append([made(), made(at_us=AT_US + hour), made(at_us=AT_US + 24 * hour)])
    keys = [tuple(group.by.values()) for group in book.groups(("day", "hour", "month"), Query())]
    assert keys == [
        ("2027-01-15", "2027-01-15T08:00Z", "2027-01"),
        ("2027-01-15", "2027-01-15T09:00Z", "2027-01"),
        ("2027-01-16", "2027-01-16T08:00Z", "2027-01"),
    ]


def test_a_period_has_its_beginning_and_not_its_end(book: Book) -> None:
    book.append([made(at_us=AT_US + place, request_id=str(place)) for place in range(4)])
    found = book.rows(Query(from_us=AT_US + 1, to_us=AT_US + 3))
    assert [entry.request_id for _, entry in found] == ["1", "2"]
    assert [entry.request_id for _, entry in book.rows(Query(), after=found[0][0], limit=1)] == ["2"]


def test_entries_come_back_as_they_were(book: Book) -> None:
    entry = made(first_us=None, whole_us=5, tag="ünï", paid=7)
    book.append([entry])
    assert [found for _, found in book.rows(Query())] == [entry]


def test_an_entry_is_put_in_the_place_of_the_one_of_its_request(book: Book) -> None:
    book.append([made(estimated=1, paid=5), made(request_id="other")])
    assert book.amend(made(paid=9)) == made(estimated=1, paid=5)
    assert book.amend(made(request_id="nobody")) is None
    assert [entry.paid for _, entry in book.rows(Query())] == [9, 0]


def test_labels_and_ids_go_and_amounts_stay(book: Book) -> None:
    book.append([made(tag="secret", paid=3), made(tenant="u", tag="kept"), made(model="n", asked="alias", tag="of n")])
    before = book.groups((), Query())
    book.anonymise("t", "alias")
    assert [entry.tag for _, entry in book.rows(Query())] == ["secret", "kept", ""]
    book.anonymise("t", None)
    assert [(entry.tag, entry.request_id) for _, entry in book.rows(Query())] == [("", ""), ("kept", "req_1"), ("", "")]
    assert book.groups((), Query()) == before
    book.anonymise(None, None, tag="kept")
    assert {entry.tag for _, entry in book.rows(Query())} == {""}


def test_what_was_dropped_is_not_in_the_files_any_more(book: Book) -> None:
    book.append([made(tag="a-very-secret-label")] * 50)
    files = [book.path, Path(f"{book.path}-wal")]
    assert any(b"a-very-secret-label" in path.read_bytes() for path in files)
    book.anonymise("t", None)
    assert not any(b"a-very-secret-label" in path.read_bytes() for path in files if path.exists())


def test_what_is_too_old_goes(book: Book) -> None:
    book.append([made(at_us=1), made(at_us=2)])
    book.prune(2)
    assert [entry.at_us for _, entry in book.rows(Query())] == [2]


def test_several_processes_write_one_file_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    code = (
        "import sys; from pathlib import Path; from anaphora.ledger.book import Book; from tests.ledger.entries import made\n"
        "book = Book(Path(sys.argv[1]), writes=True)\n"
        "for _ in range(20): book.append([made(tenant=sys.argv[2])] * 10)"
    )
    root = str(Path(__file__).parents[2])
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name], cwd=root) for name in "tuv"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    with Book(path) as book:
        counted = {group.by["tenant"]: group.sums.num_requests for group in book.groups(("tenant",), Query())}
    assert counted == {"t": 200, "u": 200, "v": 200}


def test_a_file_that_is_only_being_made_has_no_rows(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    with Book(tmp_path / "ledger.db") as book:
        assert book.groups((), Query()) == []


def test_whoever_only_reads_makes_no_file(tmp_path: Path) -> None:
    book = Book(tmp_path / "none.db")
    assert book.groups((), Query()) == []
    assert book.rows(Query()) == []
    assert not book.path.exists()


def test_a_file_that_is_no_book_or_cannot_be_made_is_a_problem_in_words(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"not a database" * 100)
    with pytest.raises(BookProblem, match=r"ledger\.db cannot be used"):
        Book(tmp_path / "ledger.db", writes=True).append([made()])
    with pytest.raises(BookProblem, match="cannot be used"):
        Book(tmp_path / "ledger.db").groups((), Query())
    with pytest.raises(BookProblem, match="cannot be used"):
        Book(tmp_path / "ledger.db" / "below" / "a.db", writes=True).append([made()])


def test_a_book_of_a_later_version_is_left_alone(book: Book) -> None:
    book.append([made()])
    book.close()
    with sqlite3.connect(book.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(BookProblem, match="later version"):
        book.append([made()])
    with pytest.raises(BookProblem, match="later version"):
        rows_of(book.path)


def test_nobody_else_may_read_the_file(book: Book) -> None:
    book.append([made()])
    assert book.path.stat().st_mode & 0o077 == 0


def test_a_failed_batch_leaves_nothing(book: Book) -> None:
    book.append([made()])
    broken = made()
    broken.tag = object()  # type: ignore[assignment]
    with pytest.raises(BookProblem):
        book.append([made(), broken])
    assert len(book.rows(Query())) == 1


def test_a_book_is_told_from_every_other_also_when_it_is_opened_again(book: Book, tmp_path: Path) -> None:
    number = book.identity()
    book.append([made()])
    with Book(book.path, writes=True) as again, Book(tmp_path / "other.db", writes=True) as other:
        assert again.identity() == number
        assert other.identity() != number
    assert len(rows_of(book.path)) == 1
