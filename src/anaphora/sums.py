"""Numbers that only grow, by name, summed over all gateway processes of one server.

Each process adds to cells of its own, in mapped memory: nothing is asked of anybody when a request is counted, whoever is asked
for the totals reads everybody's, and what a process had counted when it died stays counted.

    header     bytes in use (8)
    record     length of the name, number of cells (4 + 4) · name as JSON, padded to 8 · the cells (8 each), doubles
    record     ...
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
from collections.abc import Iterator, MutableSequence
from pathlib import Path
from typing import cast

import msgspec

log = logging.getLogger(__name__)

Name = tuple[str, ...]
"""What is counted, and its labels."""
Totals = dict[str, dict[tuple[str, ...], list[float]]]
"""By what is counted, and by labels."""

_USED = struct.Struct("=Q")
_RECORD = struct.Struct("=II")
_CELL = 8
_FIRST_BYTES = 1 << 16

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Name).decode


class Sums:
    """The cells of one process; for one thread.

    With `path`, in a file beside those of the neighbours (all `*.sums` of its folder). A process that takes the place of one
    that died goes on with its file. Without, in memory that nobody else sees.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._rows: dict[Name, int] = {}
        self._map, self._used = self._open()
        self.cells = self._cells()
        """All cells. A place in it is what `row` returns; to be read anew after every `row`, which may replace it."""

    def row(self, name: Name, num_cells: int = 1) -> int:
        """Where the cells of `name` begin. They are zero at first."""
        row = self._rows.get(name)
        return self._append(name, num_cells) if row is None else row

    def totals(self) -> Totals:
        """All sums, over all processes, as they are now."""
        totals: Totals = {}
        for share in (self._map[:], *self._neighbours()):
            for (what, *labels), start, end in _records(share):
                cells = struct.unpack_from(f"={(end - start) // _CELL}d", share, start)
                of_what = totals.setdefault(what, {})
                before = of_what.get(tuple(labels)) or [0.0] * len(cells)
                of_what[tuple(labels)] = [a + b for a, b in zip(before, cells, strict=True)]
        return totals

    def _neighbours(self) -> Iterator[bytes]:
        if self._path is not None:
            yield from (path.read_bytes() for path in self._path.parent.glob("*.sums") if path != self._path)

    # -- the memory ----------------------------------------------------------------------------------------------------

    def _open(self) -> tuple[mmap.mmap, int]:
        if self._path is None:
            return mmap.mmap(-1, _FIRST_BYTES), _USED.size
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size < _FIRST_BYTES:
                _fill(fd, size, _FIRST_BYTES)
            mapped = mmap.mmap(fd, max(size, _FIRST_BYTES))
        finally:
            os.close(fd)
        used = _USED.size
        for name, start, end in _records(mapped[:]):
            self._rows[name] = start // _CELL
            used = end
        return mapped, used

    def _cells(self) -> MutableSequence[float]:
        return cast("MutableSequence[float]", memoryview(self._map).cast("d"))  # its declared items are integers

    def _append(self, name: Name, num_cells: int) -> int:
        told = _encode(name)
        told = told.ljust(-(-len(told) // _CELL) * _CELL)
        start = self._used + _RECORD.size + len(told)
        end = start + num_cells * _CELL
        if end > len(self._map):
            self._grow(end)
        self._map[self._used : end] = _RECORD.pack(len(told), num_cells) + told + bytes(num_cells * _CELL)
        _USED.pack_into(self._map, 0, end)  # last: from here on others read it
        self._used = end
        self._rows[name] = row = start // _CELL
        return row

    def _grow(self, least: int) -> None:
        size = len(self._map)
        while size < least:
            size *= 2
        try:
            self._map = self._larger(size)
        except OSError as error:
            # Counting must not fail a request. From here on the neighbours see what was counted so far, and no more.
            log.warning("the shared counters in %s cannot grow, counting for one process alone: %s", self._path, error)
            self._path = None
            self._map = self._larger(size)
        self.cells = self._cells()

    def _larger(self, size: int) -> mmap.mmap:
        if self._path is None:
            larger = mmap.mmap(-1, size)
            larger[: len(self._map)] = self._map[:]
            return larger
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _fill(fd, len(self._map), size)
            return mmap.mmap(fd, size)
        finally:
            os.close(fd)


def _fill(fd: int, start: int, end: int) -> None:
    """Zeros that are really there: a hole could fault on a full disk."""
    written = os.pwrite(fd, bytes(end - start), start)
    if written < end - start:
        raise OSError("the disk is full")


def _records(data: bytes) -> Iterator[tuple[Name, int, int]]:
    """(name, start of its cells, their end), in bytes."""
    end = min(_USED.unpack_from(data)[0], len(data)) if len(data) >= _USED.size else 0
    at = _USED.size
    while at < end:
        length, num_cells = _RECORD.unpack_from(data, at)
        start = at + _RECORD.size + length
        at = start + num_cells * _CELL
        yield _decode(data[start - length : start]), start, at
