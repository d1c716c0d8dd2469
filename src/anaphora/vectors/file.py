"""Vectors in a file: everything in one, with a checksum over all of it, put in its place when it is whole.

magic, format, dimensions
for each space: its rows (ids, codes), its cells
table of the spaces, its length
checksum
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from anaphora.errors import AnaphoraError
from anaphora.vectors.cells import Cells
from anaphora.vectors.rows import Codes, Ids

FORMAT = 2

_MAGIC = b"anaphvec"
_HEAD = struct.Struct("<8sII")
_LENGTH = struct.Struct("<Q")
_DIGEST = 16


class VectorsDamaged(AnaphoraError):
    """A file of vectors is cut short, altered, of another format, or no such file. Says which."""


class Saved(msgspec.Struct):
    """What is saved of a space."""

    space: bytes
    ids: Ids
    codes: Codes
    cells: Cells | None = None


class _Placed(msgspec.Struct, array_like=True):
    space: bytes
    num_rows: int
    cells_bytes: int


def write(path: Path, dimensions: int, spaces: Iterable[Saved]) -> None:
    """Atomic: whoever reads finds the file of before, or this one. Raises OSError."""
    with _workplace(path) as workplace:
        whole = workplace / "whole"
        with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as file:
            output = _Summed(file)
            output.write(_HEAD.pack(_MAGIC, FORMAT, dimensions))
            table: list[_Placed] = []
            for saved in spaces:
                output.write(np.ascontiguousarray(saved.ids, "<i8").tobytes())
                output.write(np.ascontiguousarray(saved.codes).tobytes())
                size = 0
                for part in saved.cells.parts() if saved.cells is not None else ():
                    output.write(part)
                    size += len(part)
                table.append(_Placed(saved.space, len(saved.ids), size))
            encoded = msgspec.msgpack.encode(table)
            output.write(encoded)
            output.write(_LENGTH.pack(len(encoded)))
            file.write(output.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(whole, path)


def read(path: Path, dimensions: int) -> list[Saved]:
    """Raises VectorsDamaged; OSError where the file cannot be read."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _HEAD.size + _LENGTH.size + _DIGEST:
            raise VectorsDamaged(f"{path} is cut short")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as content:
            try:
                return _parse(content, dimensions)
            except (ValueError, msgspec.MsgspecError) as error:
                raise VectorsDamaged(f"{path} cannot be used: {error}") from error


def remove(path: Path) -> None:
    """A file of vectors, or what an interrupted `write` left, which is a folder. Raises OSError."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _parse(content: memoryview, dimensions: int) -> list[Saved]:
    magic, version, found = _HEAD.unpack_from(content)
    if magic != _MAGIC:
        raise ValueError("it holds no vectors")
    if version != FORMAT:
        raise ValueError(f"format {version}, not {FORMAT}")
    if found != dimensions:
        raise ValueError(f"vectors of {found} dimensions, not {dimensions}")
    end = len(content) - _DIGEST
    if blake2b(content[:end], digest_size=_DIGEST).digest() != content[end:]:
        raise ValueError("its checksum does not match")
    (length,) = _LENGTH.unpack_from(content, end - _LENGTH.size)
    table = msgspec.msgpack.decode(content[end - _LENGTH.size - length : end - _LENGTH.size], type=list[_Placed])
    spaces, place = [], _HEAD.size
    for placed in table:
        codes_at = place + 8 * placed.num_rows
        cells_at = codes_at + dimensions * placed.num_rows
        ids = np.frombuffer(content[place:codes_at], "<i8").astype(np.int64)
        codes = np.frombuffer(content[codes_at:cells_at], np.int8).reshape(-1, dimensions).copy()
        place = cells_at + placed.cells_bytes
        cells = Cells.restored(dimensions, content[cells_at:place]) if placed.cells_bytes else None
        spaces.append(Saved(placed.space, ids, codes, cells))
    return spaces


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A folder nobody else may look into."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Summed:
    """Writes, and sums up what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sum = blake2b(digest_size=_DIGEST)

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._sum.update(content)

    def digest(self) -> bytes:
        return self._sum.digest()
