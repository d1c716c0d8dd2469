"""Vectors of many texts, each computed once and kept in a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from anaphora.levels.semantic.evaluation.kept import Vector, Vectors

BATCH = 32

Encode = Callable[[Sequence[str]], Vector]


def encoded(
    texts: Sequence[str], encode: Encode, folder: Path, *, fingerprint: str, progress: Callable[[str], None]
) -> Vectors:
    """From the file in `folder`, whose name is of the texts and of `fingerprint`, what they are encoded with; else computed."""
    name = hashlib.sha256("\0".join((fingerprint, *texts)).encode()).hexdigest()[:24]
    path = folder / f"{name}.npy"
    rows = _read(path, len(texts))
    if rows is None:
        rows = _computed(texts, encode, progress)
        folder.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}.npy")
        np.save(half, rows)
        half.replace(path)
    return dict(zip(texts, rows, strict=True))


def _read(path: Path, num: int) -> Vector | None:
    try:
        rows: Vector = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return rows if rows.ndim == 2 and len(rows) == num and rows.dtype == np.float32 else None


def _computed(texts: Sequence[str], encode: Encode, progress: Callable[[str], None]) -> Vector:
    """Those of a length together."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    parts = []
    for start in range(0, len(order), BATCH):
        if start % (64 * BATCH) == 0:
            progress(f"encoding, {start:,} of {len(order):,} texts")
        parts.append(encode([texts[place] for place in order[start : start + BATCH]]))
    rows = np.empty((len(texts), parts[0].shape[1]), np.float32)
    rows[order] = np.concatenate(parts)
    return rows
