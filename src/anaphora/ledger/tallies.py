"""Counts of tenants in memory that all gateway processes of one server share: each change is seen by all of them at once.

    header     bytes in use (8)
    record     length of the name (8) · name, padded to 8 · the counts (8 each), signed
    record     ...

A change is made under the file's lock, which ends with the process that holds it. It takes microseconds, so the event loop
waits for it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from anaphora.ledger.limits import NOTHING, Counts

_USED = struct.Struct("=Q")
_COUNTS = struct.Struct(f"={len(NOTHING)}q")
_FIRST_BYTES = 1 << 16


class Tallies:
    """With `path`, in a file that lives as long as the server; without, in memory of this process alone. `first` gives what
    the tenants had used before the server started; it is asked by the first process only."""

    def __init__(self, path: Path | None = None, *, first: Callable[[], Mapping[str, Counts]] = dict) -> None:
        self._thread_lock = threading.Lock()
        self._places: dict[str, int] = {}
        self._read_to = _USED.size
        self._fd = -1 if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._map = mmap.mmap(-1, _FIRST_BYTES)
        with self._lock():
            if self._fd >= 0:
                self._remap(max(_FIRST_BYTES, os.fstat(self._fd).st_size))
            if not self._used():
                _USED.pack_into(self._map, 0, _USED.size)
                for tenant, counts in first().items():
                    self._write(self._place(tenant), counts)

    def read(self, tenant: str) -> Counts:
        with self._lock():
            return _COUNTS.unpack_from(self._map, self._place(tenant))

    def change(self, tenant: str, change: Callable[[Counts], Counts]) -> None:
        """Nobody else changes or reads the counts of `tenant` meanwhile. Where `change` raises, nothing is changed."""
        with self._lock():
            place = self._place(tenant)
            self._write(place, change(_COUNTS.unpack_from(self._map, place)))

    def close(self) -> None:
        self._map.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- the memory, under the lock --------------------------------------------------------------------------------------

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with self._thread_lock:
            if self._fd < 0:
                yield
                return
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _used(self) -> int:
        return int(_USED.unpack_from(self._map)[0])

    def _write(self, place: int, counts: Counts) -> None:
        _COUNTS.pack_into(self._map, place, *counts)

    def _place(self, tenant: str) -> int:
        """Where its counts are; zeros at first."""
        place = self._places.get(tenant)
        if place is None:
            self._read_others()
            place = self._places.get(tenant)
        return self._append(tenant) if place is None else place

    def _read_others(self) -> None:
        """Find what other processes have appended."""
        used = self._used()
        if used > len(self._map):
            self._remap(os.fstat(self._fd).st_size)
        while self._read_to < used:
            length = _USED.unpack_from(self._map, self._read_to)[0]
            start = self._read_to + _USED.size
            place = start + -(-length // 8) * 8
            self._places[self._map[start : start + length].decode()] = place
            self._read_to = place + _COUNTS.size

    def _append(self, tenant: str) -> int:
        name = tenant.encode()
        padded = name.ljust(-(-len(name) // 8) * 8, b"\0")
        place = self._read_to + _USED.size + len(padded)
        end = place + _COUNTS.size
        if end > len(self._map):
            self._remap(2 * max(len(self._map), end))
        self._map[self._read_to : end] = _USED.pack(len(name)) + padded + _COUNTS.pack(*NOTHING)
        _USED.pack_into(self._map, 0, end)
        self._read_to = end
        self._places[tenant] = place
        return place

    def _remap(self, size: int) -> None:
        if self._fd >= 0:
            os.posix_fallocate(self._fd, 0, size)  # really there: a hole could fault on a full disk
            larger = mmap.mmap(self._fd, size)
        else:
            larger = mmap.mmap(-1, size)
            larger[: len(self._map)] = self._map[:]
        self._map.close()
        self._map = larger
