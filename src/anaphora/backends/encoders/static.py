"""WordLlama's static vectors: the mean of its tokens' vectors, 256 dimensions, no network at all. Fast, and coarse.

Only the files of its package are read; the package itself would set up logging for the whole process.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anaphora.backends.encoders.base import Kind, fingerprint_of, normalised
from anaphora.batching import BatchingOptions

if TYPE_CHECKING:
    from anaphora.backends.encoders.base import Vectors

_MOST_COUNTED = 2048
_RECIPE = "static 1: mean over tokens, length 1, at most 8192 tokens"


class Static:
    """An `Encoder`."""

    name = "static"
    aliases = ("wordllama", "wordllama-l2-supercat-256")
    needs = ("safetensors", "tokenizers", "wordllama")
    dimensions = 256
    max_tokens = 8192
    kinds: tuple[Kind, ...] = ("",)
    batching = BatchingOptions(most_tokens=1 << 14, most_items=256)
    """Nothing is padded, so what is computed together need not be alike."""

    def __init__(self, *, threads: int = 1) -> None:
        """There is never more than one thread."""
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        found = importlib.util.find_spec("wordllama")
        if found is None or found.origin is None:
            raise ImportError("No module named 'wordllama'")
        folder = Path(found.origin).parent
        weights = folder / "weights" / "l2_supercat_256.safetensors"
        splitting = folder / "tokenizers" / "l2_supercat_tokenizer_config.json"
        self._of_tokens: Vectors = load_file(weights)["embedding.weight"].astype(np.float32)
        self._tokenizer = Tokenizer.from_file(str(splitting))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._counted: dict[str, list[int]] = {}
        """Tokens of texts that were counted and not encoded yet: to split a text takes half of the time."""
        self.fingerprint = fingerprint_of(_RECIPE, weights, splitting)

    def encode(self, texts: Sequence[str], kind: Kind = "") -> Vectors:
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for row, ids in zip(vectors, self._split(texts), strict=True):
            if ids:
                row[:] = self._of_tokens[ids[: self.max_tokens]].mean(axis=0)
        return normalised(vectors)

    def num_tokens(self, text: str, kind: Kind = "") -> int:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if len(self._counted) == _MOST_COUNTED:
            self._counted.clear()
        self._counted[text] = ids
        return len(ids)

    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        counted = [self._counted.pop(text, None) for text in texts]
        rest = [text for text, ids in zip(texts, counted, strict=True) if ids is None]
        split = iter(self._tokenizer.encode_batch(rest, add_special_tokens=False))
        return [next(split).ids if ids is None else ids for ids in counted]
