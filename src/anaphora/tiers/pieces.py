"""What the tiers of a slow medium have in common: writing much in pieces, and telling later what was used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from anaphora.tiers.base import Entry
from anaphora.types import Key

_BATCH_BYTES = 4 << 20
_BATCH_ENTRIES = 64


def batches(entries: Mapping[Key, Entry]) -> Iterator[dict[Key, Entry]]:
    """Pieces that keep the medium busy (or locked) for a short time each."""
    batch: dict[Key, Entry] = {}
    size = 0
    for key, entry in entries.items():
        batch[key] = entry
        size += entry.size
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_ENTRIES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


class Uses:
    """Keys that were used and of which the medium does not know yet, in the order of their last use; the oldest are lost
    where there are too many. So reading need not write."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._keys: dict[Key, None] = {}

    def note(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._keys.pop(key, None)  # to the end
            self._keys[key] = None
            if len(self._keys) > self._limit:
                del self._keys[next(iter(self._keys))]

    def take(self) -> dict[Key, None]:
        """All of them, which are then told."""
        taken, self._keys = self._keys, {}
        return taken

    def take_of(self, keys: Iterable[Key]) -> None:
        """`keys` are told."""
        for key in keys:
            del self._keys[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
