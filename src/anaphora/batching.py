"""What to compute together, and when. Pure: time is handed in, and nothing is computed here.

Whoever computes calls `take` whenever it has nothing to do, and while it is busy more gathers by itself, so mostly nobody waits
on purpose. Waiting pays only where more is on its way and computing together is cheaper; `most_wait_s` says for how long, and
then only as long as the pace of what came before lets expect more.

Large requests do not hold up small ones: each batch is begun by whoever was served longest ago.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import msgspec

_SMOOTHING = 0.2
"""Weight of the latest gap between two arrivals, in their mean."""
_PATIENCE = 2.0
"""Mean gaps without an arrival, after which no more is expected."""


class BatchingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    most_tokens: int = 256
    """Of one batch, padding included. An item that is larger is a batch of its own."""
    most_items: int = 64
    most_wait_s: float = 0.0
    """How long an item may wait, while nothing is computed, for others to come. 0: none does."""


class Item(msgspec.Struct, frozen=True):
    """Something to compute."""

    owner: int
    """Whose request it belongs to."""
    number: int
    """Among the owner's."""
    num_tokens: int
    modality: str = "text"
    """Only items of one kind are computed together."""


class Batcher:
    """What is waiting to be computed. For one thread."""

    def __init__(self, options: BatchingOptions = BatchingOptions()) -> None:  # noqa: B008 (frozen)
        self._options = options
        self._waiting: dict[int, list[Item]] = {}
        """By owner, the one who was served longest ago first; each one's in order of their length."""
        self._arrived_s: dict[int, float] = {}
        self._last_s: float | None = None
        self._gap_s: float | None = None

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, items: Iterable[Item], now_s: float) -> None:
        """One arrival: all that an owner asks for."""
        arrived: dict[int, None] = {}
        for item in items:
            self._waiting.setdefault(item.owner, []).append(item)
            self._arrived_s.setdefault(item.owner, now_s)
            arrived[item.owner] = None
        for owner in arrived:
            self._waiting[owner].sort(key=lambda item: (item.modality, item.num_tokens))
        if self._last_s is not None:
            gap_s = now_s - self._last_s
            self._gap_s = gap_s if self._gap_s is None else self._gap_s + _SMOOTHING * (gap_s - self._gap_s)
        self._last_s = now_s

    def drop(self, owner: int) -> None:
        """Nobody wants this owner's any more."""
        self._waiting.pop(owner, None)
        self._arrived_s.pop(owner, None)

    def wait_s(self, now_s: float) -> float | None:
        """For how long to wait before `take`, while nothing is computed. None: there is nothing to take."""
        if not self._waiting:
            return None
        most_s, gap_s = self._options.most_wait_s, self._gap_s
        if most_s <= 0 or self._last_s is None or gap_s is None or gap_s > most_s or self._is_full():
            return 0.0
        until_s = min(min(self._arrived_s.values()) + most_s, self._last_s + _PATIENCE * gap_s)
        return max(0.0, until_s - now_s)

    def take(self) -> list[Item]:
        """The next batch: the longest item of whoever was served longest ago, and those of all others that are nearest to it
        in length and not longer, as many as fit. Empty where nothing is waiting."""
        if not self._waiting:
            return []
        owner = next(iter(self._waiting))
        first = self._waiting[owner][-1]
        alike = [item for item in chain.from_iterable(self._waiting.values()) if item.modality == first.modality]
        own = [item for item in alike if item is not first and item.num_tokens <= first.num_tokens]
        own.sort(key=lambda item: -item.num_tokens)  # stable: among equals, those of whoever has waited longest
        batch = [first, *own[: self._room(first.num_tokens) - 1]]
        self._remove(batch)
        return batch

    def _room(self, num_tokens: int) -> int:
        """How many items fit that are padded to so many tokens."""
        return max(1, min(self._options.most_items, self._options.most_tokens // max(1, num_tokens)))

    def _is_full(self) -> bool:
        longest = self._waiting[next(iter(self._waiting))][-1]
        return len(self) >= self._room(longest.num_tokens)

    def _remove(self, batch: list[Item]) -> None:
        taken = {(item.owner, item.number) for item in batch}
        for owner in dict.fromkeys(item.owner for item in batch):
            left = [item for item in self._waiting.pop(owner) if (item.owner, item.number) not in taken]
            if left:
                self._waiting[owner] = left  # behind all others now
            else:
                del self._arrived_s[owner]
