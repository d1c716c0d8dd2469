"""What was forgotten lately, for all gateway processes of one server: a ring of scopes in shared memory.

Asking whether there is news is one memory read. A process that has fallen behind by more than the ring holds is told to forget
everything: that it forgets too much costs time, that it forgets too little would break a promise (invariant 7).
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from anaphora.types import Scope

EVERYTHING = Scope()

_NUM_SLOTS = 256
_SLOT = 256
_HEAD = 8
_SIZE = _HEAD + _NUM_SLOTS * _SLOT

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Scope).decode


class Forgets:
    """One process's view of the file at `path`, which the first one makes. Raises OSError where that is not possible.

    What was told before this view was opened is no news to it.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with self._locked():
            if os.fstat(self._fd).st_size < _SIZE:
                os.pwrite(self._fd, bytes(_SIZE), 0)  # written, not truncated: a hole could fault on a full disk
        self._map = mmap.mmap(self._fd, _SIZE)
        # Native format: read and written by one 8-byte copy.
        self._num_told = memoryview(self._map)[:_HEAD].cast("Q")
        self._num_heard = self._num_told[0]

    def tell(self, scope: Scope) -> None:
        """Let every process know, this one included, before anything of `scope` is erased."""
        told = _encode(scope)
        if len(told) > _SLOT:
            told = _encode(Scope(tenant=scope.tenant))
        if len(told) > _SLOT:
            told = _encode(EVERYTHING)
        with self._locked():
            number = self._num_told[0]
            self._map[_slot(number)] = told.ljust(_SLOT)
            self._num_told[0] = number + 1

    def news(self) -> tuple[Scope, ...]:
        """What was told since the last call."""
        if self._num_told[0] == self._num_heard:
            return ()
        with self._locked():
            first, last = self._num_heard, self._num_told[0]
            told = [self._map[_slot(number)] for number in range(max(first, last - _NUM_SLOTS), last)]
        self._num_heard = last
        return (EVERYTHING,) if last - first > _NUM_SLOTS else tuple(map(_decode, told))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # Held for microseconds, by whoever forgets or has news to read; and it ends with the process that holds it.
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)


def _slot(number: int) -> slice:
    start = _HEAD + number % _NUM_SLOTS * _SLOT
    return slice(start, start + _SLOT)
