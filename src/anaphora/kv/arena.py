"""Extents of token positions in the working arena: where the KV of running sequences lies, contiguous per sequence.

Contiguity is what lets attention read a sequence's keys as one view instead of gathering blocks at every step.
"""

from __future__ import annotations

import bisect


class Arena:
    """First-fit allocator over positions `0 .. capacity-1`. Free extents are kept sorted and merged."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity > 0 else []

    @property
    def num_free(self) -> int:
        return sum(end - start for start, end in self._free)

    def allocate(self, length: int) -> int | None:
        """The start of a free extent of `length` positions, now taken; None where no single extent is that long."""
        if length <= 0:
            raise ValueError(f"an extent has at least one position, not {length}")
        for i, (start, end) in enumerate(self._free):
            if end - start >= length:
                if end - start == length:
                    del self._free[i]
                else:
                    self._free[i] = (start + length, end)
                return start
        return None

    def allocate_at(self, start: int, length: int) -> bool:
        """Take the `length` positions from `start` on. False if any of them is taken, or there are not so many."""
        end = start + length
        i = bisect.bisect_right(self._free, (start, self.capacity)) - 1
        if i < 0 or self._free[i][1] < end:
            return False
        free_start, free_end = self._free[i]
        self._free[i : i + 1] = [(a, b) for a, b in ((free_start, start), (end, free_end)) if a < b]
        return True

    def extend(self, end: int, length: int) -> bool:
        """Take the `length` positions from `end` on, so that the extent ending there grows in place. False if any is taken."""
        i = bisect.bisect_left(self._free, (end, 0))
        if i == len(self._free):
            return False
        start, free_end = self._free[i]
        if start != end or free_end - start < length:
            return False
        if free_end - start == length:
            del self._free[i]
        else:
            self._free[i] = (start + length, free_end)
        return True

    def free(self, start: int, length: int) -> None:
        """Give an extent back. Overlap with a free extent is a ValueError: it would mean two owners."""
        end = start + length
        i = bisect.bisect_left(self._free, (start, end))
        before = self._free[i - 1] if i > 0 else None
        after = self._free[i] if i < len(self._free) else None
        if length <= 0 or start < 0 or end > self.capacity:
            raise ValueError(f"extent {start}..{end} does not lie in 0..{self.capacity}")
        if (before and before[1] > start) or (after and after[0] < end):
            raise ValueError(f"extent {start}..{end} is free already")
        if before and before[1] == start:
            start = before[0]
            i -= 1
            del self._free[i]
        if after and after[0] == end:
            end = after[1]
            del self._free[i]
        self._free.insert(i, (start, end))
