"""A number in shared memory: how processes learn that something was forgotten, at the price of one memory read."""

from __future__ import annotations

import mmap
import os
import secrets
from pathlib import Path

_SIZE = 8


class SharedEpoch:
    """Eight mapped bytes of a file. Raises OSError when the file cannot be opened or made.

    A new epoch is drawn at random rather than counted up: two processes that change it at once cannot undo each other.
    """

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < _SIZE:
                os.pwrite(fd, secrets.token_bytes(_SIZE), 0)  # written, not truncated: a hole could fault on a full disk
            self._inode = _inode(os.fstat(fd))
            self._map = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        self._path = path
        # Native format: read and written by one 8-byte copy.
        self._cell = memoryview(self._map).cast("Q")

    def read(self) -> int:
        return self._cell[0]

    def change(self) -> None:
        self._cell[0] = secrets.randbits(64)

    def replaced(self) -> bool:
        """True if the path no longer leads to the mapped file: somebody removed the folder."""
        try:
            return _inode(os.stat(self._path)) != self._inode
        except OSError:
            return True


def _inode(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino
