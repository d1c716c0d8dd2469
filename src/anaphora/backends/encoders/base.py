"""The contract every encoder keeps (`anaphora.testing.encoders` checks it), and what they share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    """One row for each text, or one alone."""

Kind = Literal["", "query", "passage"]
"""What a text is for, where a model tells that apart. Empty: it does not."""


class Encoder(Protocol):
    """Texts to vectors of length 1. Used by one thread at a time; every call blocks.

    What a text becomes does not depend on its neighbours in a batch, but for the rounding of sums. Made by its class with
    `threads`, how many it may use for one batch; all but `fingerprint` can be asked of the class itself. That may also have
    `batching`, of the type `BatchingOptions`: what it computes best together."""

    @property
    def name(self) -> str:
        """Of the model, as clients ask for it."""
        ...

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names that clients may use."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Packages without which it cannot be made."""
        ...

    @property
    def dimensions(self) -> int: ...

    @property
    def max_tokens(self) -> int:
        """Of one text, special tokens included. What is longer is cut, so whoever minds asks `num_tokens` before."""
        ...

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What it tells apart, the usual one first."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; another one wherever weights, tokenizer or pooling are others."""
        ...

    def encode(self, texts: Sequence[str], kind: Kind = "") -> Vectors:
        """float32 of the shape (number of texts, `dimensions`). A kind that it does not know is its usual one."""
        ...

    def num_tokens(self, text: str, kind: Kind = "") -> int:
        """Of the whole text, special tokens and the words that go before it included."""
        ...


def fingerprint_of(recipe: str, *files: Path) -> str:
    """Of what is in `files`, and of `recipe`, which names what the code does with it."""
    digest = hashlib.sha256(recipe.encode())
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def normalised(vectors: Vectors) -> Vectors:
    """Each row at length 1; a row of zeros stays what it is."""
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
