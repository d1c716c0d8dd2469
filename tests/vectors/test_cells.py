"""Cells: each vector lies in one of them, whatever was divided, and searches beside that see all of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from anaphora.vectors import cells as cells_module
from anaphora.vectors import centroids as centroids_module
from anaphora.vectors.cells import Cells
from anaphora.vectors.centroids import Centroids, direction, halved
from anaphora.vectors.rows import Codes, encode, inverse_lengths

Floats = npt.NDArray[np.float32]

DIMENSIONS = 70
"""Not as many as bits of a word."""


def directions(num: int, seed: int = 0, dimensions: int = DIMENSIONS) -> Floats:
    found = np.random.default_rng(seed).standard_normal((num, dimensions)).astype(np.float32)
    lengths: Floats = np.linalg.norm(found, axis=1, keepdims=True)
    return found / lengths


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Cells are divided soon, and their centroids soon many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells_module, "MOST", 8)
        patch.setattr(cells_module, "_NEIGHBOURS", 3)
        patch.setattr(centroids_module, "FEW", 5)
        yield


def holds_together(cells: Cells) -> None:
    """Each vector is a column of one cell, with its signs; each cell has a centroid and is not empty."""
    assert set(cells._cells) == set(cells._centroids._numbers) == set(cells._centroids._rows)
    assert [cells._centroids._rows[number] for number in cells._centroids._numbers] == list(range(len(cells._centroids)))
    assert len(cells._centroids._graph) == len(cells._cells)
    found: dict[int, int] = {}
    for number, cell in cells._cells.items():
        assert cell.shape[1]
        for column in cell.T:
            place = int(column[-1])
            found[int(cells._ids[place])] = place
            assert int(cells._cell_of[place]) == number
            signs = np.unpackbits(np.frombuffer(column[:-1].tobytes(), np.uint8))[:DIMENSIONS]
            assert np.array_equal(signs, cells._codes[place] > 0)
    assert found == cells._places
    assert sum(cell.shape[1] for cell in cells._cells.values()) == len(cells)
    assert sorted([*cells._free, *found.values()]) == list(range(cells._stop))


class Machine(RuleBasedStateMachine):
    """Against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = Cells(DIMENSIONS)
        self.model: dict[int, Codes] = {}
        self.num_added = 0

    @rule(num=st.integers(1, 20), alike=st.booleans())
    def add(self, num: int, alike: bool) -> None:
        for code in encode(directions(1 if alike else num, seed=self.num_added))[[0] * num if alike else slice(None)]:
            self.cells.add(self.num_added, code)
            self.model[self.num_added] = code
            self.num_added += 1

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        for identity in data.draw(st.sets(st.sampled_from([*self.model]), max_size=12)):
            self.cells.remove(identity)
            del self.model[identity]
        self.cells.remove(10**9)

    @rule()
    def restart(self) -> None:
        self.cells = Cells.restored(DIMENSIONS, memoryview(b"".join(self.cells.parts())))

    @rule(seed=st.integers(0, 100), k=st.integers(1, 80))
    def search(self, seed: int, k: int) -> None:
        asked = directions(1, seed=10**6 + seed)[0]
        found = self.cells.search(asked, k)
        assert len(found) == min(k, len(self.model))
        assert len({identity for identity, _ in found}) == len(found)
        for identity, similarity in found:
            code = self.model[identity]
            assert abs(float(code @ asked) * float(inverse_lengths(code[np.newaxis])[0]) - similarity) < 1e-5
        assert [similarity for _, similarity in found] == sorted((similarity for _, similarity in found), reverse=True)

    @invariant()
    def is_whole(self) -> None:
        holds_together(self.cells)
        assert sorted(self.cells.ids().tolist()) == sorted(self.model)


TestAgainstADictionary = Machine.TestCase
TestAgainstADictionary.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_many_that_are_alike_are_divided_as_seldom_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    divided = 0
    divide = Cells._divide

    def counted(cells: Cells, number: int) -> None:
        nonlocal divided
        divided += 1
        divide(cells, number)

    monkeypatch.setattr(Cells, "_divide", counted)
    cells, code = Cells(DIMENSIONS), encode(directions(1))[0]
    for identity in range(400):
        cells.add(identity, code)
    assert divided <= 400 / (cells_module.MOST / 2)
    holds_together(cells)
    assert {identity for identity, _ in cells.search(directions(1)[0], 400)} == set(range(400))


def test_what_is_removed_leaves_nothing() -> None:
    codes = encode(directions(60))
    cells = Cells(DIMENSIONS)
    for identity, code in enumerate(codes):
        cells.add(identity, code)
    for identity in range(0, 60, 2):
        cells.remove(identity)
    everything = cells._codes.tobytes() + b"".join(cells.parts())
    assert [code.tobytes() in everything for code in codes] == [False, True] * 30
    kept = {tuple(column) for cell in cells._cells.values() for column in cell[:-1].T.tolist()}
    assert [tuple(cells._signs((code > 0)[np.newaxis])[:, 0].tolist()) in kept for code in codes] == [False, True] * 30


def test_a_place_that_is_free_is_taken_again() -> None:
    cells = Cells(DIMENSIONS)
    for identity, code in enumerate(encode(directions(500))):
        cells.add(identity, code)
        cells.remove(identity - 20)
    assert len(cells) == 20
    assert len(cells._ids) <= 64


@pytest.mark.parametrize("where", ["halved", "vectors"])
def test_a_search_beside_a_division_finds_everything(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before a cell is divided, and between that and the change of its neighbours."""
    stored = directions(9)
    cells = Cells(DIMENSIONS)
    for identity, code in enumerate(encode(stored[:8])):
        cells.add(identity, code)
    entered, on = threading.Event(), threading.Event()

    def stopped(*args: Any) -> Any:
        entered.set()
        assert on.wait(60)
        return going_on(*args)

    going_on: Any = halved if where == "halved" else Centroids.vectors
    monkeypatch.setattr(cells_module if where == "halved" else Centroids, where, stopped)
    thread = threading.Thread(target=cells.add, args=(8, encode(stored)[8]))
    thread.start()
    assert entered.wait(60)
    for identity, vector in enumerate(stored):
        assert {found for found, _ in cells.search(vector, 20)} == set(range(9))
        assert cells.search(vector, 1)[0][0] == identity
    on.set()
    thread.join()
    assert len(cells._cells) == 2
    holds_together(cells)


def test_where_a_cell_cannot_be_divided_nothing_is_lost_or_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = directions(30)
    codes = encode(stored)
    cells = Cells(DIMENSIONS)

    def no_memory(vectors: Floats) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cells_module, "halved", no_memory)
        for identity in range(8):
            cells.add(identity, codes[identity])
        with pytest.raises(MemoryError):
            cells.add(8, codes[8])
        cells.add(8, codes[8])  # as whoever adds tries again
        holds_together(cells)
    for identity in range(9, 30):
        cells.add(identity, codes[identity])
    holds_together(cells)
    assert sorted(identity for identity, _ in cells.search(stored[0], 50)) == list(range(30))


def test_searches_beside_changes_take_no_vector_for_another() -> None:
    """Places are freed and taken again all the time; what stands is always found, with its own similarity."""
    stored = directions(600)
    codes = encode(stored)
    cells = Cells(DIMENSIONS)
    for identity in range(100):
        cells.add(identity, codes[identity])
    true = (codes.astype(np.float32) * inverse_lengths(codes)[:, np.newaxis]) @ stored[:100].T
    wrong: list[object] = []
    done = threading.Event()

    def search(seed: int) -> None:
        draw = np.random.default_rng(seed)
        while not done.is_set():
            asked = int(draw.integers(100))
            found = cells.search(stored[asked], 5)
            if found[0][0] != asked:
                wrong.append((asked, found))
            wrong.extend(pair for pair in found if abs(float(true[pair[0], asked]) - pair[1]) > 1e-4)

    threads = [threading.Thread(target=search, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        for identity in range(100, 600):
            cells.add(identity, codes[identity])
            if identity >= 150:
                cells.remove(identity - 50)
        for identity in range(550, 600):
            cells.remove(identity)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    holds_together(cells)


def test_nearly_all_of_the_nearest_are_found_without_looking_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty thousand around two thousand centres, a tenth of them scanned."""
    monkeypatch.setattr(cells_module, "MOST", 64)
    monkeypatch.setattr(cells_module, "_NEIGHBOURS", 16)
    monkeypatch.setattr(cells_module, "SCANNED", 2000)
    monkeypatch.setattr(centroids_module, "FEW", 100)
    centres = directions(2000, seed=1, dimensions=128)
    stored = np.concatenate([centres + 0.7 * directions(2000, seed=seed, dimensions=128) for seed in range(10, 20)])
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    cells = Cells(128)
    for identity, code in enumerate(encode(stored)):
        cells.add(identity, code)
    looked_at = [sum(cell.shape[1] for cell in cells._around(vector, 2000)) for vector in stored[:50]]
    assert max(looked_at) < 2100
    assert len(cells._centroids) > 100
    asked = stored[:200] + 0.4 * directions(200, seed=2, dimensions=128)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    right = np.argmax(asked @ stored.T, axis=1)
    assert np.mean([cells.search(vector, 1)[0][0] == nearest for vector, nearest in zip(asked, right, strict=True)]) > 0.97


def test_halves_of_what_has_no_direction_together() -> None:
    first, centroids = halved(np.array([[1, 0], [-1, 0]], np.float32))
    assert sorted(first.tolist()) == [False, True]
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1)
    assert np.allclose(np.linalg.norm(direction(np.zeros(3, np.float32))), 1)


def test_what_was_not_written_by_cells_is_refused() -> None:
    cells = Cells(DIMENSIONS)
    for identity, code in enumerate(encode(directions(20))):
        cells.add(identity, code)
    whole = b"".join(cells.parts())
    assert len(Cells.restored(DIMENSIONS, memoryview(whole))) == 20
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"cut short|another length|multiple of element size"):
            Cells.restored(DIMENSIONS, memoryview(whole[:length]))
