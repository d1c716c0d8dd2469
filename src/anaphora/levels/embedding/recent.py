"""What was asked for lately, by the texts themselves: a digest of each text takes longer than all else that a batch of known
texts needs, and to look into one tier after another takes longer still.

A copy, and never more than that: what is forgotten, here or in another process, has gone with the mark it was put under; what
has expired is not given; and where the store has a newer value, that is put here, too.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from anaphora.store import Mark
from anaphora.tiers.base import ENTRY_OVERHEAD, Entry
from anaphora.types import Key

_MAX_USES = 1 << 12


class Known(NamedTuple):
    """What is kept of a text. No `Entry`: of a whole batch of tuples each field is had at once."""

    key: Key
    row: bytes
    stored_at_s: float
    expires_at_s: float
    """Infinite: never."""
    cost_s: float
    lasting: bool = True
    """Whether it is, or may be, elsewhere than in the memory of this process."""


def known(key: Key, entry: Entry, *, lasting: bool = True) -> Known:
    expires_at_s = math.inf if entry.expires_at_s is None else entry.expires_at_s
    return Known(key, entry.value, entry.stored_at_s, expires_at_s, entry.cost_s, lasting)


class Recent:
    """The latest `capacity_bytes`, first in, first out. `seed` is that of a space's keys; texts of two spaces never meet."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._spaces: dict[bytes, dict[str, Known]] = {}
        self._order: deque[tuple[bytes, str]] = deque()
        """All that is here, each once, the oldest first."""
        self._used = 0
        self._mark: Mark = ()
        self.expires_from_s = math.inf
        """Nothing that is here has expired before."""

    def get(self, seed: bytes, texts: Iterable[str], mark: Mark) -> list[Known | None]:
        """What is here of each of `texts`, expired or not. `mark` is the store's of now."""
        if mark != self._mark:
            self.clear()
            self._mark = mark
        return list(map(self._spaces.get(seed, _NOTHING).get, texts))

    def put(self, seed: bytes, text: str, found: Known, mark: Mark) -> None:
        """`found` is in the store, whose mark is `mark` now."""
        if mark != self._mark:
            self.clear()
            self._mark = mark
        size = _size(text, found)
        before = self._spaces.get(seed, _NOTHING).get(text)
        if before is not None:
            self._used -= _size(text, before)
        elif size <= self._capacity:
            self._order.append((seed, text))
        else:
            return
        self._spaces.setdefault(seed, {})[text] = found
        self.expires_from_s = min(self.expires_from_s, found.expires_at_s)
        self._used += size
        while self._used > self._capacity:
            self._drop(*self._order.popleft())

    def clear(self) -> None:
        self._spaces.clear()
        self._order.clear()
        self._used = 0
        self.expires_from_s = math.inf

    @property
    def used_bytes(self) -> int:
        return self._used

    def __len__(self) -> int:
        return len(self._order)

    def _drop(self, seed: bytes, text: str) -> None:
        space = self._spaces[seed]
        self._used -= _size(text, space.pop(text))
        if not space:
            del self._spaces[seed]


class Uses:
    """What was used and of which the store does not know yet. It need not before it evicts, which it does when something is
    put: until then several uses of one text count as one, the latest."""

    def __init__(self, limit: int = _MAX_USES) -> None:
        """So many, and those of one text are put together before the store asks."""
        self._limit = limit
        self._batches: list[Sequence[Known | None]] = []
        self._num = 0

    def note(self, used: Sequence[Known | None]) -> None:
        self._batches.append(used)
        self._num += len(used)
        if self._num > self._limit:
            self._batches = [self.take()]

    def take(self) -> list[Known]:
        """All of them, which are then told, in the order of their last use."""
        used = [one for batch in self._batches for one in batch if one is not None]
        self._batches, self._num = [], 0
        used.reverse()
        once = dict(zip([one.key for one in used], used, strict=True))
        return list(reversed(once.values()))


_NOTHING: dict[str, Known] = {}


def _size(text: str, found: Known) -> int:
    return sys.getsizeof(text) + len(found.row) + 2 * ENTRY_OVERHEAD
