"""Questions in memory, by what they are found by. Changed only by who holds its owner's lock."""

from __future__ import annotations

from collections.abc import Iterable, KeysView
from itertools import islice

import numpy as np
import numpy.typing as npt

from anaphora.levels.semantic.records import Entry
from anaphora.types import Scope
from anaphora.vectors import Vectors

ENTRY_BYTES = 700
"""About what an entry takes beside its vector, its text and its form: 560 to 780 were measured."""


class Remembered:
    def __init__(self, dimensions: int) -> None:
        self.vectors = Vectors(dimensions)
        self.num_unsaved = 0
        """Vectors that came or went since somebody set this to 0."""
        self._entries: dict[int, Entry] = {}
        """The least recently useful first."""
        self._places: dict[bytes, int] = {}
        self._num_written = 0
        """Characters of texts, bytes of forms."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, identity: object) -> bool:
        return identity in self._entries

    @property
    def num_bytes(self) -> int:
        """About."""
        return self.vectors.num_bytes + self._num_written + len(self._entries) * ENTRY_BYTES

    def ids(self) -> KeysView[int]:
        return self._entries.keys()

    def get(self, identity: int) -> Entry | None:
        return self._entries.get(identity)

    def same(self, space: bytes, digest: bytes) -> Entry | None:
        return self._entries.get(self._places.get(space + digest, 0))

    def near(self, space: bytes, vector: npt.ArrayLike, k: int) -> list[tuple[Entry, float]]:
        found = [(self._entries.get(identity), similarity) for identity, similarity in self.vectors.search(space, vector, k)]
        return [(entry, similarity) for entry, similarity in found if entry is not None]

    def least_useful(self, num: int) -> list[int]:
        return list(islice(self._entries, max(0, num)))

    def within(self, scope: Scope) -> list[int]:
        return [identity for identity, entry in self._entries.items() if entry.within(scope)]

    def add(self, entry: Entry, vector: npt.NDArray[np.float16] | None) -> None:
        """One of the same content is then found no more by it, and must be removed. Without a vector: it is in `vectors`
        already. Raises ValueError where it is no vector."""
        if vector is not None:
            self.vectors.add(entry.space, entry.id, vector.astype(np.float32))
            self.num_unsaved += 1
        self._places[entry.space + entry.digest] = entry.id
        self._entries[entry.id] = entry
        self._num_written += len(entry.text) + len(entry.form)

    def used(self, identity: int) -> bool:
        """Whether it is there."""
        entry = self._entries.pop(identity, None)
        if entry is None:
            return False
        self._entries[identity] = entry
        return True

    def remove(self, ids: Iterable[int]) -> list[Entry]:
        """Those that were there."""
        gone = [entry for identity in ids if (entry := self._entries.pop(identity, None)) is not None]
        spaces: dict[bytes, list[int]] = {}
        for entry in gone:
            spaces.setdefault(entry.space, []).append(entry.id)
            if self._places.get(entry.space + entry.digest) == entry.id:
                del self._places[entry.space + entry.digest]
            self._num_written -= len(entry.text) + len(entry.form)
        for space, numbers in spaces.items():
            self.vectors.remove(space, numbers)
        self.num_unsaved += len(gone)
        return gone
