"""Which centroids are nearest: all are compared while they are few; of many, a graph says (HNSW, by usearch)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from anaphora.vectors.rows import Floats, encode_one

FEW = 1000
"""So many are compared in about the time that a graph takes, and without its misses."""
LINKS = 16
WIDTH = 64
"""Of the graph: links of each, and how many of the nearest found so far are kept while nearer ones are looked for."""
_ROUNDS = 6
"""Of two-means."""


class Centroids:
    """Directions of length one, by number. Nobody may search while they are changed."""

    def __init__(self, dimensions: int) -> None:
        from usearch.index import Index  # only where a space is large

        self._numbers: list[int] = []
        self._rows: dict[int, int] = {}
        """Of `_table`, by number."""
        self._table: Floats = np.empty((0, dimensions), np.float32)
        self._graph = Index(
            ndim=dimensions, metric="cos", dtype="i8", connectivity=LINKS, expansion_add=WIDTH, expansion_search=WIDTH
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def vectors(self, numbers: Sequence[int]) -> Floats:
        return self._table[[self._rows[number] for number in numbers]]

    def add(self, number: int, vector: Floats) -> None:
        row = len(self._numbers)
        if row == len(self._table):
            table = np.empty((max(16, 2 * row), len(vector)), np.float32)
            table[:row] = self._table
            self._table = table
        self._table[row] = vector
        self._rows[number] = row
        self._numbers.append(number)
        self._graph.add(np.array([number], np.uint64), encode_one(vector)[np.newaxis], threads=1)

    def remove(self, number: int) -> None:
        row, last = self._rows.pop(number), self._numbers.pop()
        if last != number:  # which takes its row
            self._table[row] = self._table[len(self._numbers)]
            self._numbers[row] = last
            self._rows[last] = row
        self._graph.remove(number, threads=1)

    def nearest(self, vector: Floats, k: int) -> list[int]:
        """At most `k`, the nearest first; of many nearly so."""
        if len(self._numbers) > FEW:
            found: list[int] = self._graph.search(encode_one(vector), k, threads=1).keys.tolist()
            return found
        far = self._table[: len(self._numbers)].dot(-vector)
        first = far.argpartition(k)[:k] if k < len(far) else np.arange(len(far))
        return [self._numbers[row] for row in first[far[first].argsort()].tolist()]


def direction(vector: Floats) -> Floats:
    """Of length one. A vector without a direction becomes any."""
    length = math.sqrt(float(vector @ vector))
    if not length:
        vector = np.zeros_like(vector)
        vector[0] = length = 1.0
    return vector / np.float32(length)


def halved(vectors: Floats) -> tuple[npt.NDArray[np.bool_], Floats]:
    """By two-means of directions: which of at least two vectors belong to the one half, and the centroids of both. Neither
    half is empty."""
    one = vectors[np.argmin(vectors @ vectors.mean(axis=0))]
    other = vectors[np.argmin(vectors @ one)]
    for _ in range(_ROUNDS):
        first: npt.NDArray[np.bool_] = vectors @ (one - other) > 0
        if first.all() or not first.any():  # all alike, say
            first = np.arange(len(vectors)) % 2 == 0
        one, other = (direction(vectors[half].sum(axis=0)) for half in (first, ~first))
    return first, np.stack((one, other))
