"""What the verifier knows of English words: forms, meanings by WordNet, and a small vector of each. Made by
`scripts/verifier_words.py`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

UNKNOWN: Final = -1
DATA: Final = files("anaphora.levels.semantic") / "data"


class Relation(NamedTuple):
    """What two different words have to do with each other."""

    synonym: bool
    interchangeable: bool
    derived: bool
    broader: bool
    sibling: bool
    opposite: bool
    exclusive: bool


class Words:
    """The lexicon, read once."""

    def __init__(self) -> None:
        with (DATA / "words.npz").open("rb") as file, np.load(file) as data:
            words = data["words"].tobytes().decode().split("\n")
            self._index = {word: place for place, word in enumerate(words)}
            self._lemmas: list[int] = data["lemmas"].tolist()
            vectors: npt.NDArray[np.float32] = data["vectors"].astype(np.float32)
            ranks = data["ranks"].astype(np.float64)
            self._senses, self._sense_ends = data["senses"].tolist(), data["senses_ends"].tolist()
            self._parents, self._parent_ends = data["parents"].tolist(), data["parents_ends"].tolist()
            self._opposite = _pairs(data["opposites"])
            self._derived = _pairs(data["derived"])
            self._interchangeable = _pairs(data["interchangeable"])
            self._exclusive = _pairs(data["exclusive"])
        vectors /= np.sqrt(np.square(vectors).sum(axis=1, keepdims=True)) + np.float32(1e-6)
        # The last row is that of what is unknown.
        self._vectors = np.concatenate([vectors, np.zeros((1, vectors.shape[1]), np.float32)])
        weights = np.clip(np.log(ranks / 1_000.0), 0.5, 4.0) / 4.0
        self._weights: list[float] = weights.tolist()
        self._meanings = cache(self._meanings_of)
        self._above = cache(self._above_of)

    def find(self, word: str) -> int:
        """Its number; `UNKNOWN` if there is none."""
        return self._index.get(word, UNKNOWN)

    def lemma(self, number: int) -> int:
        """The number of what it is a form of, perhaps itself."""
        return self._lemmas[number] if number >= 0 else UNKNOWN

    def weight(self, number: int) -> float:
        """How much it says, from 0 to 1: rare words say more."""
        return self._weights[number] if number >= 0 else 1.0

    def vectors(self, numbers: list[int]) -> npt.NDArray[np.float32]:
        """One row of length 1 for each; zeros where unknown."""
        return self._vectors.take(numbers, axis=0)

    def relation(self, one: int, other: int) -> Relation:
        """Of two lemmas, or of the words themselves where the lemma has none."""
        low, high = (one, other) if one < other else (other, one)
        pair = low << 16 | high
        mine, theirs = self._meanings(one), self._meanings(other)
        above_mine, above_theirs = self._above(one), self._above(other)
        return Relation(
            synonym=not mine.isdisjoint(theirs),
            interchangeable=pair in self._interchangeable,
            derived=pair in self._derived,
            broader=not mine.isdisjoint(above_theirs) or not theirs.isdisjoint(above_mine),
            sibling=not above_mine.isdisjoint(above_theirs),
            opposite=pair in self._opposite,
            exclusive=pair in self._exclusive,
        )

    def _meanings_of(self, word: int) -> frozenset[int]:
        return frozenset(self._senses[self._sense_ends[word] : self._sense_ends[word + 1]])

    def _above_of(self, word: int) -> frozenset[int]:
        ends = self._parent_ends
        # Meanings that are only above others have no row of their own.
        return frozenset(
            up for sense in self._meanings(word) if sense + 1 < len(ends) for up in self._parents[ends[sense] : ends[sense + 1]]
        )


@cache
def words() -> Words:
    """The lexicon of this process."""
    return Words()


def _pairs(rows: npt.NDArray[Any]) -> frozenset[int]:
    low, high = rows.min(axis=1).astype(np.int64), rows.max(axis=1).astype(np.int64)
    return frozenset((low << 16 | high).tolist())
