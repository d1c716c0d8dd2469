"""Vectors of a large space: in cells, each around a centroid (an inverted file, IVF, whose cells are divided as they fill).

A search looks at the cells whose centroids are nearest, at the signs of components alone: a bit each, those of a cell side by
side, so that memory is read in runs. Only the few whose signs agree best are compared in full.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from anaphora.vectors.centroids import Centroids, direction, halved
from anaphora.vectors.rows import DEAD, Codes, Floats, Ids, inverse_lengths

MOST = 256
"""Vectors of a cell. One more, and it is divided in two."""
SCANNED = 2000
"""So many vectors are looked at by their signs, by whole cells, the nearest first."""
COMPARED = 64
"""So many of them are compared in full: those whose signs agree best. More where vectors are short, as signs say less there."""
_SIGNS_COMPARED: Final = 16_384
_NEIGHBOURS = 16
"""Cells around one that is divided, whose vectors may change over."""
_GROWTH = 1.25
ENTRY_BYTES = 215
"""Of a vector beside its components and signs: where it lies, by its id; measured."""

_HEAD = struct.Struct("<Q")

_Words = npt.NDArray[np.uint64]
Item = TypeVar("Item", bound=np.generic)


class Cells:
    """Similarities are cosines of the encoded vectors. One thread at a time may change it; any number may search meanwhile, and
    waits at most while a cell is divided among its neighbours (`_divide`)."""

    def __init__(self, dimensions: int) -> None:
        self._dimensions = dimensions
        self._lock = threading.Lock()
        """Held while what a search reads is changed, and by searches while they read."""
        self._codes: Codes = np.empty((0, dimensions), np.int8)
        self._scales: Floats = np.empty(0, np.float32)
        self._ids: Ids = np.empty(0, np.int64)
        self._cell_of: Ids = np.empty(0, np.int64)
        self._stop = 0
        self._free: list[int] = []
        """Places below `_stop` that nothing lies in."""
        self._places: dict[int, int] = {}
        """By id."""
        self._cells: dict[int, _Words] = {}
        """Columns: of each vector the signs, 64 a word, and in the last row its place. They are replaced, never written to."""
        self._centroids = Centroids(dimensions)
        """By the number of the cell."""
        self._num_made = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        """About."""
        return len(self._places) * (self._dimensions + self._dimensions // 8 + ENTRY_BYTES)

    def ids(self) -> Ids:
        return np.fromiter(self._places, np.int64, len(self._places))

    # -- adding and removing -------------------------------------------------------------------------------------------

    def add(self, identity: int, code: Codes) -> None:
        """One that is there stays as it is: where dividing its cell failed, it may come again."""
        if identity in self._places:
            return
        place = self._room()
        column = self._columns(code[np.newaxis], np.array([place]))
        scale = inverse_lengths(code[np.newaxis])[0]
        vector = code * scale
        home = next(iter(self._centroids.nearest(vector, 1)), None)
        with self._lock:
            self._codes[place] = code
            self._scales[place] = scale
            self._ids[place] = identity
            if home is None:
                self._open(column, vector)
            else:
                self._put(home, np.concatenate((self._cells[home], column), axis=1))
        self._places[identity] = place
        if home is not None and self._cells[home].shape[1] > MOST:
            self._divide(home)

    def remove(self, identity: int) -> None:
        """Nothing of it is left here. Unknown ones are fine."""
        place = self._places.pop(identity, None)
        if place is None:
            return
        with self._lock:
            number = int(self._cell_of[place])
            cell = self._cells[number]
            self._put(number, cell[:, cell[-1] != place])
            self._codes[place] = 0
            self._ids[place] = DEAD
        self._free.append(place)

    # -- searching -----------------------------------------------------------------------------------------------------

    def search(self, vector: Floats, k: int) -> list[tuple[int, float]]:
        """(id, similarity) of about the `k` nearest to a vector of length one, the nearest first."""
        asked = self._signs((vector > 0)[np.newaxis])
        num_compared = max(COMPARED, 4 * k, _SIGNS_COMPARED // self._dimensions)
        with self._lock:
            cells = self._around(vector, max(SCANNED, num_compared))
            if not cells:
                return []
            columns = np.concatenate(cells, axis=1)
            places = columns[-1].astype(np.intp)
            if len(places) > num_compared:
                apart = np.bitwise_count(columns[:-1] ^ asked).sum(axis=0, dtype=np.int32)
                places = places[apart <= np.partition(apart, num_compared - 1)[num_compared - 1]]
            similarities = self._codes.take(places, axis=0).astype(np.float32).dot(vector) * self._scales[places]
            first = (-similarities).argsort()[:k]
            return list(zip(self._ids[places[first]].tolist(), similarities[first].tolist(), strict=True))

    def _around(self, vector: Floats, num: int) -> list[_Words]:
        """The cells whose centroids are nearest, until they have `num` vectors."""
        if not self._cells:
            return []
        # Twice as many cells as that takes on average: the small ones are not to be too few.
        num_cells = min(len(self._cells), 1 + 2 * num * len(self._cells) // max(1, len(self._places)))
        found = []
        for number in self._centroids.nearest(vector, num_cells):
            found.append(self._cells[number])
            num -= found[-1].shape[1]
            if num <= 0:
                break
        return found

    # -- cells ---------------------------------------------------------------------------------------------------------

    def _divide(self, number: int) -> None:
        """In two, by two-means. Then every vector of them and of the cells around goes where its nearest centroid is: else
        cells would keep what they took in when there were fewer, and searches would have to look at twice as many vectors."""
        cell = self._cells[number]
        first, centroids = halved(self._vectors(cell[-1]))
        with self._lock:
            for half, centroid in zip((first, ~first), centroids, strict=True):
                self._open(cell[:, half], centroid)
            self._put(number, cell[:, :0])
        around = self._centroids.nearest(direction(centroids.sum(axis=0)), _NEIGHBOURS + 2)
        cells = [self._cells[one] for one in around]
        columns = np.concatenate(cells, axis=1)
        home = np.repeat(np.arange(len(cells)), [one.shape[1] for one in cells])
        nearest = np.argmax(self._vectors(columns[-1]) @ self._centroids.vectors(around).T, axis=1)
        full = np.isin(nearest, np.flatnonzero(np.bincount(nearest) > MOST))
        nearest[full] = home[full]  # where very many are alike, they would all be back in one cell
        changed = [(one, columns[:, nearest == place]) for place, one in enumerate(around)]
        with self._lock:
            for one, members in changed:
                self._put(one, members)

    def _vectors(self, places: npt.NDArray[np.unsignedinteger]) -> Floats:
        """Of length one."""
        vectors: Floats = self._codes[places] * self._scales[places, np.newaxis]
        return vectors

    def _open(self, columns: _Words, centroid: Floats) -> None:
        """A cell more. The lock is held."""
        number = self._num_made
        self._num_made += 1
        self._centroids.add(number, centroid)
        self._put(number, columns)

    def _put(self, number: int, columns: _Words) -> None:
        """What the cell holds from now on; an empty one goes. The lock is held."""
        if columns.shape[1]:
            self._cells[number] = columns
            self._cell_of[columns[-1]] = number
        else:
            del self._cells[number]
            self._centroids.remove(number)

    def _columns(self, codes: Codes, places: npt.NDArray[np.integer]) -> _Words:
        return np.concatenate((self._signs(codes > 0), places.astype(np.uint64)[np.newaxis]))

    def _signs(self, positive: npt.NDArray[np.bool_]) -> _Words:
        """A column for each row, 64 components a word."""
        packed = np.packbits(positive, axis=1)
        if missing := -packed.shape[1] % 8:
            packed = np.pad(packed, ((0, 0), (0, missing)))
        return np.ascontiguousarray(packed.view(np.uint64).T)

    def _room(self) -> int:
        """A place for one more."""
        if self._free:
            return self._free.pop()
        if self._stop == len(self._ids):
            self._resize(max(64, int(_GROWTH * self._stop)))
        self._stop += 1
        return self._stop - 1

    def _resize(self, capacity: int) -> None:
        """Searches go on while tables are copied."""
        codes, scales = _longer(self._codes, capacity), _longer(self._scales, capacity)
        ids, cell_of = _longer(self._ids, capacity), _longer(self._cell_of, capacity)
        with self._lock:
            self._codes, self._scales, self._ids, self._cell_of = codes, scales, ids, cell_of

    # -- the file ------------------------------------------------------------------------------------------------------

    def parts(self) -> Iterator[bytes]:
        """All that there is, for `restored`: how many cells, how many vectors each has, their ids, their codes."""
        cells = [cell[-1] for cell in self._cells.values()]
        yield _HEAD.pack(len(cells))
        yield np.array([len(places) for places in cells], "<u4").tobytes()
        for places in cells:
            yield self._ids[places].astype("<i8").tobytes()
        for places in cells:
            yield self._codes[places].tobytes()

    @classmethod
    def restored(cls, dimensions: int, saved: memoryview) -> Cells:
        """Raises ValueError where `saved` is not what `parts` gave."""
        made = cls(dimensions)
        if len(saved) < _HEAD.size:
            raise ValueError("cells are cut short")
        (num_cells,) = _HEAD.unpack_from(saved)
        ids_at = _HEAD.size + 4 * num_cells
        sizes = np.frombuffer(saved[_HEAD.size : ids_at], "<u4").astype(np.int64)
        num = int(sizes.sum())
        codes_at = ids_at + 8 * num
        if len(sizes) != num_cells or len(saved) != codes_at + dimensions * num or not sizes.all():
            raise ValueError("cells are of another length than they say")
        made._resize(num)
        made._ids[:] = np.frombuffer(saved[ids_at:codes_at], "<i8")
        made._codes[:] = np.frombuffer(saved[codes_at:], np.int8).reshape(-1, dimensions)
        made._stop = num
        made._places = dict(zip(made._ids.tolist(), range(num), strict=True))
        start = 0
        for size in sizes.tolist():
            place = slice(start, start + size)
            codes = made._codes[place]
            made._scales[place] = inverse_lengths(codes)
            columns = made._columns(codes, np.arange(start, start + size))
            made._open(columns, direction(made._vectors(columns[-1]).sum(axis=0)))
            start += size
        return made


def _longer(table: npt.NDArray[Item], capacity: int) -> npt.NDArray[Item]:
    longer = np.empty((capacity, *table.shape[1:]), table.dtype)
    longer[: len(table)] = table
    return longer
