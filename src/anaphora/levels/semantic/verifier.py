"""May the answer to one question be given to another? A small model's word on it, as a probability."""

from __future__ import annotations

import hashlib
import io
import math
from functools import cache
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from anaphora.levels.semantic.features import features, plain_features
from anaphora.levels.semantic.reading import read
from anaphora.levels.semantic.trees import FIELDS, Trees
from anaphora.levels.semantic.words import DATA

if TYPE_CHECKING:
    from anaphora.levels.semantic.texts import Prepared

MOST: Final = 0.999
"""What differs at all is never certain: 1 is kept for the same content."""


class _Model:
    """Trees, and the line that makes a probability of their score."""

    def __init__(self, trees: Trees, slope: float, offset: float) -> None:
        self._trees = trees
        self._slope = slope
        self._offset = offset

    def probability(self, row: list[float]) -> float:
        return min(MOST, 1.0 / (1.0 + math.exp(-(self._slope * self._trees.score(row) + self._offset))))


class Verifier:
    """One model for English, and one for all else that looks at nothing but words that agree: same words, slips of the pen,
    numbers, names, order. Neither changes once it is loaded, so threads may share it."""

    def __init__(self, english: _Model, plain: _Model, threshold: float, plain_threshold: float, fingerprint: str) -> None:
        self._english = english
        self._plain = plain
        self.threshold = threshold
        """The probability from which few enough English traps pass, guards included. Fixed in training."""
        self.plain_threshold = plain_threshold
        self.fingerprint = fingerprint
        """Hexadecimal; another one where the weights or the lexicon are others."""

    @classmethod
    def load(cls) -> Self:
        """The model that is shipped."""
        weights = (DATA / "verifier.npz").read_bytes()
        with np.load(io.BytesIO(weights)) as saved:
            models = []
            for name in ("english", "plain"):
                slope, offset, threshold = saved[f"{name}_calibration"].tolist()
                trees = Trees({field: saved[f"{name}_{field}"] for field in FIELDS})
                models.append((_Model(trees, slope, offset), threshold))
        (english, threshold), (plain, plain_threshold) = models
        fingerprint = hashlib.sha256(weights + (DATA / "words.npz").read_bytes()).hexdigest()[:16]
        return cls(english, plain, threshold, plain_threshold, fingerprint)

    def probability(self, a: Prepared, b: Prepared, similarity: float) -> float:
        """That the answer to one is the right answer to the other, from 0 to 0.999. `similarity` is the cosine of the encoder
        `minilm`; it counts for English alone. 0 where a text could not be read."""
        if not a.tokens or not b.tokens or a.language != b.language:
            return 0.0
        # One order of the two, so that the last bit of the result does not depend on it.
        one, other = (read(a), read(b)) if a.text <= b.text else (read(b), read(a))
        if a.language == "en":
            return self._english.probability(features(one, other, similarity))
        return self._plain.probability(plain_features(one, other))


@cache
def shipped() -> Verifier:
    """The verifier of this process."""
    return Verifier.load()
