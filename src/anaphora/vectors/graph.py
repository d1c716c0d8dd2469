"""Vectors of a large space: a graph in which each is linked to some of its nearest (HNSW, by usearch).

usearch lets searches run side by side and makes them wait while something is added, for as long as that call takes. So only one
vector is added in a call.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anaphora.vectors.rows import Codes, Ids

if TYPE_CHECKING:
    from usearch.index import Index

LINKS = 16
"""Of each vector, on the lowest layer twice as many."""
WIDTH_ADDING = 128
WIDTHS_SEARCHING = ((0, 32), (200_000, 128), (500_000, 192))
"""How many of the nearest found so far are kept while looking for nearer ones, from so many vectors on: among a million, 32
miss more than a quarter of the nearest."""
_LOOK_EVERY = 4096
NODE_BYTES = 270
"""Of a vector's links and keys, measured."""

_SCRUB = 1 << 62
"""Ids from here on are used while scrubbing."""


class Graph:
    """Similarities are cosines of the encoded vectors."""

    def __init__(self, dimensions: int) -> None:
        self._index = _index(dimensions)

    @classmethod
    def restored(cls, dimensions: int, saved: bytes | memoryview) -> Graph:
        """Raises ValueError where `saved` is not what `save` wrote."""
        graph = cls(dimensions)
        try:
            graph._index.load(saved)
        except (RuntimeError, ValueError) as error:
            raise ValueError(str(error)) from error
        if graph._index.ndim != dimensions:
            raise ValueError(f"a graph of {graph._index.ndim} dimensions")
        graph._widen()
        return graph

    def __len__(self) -> int:
        return len(self._index)

    @property
    def num_bytes(self) -> int:
        """About: usearch itself counts address space that it has not used yet."""
        return len(self._index) * (self._index.ndim + NODE_BYTES)

    def add(self, identity: int, code: Codes) -> None:
        self._index.add(np.array([identity], np.uint64), code[np.newaxis], threads=1)
        if len(self._index) % _LOOK_EVERY == 0:
            self._widen()

    def remove(self, identity: int) -> None:
        """The place it leaves is used for the next one, and until then holds what it held: see `scrub`."""
        self._index.remove(identity, threads=1)

    def search(self, code: Codes, k: int) -> list[tuple[int, float]]:
        """(id, similarity) of about the `k` nearest, the nearest first."""
        found = self._index.search(code, k, threads=1)
        return list(zip(found.keys.tolist(), (1.0 - found.distances).tolist(), strict=True))

    def _widen(self) -> None:
        self._index.expansion_search = width(len(self._index))  # type: ignore[misc]  # its setter is not found

    def ids(self) -> Ids:
        return np.asarray(self._index.keys).astype(np.int64)

    def scrub(self) -> None:
        """Write noise over what was removed."""
        num = int(self._index.stats.nodes) - len(self._index)
        if num <= 0:
            return
        noise = np.random.default_rng(num).integers(1, 128, (num, self._index.ndim), np.int8)
        for number in range(num):
            self.add(_SCRUB + number, noise[number])
        for number in range(num):
            self.remove(_SCRUB + number)

    def save(self, path: Path) -> None:
        """Raises OSError."""
        try:
            self._index.save(path)
        except RuntimeError as error:
            raise OSError(str(error)) from error


def width(num: int) -> int:
    """Of a search among `num` vectors."""
    return next(wide for least, wide in reversed(WIDTHS_SEARCHING) if num >= least)


def _index(dimensions: int) -> Index:
    from usearch.index import Index  # only where a space is large

    return Index(
        ndim=dimensions,
        metric="cos",
        dtype="i8",
        connectivity=LINKS,
        expansion_add=WIDTH_ADDING,
        expansion_search=width(0),
    )
