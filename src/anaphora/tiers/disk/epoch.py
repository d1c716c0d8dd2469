"""A number in shared memory: how processes learn that something was forgotten, at the price of one memory read."""

from __future__ import annotations

import secrets
from pathlib import Path

from anaphora.tiers.disk.mapped import Mapped

_SIZE = 8


class SharedEpoch(Mapped):
    """Eight mapped bytes of a file. Raises OSError when the file cannot be opened or made.

    A new epoch is drawn at random rather than counted up: two processes that change it at once cannot undo each other.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, secrets.token_bytes(_SIZE))
        # Native format: read and written by one 8-byte copy.
        self._cell = memoryview(self._map).cast("Q")

    def read(self) -> int:
        return self._cell[0]

    def change(self) -> None:
        self._cell[0] = secrets.randbits(64)
