"""Vectors: what is added is found, what was removed is not, whatever the cells are doing meanwhile."""

from __future__ import annotations

import random
import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from anaphora.vectors import Vectors, VectorsDamaged
from anaphora.vectors.cells import Cells
from anaphora.vectors.rows import Codes, encode, encode_one

Floats = npt.NDArray[np.float32]

DIMENSIONS = 16
SMALL = 6
A, B = b"a" * 32, b"b" * 32


def directions(num: int, seed: int = 0) -> Floats:
    found = np.random.default_rng(seed).standard_normal((num, DIMENSIONS)).astype(np.float32)
    lengths: Floats = np.linalg.norm(found, axis=1, keepdims=True)
    return found / lengths


@pytest.fixture
def vectors() -> Iterator[Vectors]:
    made = Vectors(DIMENSIONS, small=SMALL)
    yield made
    made.close()


class Machine(RuleBasedStateMachine):
    """Against a dictionary. Spaces grow beyond `SMALL`, so they are put into cells, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = Vectors(DIMENSIONS, small=SMALL)
        self.model: dict[bytes, dict[int, Floats]] = {A: {}, B: {}}
        self.num_added = 0

    def teardown(self) -> None:
        self.vectors.close()

    @rule(space=st.sampled_from([A, B]), num=st.integers(1, 5))
    def add(self, space: bytes, num: int) -> None:
        ids = range(self.num_added, self.num_added + num)
        self.num_added += num
        added = directions(num, seed=ids[0])
        self.vectors.add_many(space, ids, added)
        self.model[space].update(zip(ids, added, strict=True))

    @rule(space=st.sampled_from([A, B]), data=st.data())
    def remove(self, space: bytes, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from([*self.model[space], 10**9]), max_size=4))
        self.vectors.remove(space, ids)
        for identity in ids:
            self.model[space].pop(identity, None)

    @rule(space=st.sampled_from([A, B]))
    def drop(self, space: bytes) -> None:
        self.vectors.drop(space)
        self.model[space].clear()

    @rule()
    def settle(self) -> None:
        self.vectors.settle()

    @rule()
    def restart(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.vectors.save(Path(folder, "vectors"))
            self.vectors.close()
            self.vectors = Vectors.load(Path(folder, "vectors"), DIMENSIONS, small=SMALL)

    @rule(space=st.sampled_from([A, B]), seed=st.integers(0, 100), k=st.integers(1, 50))
    def search(self, space: bytes, seed: int, k: int) -> None:
        asked = directions(1, seed=10**6 + seed)[0]
        right = sorted(((float(asked @ vector), identity) for identity, vector in self.model[space].items()), reverse=True)
        found = self.vectors.search(space, 3 * asked, k)
        similarities = [similarity for _, similarity in found]
        assert similarities == sorted(similarities, reverse=True)
        assert len({identity for identity, _ in found}) == len(found)
        for identity, similarity in found:
            assert abs(float(asked @ self.model[space][identity]) - similarity) < 0.02
        assert len(found) == min(k, len(right))
        if right:
            assert abs(similarities[0] - right[0][0]) < 0.02

    @precondition(lambda self: any(self.model.values()))
    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        space, identity = data.draw(st.sampled_from([(space, i) for space, held in self.model.items() for i in held]))
        assert self.vectors.search(space, self.model[space][identity], 1)[0][0] == identity

    @invariant()
    def holds_what_it_should(self) -> None:
        assert self.vectors.ids().get(A, set()) == set(self.model[A])
        assert self.vectors.ids().get(B, set()) == set(self.model[B])


TestAgainstADictionary = Machine.TestCase
TestAgainstADictionary.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class Gate:
    """Stops whoever puts a vector into a cell, until told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        add = Cells.add

        def gated(cells: Cells, identity: int, code: Codes) -> None:
            self.entered.set()
            assert self.open.wait(60)
            add(cells, identity, code)

        monkeypatch.setattr(Cells, "add", gated)


def test_while_a_vector_is_put_into_its_cell_everything_is_found_and_nobody_waits(
    vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = directions(20)
    vectors.add_many(A, range(10), stored[:10])
    vectors.settle()
    gate = Gate(monkeypatch)
    vectors.add(A, 10, stored[10])
    assert gate.entered.wait(60)
    vectors.add_many(
        A, range(11, 20), stored[11:]
    )  # the thread stands still: if any of this waited for it, it would not return
    for identity in range(20):
        assert vectors.search(A, stored[identity], 1)[0][0] == identity
    vectors.remove(A, [3, 10, 15])
    assert {identity for identity, _ in vectors.search(A, stored[10], 20)} == set(range(20)) - {3, 10, 15}
    gate.open.set()
    vectors.settle()
    assert {identity for identity, _ in vectors.search(A, stored[10], 20)} == set(range(20)) - {3, 10, 15}
    assert vectors.num_waiting == 0


def test_what_is_removed_just_when_it_has_come_into_its_cell_is_found_no_more(
    vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = directions(11)
    vectors.add_many(A, range(10), stored[:10])
    vectors.settle()
    add = Cells.add
    after: list[int] = []

    def removed_at_once(cells: Cells, identity: int, code: Codes) -> None:
        add(cells, identity, code)
        vectors.remove(A, [identity])
        after.extend(found for found, _ in vectors.search(A, stored[10], 11))

    monkeypatch.setattr(Cells, "add", removed_at_once)
    vectors.add(A, 10, stored[10])
    vectors.settle()
    assert sorted(after) == list(range(10))
    assert vectors.ids() == {A: set(range(10))}
    assert len(vectors) == 10


def test_what_was_removed_before_a_search_is_not_found_if_it_leaves_its_cell_meanwhile(
    vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = directions(10)
    vectors.add_many(A, range(10), stored)
    vectors.settle()
    search = Cells.search

    def meanwhile(cells: Cells, asked: Floats, k: int) -> list[tuple[int, float]]:
        found = search(cells, asked, k)
        vectors._merging.release()
        vectors.settle()
        return found

    monkeypatch.setattr(Cells, "search", meanwhile)
    vectors._merging.acquire()
    vectors.remove(A, [3])
    assert 3 not in {identity for identity, _ in vectors.search(A, stored[3], 10)}


def test_a_space_that_is_dropped_while_its_cells_are_filled_stays_away(
    vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    vectors.add_many(A, range(10), directions(10))
    assert gate.entered.wait(60)
    vectors.drop(A)
    gate.open.set()
    vectors.settle()
    assert vectors.ids() == {}
    assert len(vectors) == 0


def test_several_threads_search_while_one_adds(vectors: Vectors) -> None:
    stored = directions(600)
    vectors.add_many(A, range(300), stored[:300])
    wrong: list[int] = []

    def search(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(300):
            identity = draw.randrange(300)
            if vectors.search(A, stored[identity], 1)[0][0] != identity:
                wrong.append(identity)

    threads = [threading.Thread(target=search, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for identity in range(300, 600):
        vectors.add(A, identity, stored[identity])
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_space_sees_its_own_vectors_alone(vectors: Vectors) -> None:
    vectors.add(A, 1, directions(1)[0])
    assert vectors.search(B, directions(1)[0], 5) == []
    assert vectors.search(A, directions(1)[0], 0) == []


@pytest.mark.parametrize("vector", [np.zeros(DIMENSIONS), np.full(DIMENSIONS, np.nan), np.ones(3), np.full(DIMENSIONS, np.inf)])
def test_what_is_no_direction_is_refused(vectors: Vectors, vector: Floats) -> None:
    vectors.add(A, 1, directions(1)[0])
    with pytest.raises(ValueError, match="vector"):
        vectors.add(A, 2, vector)
    with pytest.raises(ValueError, match="vector"):
        vectors.search(A, vector, 1)
    assert vectors.ids() == {A: {1}}


def test_cells_find_nearly_all_of_the_nearest() -> None:
    stored, asked = directions(3000, seed=1), directions(200, seed=2)
    vectors = Vectors(DIMENSIONS)
    vectors.add_many(A, range(3000), stored)
    vectors.settle()
    right = np.argsort(-(asked @ stored.T), axis=1)[:, :4]
    found = [{identity for identity, _ in vectors.search(A, question, 4)} for question in asked]
    assert np.mean([len(ids & set(best.tolist())) / 4 for ids, best in zip(found, right, strict=True)]) > 0.95
    vectors.close()


@given(arrays(np.float32, 16, elements=st.floats(-1e3, 1e3, width=32)))
def test_one_vector_is_encoded_as_it_is_among_many(vector: Floats) -> None:
    if np.abs(vector).max() < 1e-30:  # as good as no direction
        return
    assert np.array_equal(encode_one(vector), encode(np.stack([vector, 2 * vector]))[0])


@pytest.mark.parametrize("vector", [np.zeros(4), np.full(4, np.nan), np.array([1, np.inf, 0, 0]), np.array([-np.inf, 1, 0, 0])])
def test_one_vector_without_a_direction_is_not_encoded(vector: Floats) -> None:
    with pytest.raises(ValueError, match="must be finite, and not zero"):
        encode_one(vector.astype(np.float32))


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(vectors: Vectors, tmp_path: Path) -> Path:
    """Cells, and some rows."""
    vectors.add_many(A, range(20), directions(20))
    vectors.settle()
    vectors.add_many(B, range(100, 103), directions(3, seed=5))
    vectors.save(tmp_path / "vectors")
    return tmp_path / "vectors"


def test_what_was_saved_is_found_again_and_can_be_added_to(saved: Path) -> None:
    loaded = Vectors.load(saved, DIMENSIONS, small=SMALL)
    assert loaded.ids() == {A: set(range(20)), B: {100, 101, 102}}
    assert [loaded.search(A, vector, 1)[0][0] for vector in directions(20)] == list(range(20))
    loaded.add(A, 50, directions(1, seed=9)[0])
    loaded.settle()
    assert loaded.search(A, directions(1, seed=9)[0], 1)[0][0] == 50
    loaded.close()


def test_what_was_removed_is_not_in_the_file(vectors: Vectors, tmp_path: Path) -> None:
    stored = directions(20)
    vectors.add_many(A, range(20), stored)
    vectors.settle()
    vectors.add_many(B, range(100, 105), stored[:5])
    before = tmp_path / "before"
    vectors.save(before)
    vectors.remove(A, range(10))
    vectors.remove(B, range(100, 105))
    vectors.save(tmp_path / "after")
    codes = [code.tobytes() for code in encode(stored)]
    assert [code in before.read_bytes() for code in codes] == [True] * 20
    assert [code in (tmp_path / "after").read_bytes() for code in codes] == [False] * 10 + [True] * 10
    vectors.settle()
    assert vectors.ids() == {A: set(range(10, 20))}


def test_a_file_with_any_byte_changed_or_missing_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        place = draw.randrange(len(whole))
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        with pytest.raises(VectorsDamaged):
            Vectors.load(saved, DIMENSIONS)
        saved.write_bytes(whole[:place])
        with pytest.raises(VectorsDamaged):
            Vectors.load(saved, DIMENSIONS)


def test_a_foreign_file_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(b"not vectors at all" * 100)
    with pytest.raises(VectorsDamaged, match="holds no vectors"):
        Vectors.load(tmp_path / "foreign", DIMENSIONS)
    with pytest.raises(VectorsDamaged, match="16 dimensions, not 17"):
        Vectors.load(saved, DIMENSIONS + 1)
    with pytest.raises(FileNotFoundError):
        Vectors.load(tmp_path / "none", DIMENSIONS)


def test_a_file_of_an_earlier_format_is_refused(saved: Path) -> None:
    content = bytearray(saved.read_bytes()[:-16])
    content[8:12] = (1).to_bytes(4, "little")
    saved.write_bytes(content + blake2b(content, digest_size=16).digest())
    with pytest.raises(VectorsDamaged, match="format 1, not 2"):
        Vectors.load(saved, DIMENSIONS)


def test_nobody_else_may_read_the_file(saved: Path) -> None:
    assert saved.stat().st_mode & 0o077 == 0


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 300, 2000])
def test_a_full_disk_leaves_the_file_of_before(vectors: Vectors, saved: Path, size: int) -> None:
    before = saved.read_bytes()
    vectors.add_many(A, range(200, 300), directions(100, seed=7))
    vectors.settle()
    with files_of_at_most(size), pytest.raises(OSError, match=r".*"):
        vectors.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["vectors"]
    vectors.save(saved)
    assert len(Vectors.load(saved, DIMENSIONS)) == 123
