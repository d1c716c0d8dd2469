"""Traces of keys in shared memory: how a process knows without asking the index that a key is not there.

A Bloom filter over mapped bytes. A key that is there has left its trace; one that is not may look as if it had, which costs
a question to the index. What leaves the index leaves its trace behind until all of them are gathered anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from mmap import mmap
from pathlib import Path
from struct import Struct

from anaphora.tiers.disk.mapped import Mapped
from anaphora.types import Key

_SIZE = 1 << 20
"""Bytes. A million keys take a question to the index for 2 of 100 that are not there, a hundred thousand for none of 10,000."""
_BITS = 8 * _SIZE
_places = Struct("<4I").unpack_from  # of a digest: any of its bytes are as good as drawn
_BIT = tuple(1 << number for number in range(8))


class SharedTraces(Mapped):
    """Raises OSError when the file cannot be opened or made. Changed only by whoever holds the index's write lock."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, bytes(_SIZE))

    def has(self, key: Key) -> bool:
        """False: the key is certainly not there, and was not when this was asked."""
        cells = self._map
        return all(cells[place % _BITS >> 3] & _BIT[place & 7] for place in _places(key))

    def add(self, key: Key) -> None:
        """Before the key itself is there for others to see."""
        _leave(self._map, key)

    def gather(self, keys: Iterable[Key]) -> None:
        """Those of `keys`, which are all that there are, and no others. Others may look on: what was and is there is at no
        moment missing."""
        cells = bytearray(_SIZE)
        for key in keys:
            _leave(cells, key)
        self._map[:] = bytes(cells)


def _leave(cells: bytearray | mmap, key: Key) -> None:
    for place in _places(key):
        cells[place % _BITS >> 3] |= _BIT[place & 7]
