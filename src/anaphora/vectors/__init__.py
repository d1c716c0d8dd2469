"""The nearest of many vectors, by space: a search sees the vectors of its own space alone.

While a space is small every vector of it is compared (`rows`): exact, and quicker than anything cleverer. A larger space lies
in cells, of which a search looks at the nearest (`cells`). New vectors of a large space are rows first, compared one by one,
until a thread has put them into their cells: they are found at once, and whoever adds does not wait.

Vectors are kept with eight bits for each dimension, which changes a similarity by less than 0.002 (`docs/semantic-index.md`).
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anaphora.vectors.cells import Cells
from anaphora.vectors.file import Saved, VectorsDamaged, read, remove, write
from anaphora.vectors.rows import Rows, encode, nearest

__all__ = ["SMALL", "Vectors", "VectorsDamaged", "remove"]

log = logging.getLogger(__name__)

SMALL = 1000
"""So many vectors are compared about as quickly as they are searched in cells (`benchmarks/vectors.py`)."""
MAX_COMPARED = 2000
"""Of rows that are not in cells yet, as many of the newest are compared, so that a search stays quick while very many come at
once. The rest is found when it is in its cells."""

_SPARE = 4
"""Found beyond those asked for while some of them may be removed already."""


class Vectors:
    """Safe to use from several threads. Nobody waits for the disk or the filling of cells but who calls `save`, `load` or
    `settle`.

    An id is added once and never again, removed or not. Ids are not negative, and below 2 to the 63.
    """

    def __init__(self, dimensions: int, *, small: int = SMALL) -> None:
        self.dimensions = dimensions
        self._small = small
        self._spaces: dict[bytes, _Space] = {}
        self._changes = threading.Condition(threading.Lock())
        """Held for a moment by whoever looks at or changes a space's fields."""
        self._merging = threading.Lock()
        """Held by whoever changes cells. Searches do not need it."""
        self._due: dict[bytes, None] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- what is in it -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        with self._changes:
            return sum(map(len, self._spaces.values()))

    @property
    def num_waiting(self) -> int:
        """Vectors of large spaces that are not in their cells yet."""
        with self._changes:
            return sum(len(self._spaces[space].rows) for space in self._due if space in self._spaces)

    @property
    def num_bytes(self) -> int:
        with self._changes:
            spaces = list(self._spaces.values())
        return sum(space.rows.num_bytes + (space.cells.num_bytes if space.cells is not None else 0) for space in spaces)

    def ids(self) -> dict[bytes, set[int]]:
        """By space."""
        with self._merging, self._changes:
            return {name: space.ids() for name, space in self._spaces.items()}

    # -- adding and removing -------------------------------------------------------------------------------------------

    def add(self, space: bytes, identity: int, vector: npt.ArrayLike) -> None:
        """Raises ValueError where the vector has another number of dimensions, is zero, or is not finite."""
        self.add_many(space, [identity], np.asarray(vector)[np.newaxis])

    def add_many(self, space: bytes, ids: Sequence[int], vectors: npt.NDArray[np.floating]) -> None:
        if vectors.shape != (len(ids), self.dimensions):
            raise ValueError(f"{len(ids)} vectors of {self.dimensions} dimensions are expected, not {vectors.shape}")
        if not ids:
            return
        codes = encode(vectors)
        with self._changes:
            found = self._spaces.get(space)
            if found is None:
                found = self._spaces[space] = _Space(self.dimensions)
            found.rows.extend(np.array(ids, np.int64), codes)
            self._heed(space, found)

    def remove(self, space: bytes, ids: Collection[int]) -> None:
        """None of them is found from now on. Unknown ones are fine."""
        with self._changes:
            found = self._spaces.get(space)
            if found is None:
                return
            for identity in ids:
                was_row = found.rows.remove(identity)
                if identity == found.moving or (not was_row and found.cells is not None):
                    found.gone.add(identity)
            if not found.rows and found.cells is None:
                del self._spaces[space]
            else:
                self._heed(space, found)

    def drop(self, space: bytes) -> None:
        with self._changes:
            self._spaces.pop(space, None)

    # -- searching -----------------------------------------------------------------------------------------------------

    def search(self, space: bytes, vector: npt.ArrayLike, k: int) -> list[tuple[int, float]]:
        """(id, cosine similarity) of the `k` nearest vectors of `space`, the nearest first; in a large space nearly so."""
        with self._changes:
            found = self._spaces.get(space)
            if found is None or k < 1:
                return []
            # Rows first: what goes over into a cell meanwhile is found in either.
            rows, cells = found.rows.newest(MAX_COMPARED), found.cells
            # As they are now: what goes out of its cell meanwhile would not be among them in the end.
            gone = found.gone.copy()
        asked = np.asarray(vector, np.float32)
        if asked.shape != (self.dimensions,) or not 0.0 < (squared := float(asked.dot(asked))) < math.inf:
            raise ValueError(f"not a vector of {self.dimensions} dimensions with a direction")
        asked = asked / np.float32(math.sqrt(squared))
        wanted = k + _SPARE if gone else k
        near = nearest(rows, asked, wanted) if len(rows[0]) else []
        if cells is not None:
            near = _merged(near, cells.search(asked, wanted))
        return [pair for pair in near if pair[0] not in gone][:k]

    # -- the cells -----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Return when everything that was added is where it belongs."""
        with self._changes:
            self._changes.wait_for(lambda: not self._due or self._closed)

    def close(self) -> None:
        """Stop the thread. What is in it can still be searched and saved."""
        with self._changes:
            self._closed = True
            self._changes.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _heed(self, name: bytes, space: _Space) -> None:
        if self._closed or (space.cells is None and len(space.rows) <= self._small):
            return
        self._due[name] = None
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="anaphora-vectors", daemon=True)
            self._thread.start()
        self._changes.notify_all()

    def _run(self) -> None:
        while True:
            with self._changes:
                self._changes.wait_for(lambda: self._due or self._closed)
                if self._closed:
                    return
                name = next(iter(self._due))
            try:
                with self._merging:
                    self._step(name)
            except Exception:  # no memory, say: its rows are still compared
                log.exception("vectors could not be put into their cells")
                with self._changes:
                    self._due.pop(name, None)
                    self._changes.notify_all()

    def _step(self, name: bytes) -> None:
        """One vector out of its cell or into it."""
        with self._changes:
            space = self._spaces.get(name)
            first = None if space is None else space.rows.first()
            gone = None if space is None else next(iter(space.gone), None)
            if space is None or (gone is None and first is None):
                self._finish(name, space)
                return
            cells = space.cells
            space.moving = first[0] if first is not None and gone is None else None
        if cells is None:
            cells = Cells(self.dimensions)
            with self._changes:
                space.cells = cells
        if gone is not None:
            cells.remove(gone)
            with self._changes:
                space.gone.discard(gone)
        elif first is not None:
            cells.add(*first)
            with self._changes:
                if not space.rows.drop_first(first[0]):  # removed meanwhile
                    space.gone.add(first[0])

    def _finish(self, name: bytes, space: _Space | None) -> None:
        del self._due[name]
        if space is not None and space.cells is not None and not len(space.cells):
            del self._spaces[name]
        self._changes.notify_all()

    # -- the file ------------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Into `path`, at once or not at all; nothing that was removed is in it. Vectors are not put into cells meanwhile.
        Raises OSError."""
        with self._merging:
            with self._changes:
                spaces = list(self._spaces.items())
            write(path, self.dimensions, (self._saved(*pair) for pair in spaces))

    def _saved(self, name: bytes, space: _Space) -> Saved:
        if space.cells is not None:
            with self._changes:
                gone = list(space.gone)
            for identity in gone:
                space.cells.remove(identity)
            with self._changes:
                space.gone.difference_update(gone)
        with self._changes:
            return Saved(name, *space.rows.live(), space.cells)

    @classmethod
    def load(cls, path: Path, dimensions: int, *, small: int = SMALL) -> Vectors:
        """What was saved. Raises VectorsDamaged; OSError where there is no file to be read."""
        vectors = cls(dimensions, small=small)
        spaces = read(path, dimensions)
        with vectors._changes:
            for saved in spaces:
                space = vectors._spaces[saved.space] = _Space(dimensions, saved.cells)
                space.rows.extend(saved.ids, saved.codes)
                vectors._heed(saved.space, space)
        return vectors


class _Space:
    """The rows and the cells share no id, but that of the row that is on its way over (`moving`). `gone`: of the cells,
    removed."""

    __slots__ = ("cells", "gone", "moving", "rows")

    def __init__(self, dimensions: int, cells: Cells | None = None) -> None:
        self.rows = Rows(dimensions)
        self.cells = cells
        self.gone: set[int] = set()
        self.moving: int | None = None

    def __len__(self) -> int:
        in_cells = 0 if self.cells is None else len(self.cells) - len(self.gone)
        return len(self.rows) + in_cells

    def ids(self) -> set[int]:
        ids = set(self.rows.live()[0].tolist())
        return ids if self.cells is None else ids | set(self.cells.ids().tolist()) - self.gone


def _merged(rows: list[tuple[int, float]], cells: list[tuple[int, float]]) -> list[tuple[int, float]]:
    if not rows:
        return cells
    found = dict(cells) | dict(rows)
    return sorted(found.items(), key=lambda pair: -pair[1])
