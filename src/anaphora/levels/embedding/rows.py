"""Vectors as the bytes that are kept of them, many at once: for one text at a time NumPy would take longer than all else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""One row for each text."""

Storage = Literal["float16", "int8", "float32"]
_DTYPES: dict[Storage, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "float32": np.dtype("<f4"),
}
_STORAGES: tuple[Storage, ...] = ("float16", "int8", "float32")
_MOST_FLOAT16 = 65504.0
_SIGN_AND_REST = np.int32(-0x70002000)
"""0x8fffe000: of a float16 that was widened as an integer with its sign, and moved left by 13 bits."""
_EXPONENTS_APART = np.float32(2.0**112)
"""Exponents of float32 are counted from 127, those of float16 from 15."""

_HEAD_BYTES = 9
"""Before the numbers: how they are stored, the tokens of the text, and what the numbers are multiplied by."""


@lru_cache(64)
def _form(storage: Storage, num_numbers: int) -> np.dtype[Any]:
    """Of one row."""
    return np.dtype([("storage", "u1"), ("tokens", "<u4"), ("scale", "<f4"), ("numbers", _DTYPES[storage], (num_numbers,))])


def written(vectors: Vectors, num_tokens: Sequence[int], storage: Storage) -> list[bytes]:
    """What is kept of each text."""
    if storage == "float16" and not np.abs(vectors).max(initial=0.0) <= _MOST_FLOAT16:
        if len(vectors) > 1:  # the others are kept as they would be alone
            return [row for one, num in zip(vectors, num_tokens, strict=True) for row in written(one[None], [num], storage)]
        storage = "float32"
    form = _form(storage, vectors.shape[1])
    table = np.empty(len(vectors), form)
    table["storage"] = _STORAGES.index(storage)
    table["tokens"] = num_tokens
    table["scale"] = 1.0
    if storage == "int8":
        most = np.abs(vectors).max(axis=1, initial=0.0)
        scales = np.where(most > 0, most / np.float32(127), np.float32(1))
        table["scale"] = scales
        vectors = np.rint(vectors / scales[:, None])
    table["numbers"] = vectors
    data = table.tobytes()
    return [data[start : start + form.itemsize] for start in range(0, len(data), form.itemsize)]


def readable(row: bytes) -> bool:
    """Whether it is of this version."""
    return len(row) >= _HEAD_BYTES and row[0] < len(_STORAGES)


def read(rows: Sequence[bytes]) -> tuple[Vectors, list[int]]:
    """The vectors, and how many tokens each text has. Of one space, so that nearly always all are stored in one way."""
    if not rows:
        return np.zeros((0, 0), np.float32), []
    size, data = len(rows[0]), b"".join(rows)
    kinds = data[::size]
    if list(map(len, rows)).count(size) < len(rows) or kinds.count(kinds[:1]) < len(kinds):
        apart = [read((row,)) for row in rows]
        return np.concatenate([vectors for vectors, _ in apart]), [num for _, (num,) in apart]
    storage = _STORAGES[rows[0][0]]
    table = np.frombuffer(data, _form(storage, (size - _HEAD_BYTES) // _DTYPES[storage].itemsize))
    num_tokens: list[int] = table["tokens"].tolist()
    if storage == "float16":
        return _widened(table["numbers"]), num_tokens
    vectors: Vectors = table["numbers"].astype(np.float32)
    if storage == "int8":
        vectors *= table["scale"][:, None]
    return vectors, num_tokens


def _widened(halves: NDArray[np.float16]) -> Vectors:
    """The same numbers, all finite, by moving sign and rest to where float32 has them: five times as fast as NumPy does it
    one by one. Powers of two are exact, so that the multiplication only mends the exponent."""
    bits = halves.view("<i2").astype(np.int32)
    bits <<= 13
    bits &= _SIGN_AND_REST
    vectors: Vectors = bits.view(np.float32)
    vectors *= _EXPONENTS_APART
    return vectors
