"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class LRU(Generic[K]):
    """The key that was not used for the longest time leaves first. Size and cost play no part. O(1) for every verb.

    An OrderedDict, not a dict: the first key of a dict whose front was deleted costs a walk over the gap it left.
    """

    def __init__(self) -> None:
        self._keys: OrderedDict[K, None] = OrderedDict()

    def insert(self, key: K, size: int, cost: float) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)

    def touch(self, key: K) -> None:
        self._keys.move_to_end(key)

    def remove(self, key: K) -> None:
        del self._keys[key]

    def victims(self) -> Iterator[K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys
