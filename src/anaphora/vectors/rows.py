"""Vectors one after another, compared with a question one by one: exact, and quick while they are few.

A vector is kept as eight-bit whole numbers, scaled by its own largest component: 1 byte for each dimension.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]
Ids = npt.NDArray[np.int64]

DEAD = -1
"""In the place of the id of a row that was removed."""


def encode(vectors: npt.NDArray[np.floating]) -> Codes:
    """Of several, one a row. Their lengths are lost: only directions are compared. ValueError where there is no direction."""
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0.0)
    if not (np.isfinite(largest) & (largest > 0)).all():
        raise ValueError("a vector must be finite, and not zero")
    codes: Codes = np.rint(vectors * (127.0 / largest)).astype(np.int8)
    return codes


def encode_one(vector: Floats) -> Codes:
    """As `encode` does, for one alone: in half the time."""
    largest = max(float(vector.max(initial=0.0)), -float(vector.min(initial=0.0)))
    if not 0.0 < largest < math.inf:
        raise ValueError("a vector must be finite, and not zero")
    code: Codes = np.rint(vector * np.float32(127.0 / largest)).astype(np.int8)
    return code


def inverse_lengths(codes: Codes) -> Floats:
    """What makes a row's similarity of its product with a vector of length one."""
    lengths: Floats = np.linalg.norm(codes.astype(np.float32), axis=1)
    return 1.0 / lengths


class Rows:
    """Rows in the order they came. Arrays that were handed out are never written to again, but that removed rows are
    cleared."""

    __slots__ = ("_codes", "_ids", "_num_live", "_scales", "_start", "_stop")

    def __init__(self, dimensions: int) -> None:
        self._ids: Ids = np.empty(0, np.int64)
        self._codes: Codes = np.empty((0, dimensions), np.int8)
        self._scales: Floats = np.empty(0, np.float32)
        self._start = self._stop = self._num_live = 0

    def __len__(self) -> int:
        return self._num_live

    @property
    def num_bytes(self) -> int:
        return self._ids.nbytes + self._codes.nbytes + self._scales.nbytes

    def extend(self, ids: Ids, codes: Codes) -> None:
        if self._stop + len(ids) > len(self._ids):
            self._move(2 * (self._num_live + len(ids)) if self._num_live else len(ids))
        place = slice(self._stop, self._stop + len(ids))
        self._ids[place] = ids
        self._codes[place] = codes
        self._scales[place] = inverse_lengths(codes)
        self._stop += len(ids)
        self._num_live += len(ids)

    def remove(self, identity: int) -> bool:
        found = np.flatnonzero(self._ids[self._start : self._stop] == identity)
        if not len(found):
            return False
        place = self._start + int(found[0])
        self._ids[place] = DEAD
        self._codes[place] = 0
        self._num_live -= 1
        return True

    def first(self) -> tuple[int, Codes] | None:
        while self._start < self._stop and self._ids[self._start] == DEAD:
            self._start += 1
        if self._start == self._stop:
            return None
        return int(self._ids[self._start]), self._codes[self._start]

    def drop_first(self, identity: int) -> bool:
        """Drop the first row if it is this one's. Its bytes stay for now: a search may be reading them."""
        first = self.first()
        if first is None or first[0] != identity:
            return False
        self._start += 1
        self._num_live -= 1
        if not self._num_live:
            self._move(0)
        return True

    def live(self) -> tuple[Ids, Codes]:
        """Copies."""
        place = slice(self._start, self._stop)
        kept = self._ids[place] != DEAD
        return self._ids[place][kept], self._codes[place][kept]

    def newest(self, num: int) -> tuple[Ids, Codes, Floats]:
        """At most `num` rows, for `nearest`; views."""
        place = slice(max(self._start, self._stop - num), self._stop)
        return self._ids[place], self._codes[place], self._scales[place]

    def _move(self, capacity: int) -> None:
        """Into new arrays, without what is dead."""
        ids, codes = self.live()
        kept = self._ids[self._start : self._stop] != DEAD
        scales = self._scales[self._start : self._stop][kept]
        num = len(ids)
        self._ids = np.empty(capacity, np.int64)
        self._codes = np.empty((capacity, codes.shape[1]), np.int8)
        self._scales = np.empty(capacity, np.float32)
        self._ids[:num], self._codes[:num], self._scales[:num] = ids, codes, scales
        self._start, self._stop = 0, num


def nearest(rows: tuple[Ids, Codes, Floats], vector: Floats, k: int) -> list[tuple[int, float]]:
    """(id, cosine similarity) of the `k` nearest rows, the nearest first. `vector` is of length one."""
    ids, codes, scales = rows
    similarities = (codes.astype(np.float32) @ vector) * scales
    similarities[ids == DEAD] = -np.inf
    places = np.argpartition(-similarities, k - 1)[:k] if len(ids) > k else np.arange(len(ids))
    found = sorted(zip(similarities[places].tolist(), ids[places].tolist(), strict=True), key=lambda pair: -pair[0])
    return [(identity, similarity) for similarity, identity in found if identity != DEAD]
