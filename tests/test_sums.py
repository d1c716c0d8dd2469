from __future__ import annotations

import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.sums import Sums


def add(sums: Sums, amount: float, *name: str) -> None:
    row = sums.row(name)
    sums.cells[row] += amount


def test_neighbours_add_up_and_each_of_them_sees_it(tmp_path: Path) -> None:
    first, second = Sums(tmp_path / "0.sums"), Sums(tmp_path / "1.sums")
    add(first, 2, "requests", "hit")
    add(second, 3, "requests", "hit")
    add(second, 0.5, "requests", "miss", "ü")
    row = first.row(("histogram",), 3)
    first.cells[row + 2] = 7.0
    expected = {"requests": {("hit",): [5.0], ("miss", "ü"): [0.5]}, "histogram": {(): [0.0, 0.0, 7.0]}}
    assert first.totals() == second.totals() == expected
    assert Sums().totals() == {}


def test_who_takes_the_place_of_one_that_died_goes_on_where_it_was(tmp_path: Path) -> None:
    dead, neighbour = Sums(tmp_path / "0.sums"), Sums(tmp_path / "1.sums")
    add(dead, 2, "requests", "hit")
    heir = Sums(tmp_path / "0.sums")
    add(heir, 1, "requests", "hit")
    add(heir, 1, "requests", "miss")
    assert neighbour.totals() == {"requests": {("hit",): [3.0], ("miss",): [1.0]}}


labels = st.lists(st.text(max_size=5000), max_size=3)
additions = st.lists(st.tuples(st.integers(0, 1), labels, st.integers(1, 1000)), max_size=30)


@given(additions)
def test_nothing_that_was_added_is_lost_however_many_names_there_are(happened: list[tuple[int, list[str], int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shares = [Sums(Path(folder, f"{number}.sums")) for number in range(2)]
        alone = Sums()
        for who, name, amount in happened:
            add(shares[who], amount, "n", *name)
            add(alone, amount, "n", *name)
        assert shares[0].totals() == shares[1].totals() == alone.totals()
        assert sum(cells[0] for cells in alone.totals().get("n", {}).values()) == sum(amount for _, _, amount in happened)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_the_disk_is_full_counting_goes_on_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sums, neighbour = Sums(tmp_path / "0.sums"), Sums(tmp_path / "1.sums")
    add(sums, 2, "requests", "hit")
    with files_of_at_most(1 << 16):
        for number in range(20):
            add(sums, 1, "requests", str(number) * 10_000)
    add(sums, 1, "requests", "hit")
    assert sums.totals()["requests"]["hit",] == [3.0]
    assert neighbour.totals()["requests"]["hit",] == [2.0]
    assert "cannot grow" in caplog.text
