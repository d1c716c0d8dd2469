"""Greedy-Dual-Size-Frequency: what is cheap, large, seldom used or long unused leaves first.

L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Laboratories report
HPL-98-69 (R.1), 1998; after P. Cao and S. Irani, "Cost-Aware WWW Proxy Caching Algorithms", USITS 1997.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)


class _Entry(NamedTuple):
    size: int
    cost: float
    frequency: int
    priority: float
    tick: int


class GDSF(Generic[K]):
    """The key of lowest priority leaves first: priority = age + frequency * cost / size, fixed at the key's last use.

    `age` starts at 0 and is raised to the priority of each key that leaves from the front of the order, so that a key which was
    valuable once and is never used again is overtaken in the end. A key removed from further back (forgotten, expired) says
    nothing about what a place in the cache is worth now: it leaves the age alone. Frequency counts uses since the insertion.
    Among equal priorities the least recently used leaves first.

    O(log n) amortised for insert, touch and remove; the first k victims take O(k log k).
    """

    def __init__(self) -> None:
        self._age = 0.0
        self._tick = 0
        self._entries: dict[K, _Entry] = {}
        # (priority, tick, key). A use pushes a new item and leaves the old one as garbage: an item lives while its entry has
        # its tick. The top is always live, and at most about half of the heap is garbage (`_sweep`).
        self._heap: list[tuple[float, int, K]] = []

    def insert(self, key: K, size: int, cost: float) -> None:
        self._place(key, size, cost, frequency=1)

    def touch(self, key: K) -> None:
        entry = self._entries[key]
        self._place(key, entry.size, entry.cost, entry.frequency + 1)

    def remove(self, key: K) -> None:
        entry = self._entries.pop(key)
        if self._heap[0][1] == entry.tick:
            self._age = entry.priority
        self._tick += 1
        self._sweep()

    def victims(self) -> Iterator[K]:
        """Best-first over the heap's tree: a child is looked at once its parent was, so that nothing is sorted in vain."""
        heap, entries, tick = self._heap, self._entries, self._tick
        frontier = [(*heap[0][:2], 0)] if heap else []
        while frontier:
            _, item_tick, position = heappop(frontier)
            key = heap[position][2]
            for child in range(2 * position + 1, min(2 * position + 3, len(heap))):
                heappush(frontier, (*heap[child][:2], child))
            if key in entries and entries[key].tick == item_tick:
                yield key
                if self._tick != tick:
                    raise RuntimeError("the policy was changed while its victims were walked")

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def _place(self, key: K, size: int, cost: float, frequency: int) -> None:
        self._tick += 1
        priority = self._age + frequency * cost / max(size, 1)
        self._entries[key] = _Entry(size, cost, frequency, priority, self._tick)
        heappush(self._heap, (priority, self._tick, key))
        self._sweep()

    def _sweep(self) -> None:
        """Make the top live again; drop all garbage once it outweighs what lives, which costs O(1) amortised."""
        if len(self._heap) > 2 * len(self._entries) + 16:
            self._heap = [(entry.priority, entry.tick, key) for key, entry in self._entries.items()]
            heapify(self._heap)
            return
        while self._heap and not self._lives(self._heap[0]):
            heappop(self._heap)

    def _lives(self, item: tuple[float, int, K]) -> bool:
        entry = self._entries.get(item[2])
        return entry is not None and entry.tick == item[1]
