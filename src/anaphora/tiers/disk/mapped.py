"""A small file in the memory of every process on the folder."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path


class Mapped:
    """The first bytes of the file at `path`, as many as `blank` has, which is what a new file holds.

    Raises OSError when the file cannot be opened or made.
    """

    def __init__(self, path: Path, blank: bytes) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Written, not truncated: a hole could fault on a full disk.
            if os.fstat(fd).st_size < len(blank) and os.pwrite(fd, blank, 0) < len(blank):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            self._inode = _inode(os.fstat(fd))
            self._map = mmap.mmap(fd, len(blank))
        finally:
            os.close(fd)
        self._path = path

    def replaced(self) -> bool:
        """True if the path no longer leads to the mapped file: somebody removed it, or the folder."""
        try:
            return _inode(os.stat(self._path)) != self._inode
        except OSError:
            return True


def _inode(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino
