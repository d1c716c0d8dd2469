"""What a replica's prefix cache holds, as far as it can be known from outside.

Whatever was sent to a replica is in its cache until something more recent needs the room: a mirror that evicts by LRU under the
same capacity says what is still there. Two things mend the mirror. The replica's own events, where it publishes them. And the
number of cached tokens in its answers: if a block is gone that was last used at some time, then so is everything that was last
used before it, for a cache by LRU loses the oldest first. A replica that has restarted, or that has less room than was thought,
shows in its first answers, and needs no case of its own.

A chain is touched from its end to its head, so that what remains of a chain is always its beginning.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import msgspec

from anaphora.routing.base import BlocksCleared, BlocksRemoved, BlocksStored, CacheEvent, Question
from anaphora.types import BlockHash

UNKNOWN_CAPACITY_TOKENS = 4_000_000
"""What is remembered of a replica whose capacity is not known."""


class Match(NamedTuple):
    num_blocks: int
    """Of the chain, present."""
    num_tokens: int
    """Present, in whatever place."""
    slower: dict[str, int]
    """Tokens of these that must be loaded first, by medium."""


class Trail(NamedTuple):
    """What a question found when it was sent: enough to learn from the answer, or to take it back."""

    touch: int
    num_blocks: int
    steps: tuple[tuple[int, int], ...]
    """(tokens up to here, touch when last used), from the head on."""


class _Entry(msgspec.Struct, frozen=True, gc=False):
    """There may be tens of thousands, which the garbage collector need not walk."""

    size: int
    touch: int


class _Tail(NamedTuple):
    """What a session's last answer added behind its prompt's chain."""

    last: BlockHash | None
    num_blocks: int
    num_tokens: int


class Holdings:
    def __init__(self, capacity_tokens: int | None = None) -> None:
        self.capacity_tokens = capacity_tokens
        self._entries: OrderedDict[BlockHash, _Entry] = OrderedDict()
        self._slower: dict[str, dict[BlockHash, int]] = {}
        self._tails: dict[Hashable, _Tail] = {}
        self._tokens = 0
        self._touch = 0
        self._unsettled: set[int] = set()

    @property
    def num_tokens(self) -> int:
        return self._tokens

    @property
    def room_tokens(self) -> int:
        return (UNKNOWN_CAPACITY_TOKENS if self.capacity_tokens is None else self.capacity_tokens) - self._tokens

    def match(self, question: Question) -> Match:
        """How much of `question` is present. Changes nothing."""
        number = self._present(question)
        num_tokens = question.ends[number - 1] if number else 0
        slower: dict[str, int] = {}
        chain = question.blocks
        while self._slower and number < len(chain):
            medium = next((name for name, blocks in self._slower.items() if chain[number] in blocks), None)
            if medium is None:
                break
            slower[medium] = slower.get(medium, 0) + question.ends[number] - num_tokens
            num_tokens = question.ends[number]
            number += 1
        tail = self._tails.get((question.tenant, question.session)) if question.session is not None else None
        if tail is not None and number >= tail.num_blocks and question.num_tokens > tail.num_tokens > num_tokens:
            # The chain tells for all but the answer: this is the session's next turn only if it begins as the last one did.
            same = tail.num_blocks == 0 or question.blocks[tail.num_blocks - 1] == tail.last
            num_tokens = tail.num_tokens if same else num_tokens
        return Match(number, num_tokens, slower)

    def sent(self, question: Question) -> Trail:
        """`question` is on its way there: its blocks are present once those before it in the queue are computed."""
        self._touch += 1
        touch, entries, chain, ends = self._touch, self._entries, question.blocks, question.ends
        number = self._present(question)
        steps: list[tuple[int, int]] = []
        for index in range(number):
            entry = entries.get(chain[index])  # a replica's own events may leave a hole
            if entry is None or entry.touch in self._unsettled:
                continue
            if steps and steps[-1][1] == entry.touch:
                steps[-1] = (ends[index], entry.touch)
            else:
                steps.append((ends[index], entry.touch))
        for index in range(len(chain) - 1, -1, -1):
            size = ends[index] - (ends[index - 1] if index else 0)
            self._put(chain[index], size, touch)
        if question.session is not None:
            self._tails.pop((question.tenant, question.session), None)
        self._unsettled.add(touch)
        self._evict(touch)
        return Trail(touch, number, tuple(steps))

    def settled(self, trail: Trail) -> None:
        """Its prompt is computed."""
        self._unsettled.discard(trail.touch)

    def answered(self, question: Question, trail: Trail, output_tokens: int, cached_tokens: int | None, slack: int) -> int:
        """The answer is complete. Returns how many tokens turned out to be lost. `slack`: how much less a replica may count
        than is there, since it counts whole blocks of its own size."""
        self.settled(trail)
        if question.session is not None:
            last = question.blocks[-1] if question.blocks else None
            tail = _Tail(last, len(question.blocks), question.num_tokens + output_tokens)
            self._tails[question.tenant, question.session] = tail
            while len(self._tails) > max(1024, len(self._entries)):
                del self._tails[next(iter(self._tails))]
        if cached_tokens is None:
            return 0
        gone = next((touch for end, touch in trail.steps if end > cached_tokens + slack), None)
        if gone is None:
            return 0
        before = self._tokens
        while self._entries and next(iter(self._entries.values())).touch <= gone:
            self._drop(next(iter(self._entries)))
        return before - self._tokens

    def failed(self, question: Question, trail: Trail) -> None:
        """Whether it was computed is not known: what was not present before does not count as present."""
        self.settled(trail)
        for block in question.blocks[trail.num_blocks :]:
            entry = self._entries.get(block)
            if entry is not None and entry.touch == trail.touch:
                self._drop(block)

    def events(self, events: Sequence[CacheEvent]) -> None:
        for event in events:
            if isinstance(event, BlocksCleared):
                self.clear()
            elif isinstance(event, BlocksStored):
                if event.medium:
                    self._slower.setdefault(event.medium, {}).update(zip(event.blocks, event.sizes, strict=True))
                    continue
                self._touch += 1
                for block, size in zip(reversed(event.blocks), reversed(event.sizes), strict=True):
                    self._put(block, size, self._touch)
                self._evict(self._touch)
            elif isinstance(event, BlocksRemoved):
                for block in event.blocks:
                    if event.medium:
                        self._slower.get(event.medium, {}).pop(block, None)
                    elif block in self._entries:
                        self._drop(block)

    def clear(self) -> None:
        self._entries.clear()
        self._slower.clear()
        self._tails.clear()
        self._tokens = 0

    def _present(self, question: Question) -> int:
        """How many blocks of the chain, from its head on. By halving: what is left of a chain is its beginning."""
        low, high, entries, chain = 0, len(question.blocks), self._entries, question.blocks
        while low < high:
            middle = (low + high) // 2
            if chain[middle] in entries:
                low = middle + 1
            else:
                high = middle
        return low

    def _put(self, block: BlockHash, size: int, touch: int) -> None:
        old = self._entries.get(block)
        self._tokens += size - (old.size if old else 0)
        self._entries[block] = _Entry(size, touch)
        self._entries.move_to_end(block)

    def _drop(self, block: BlockHash) -> None:
        self._tokens -= self._entries.pop(block).size

    def _evict(self, touch: int) -> None:
        """What was touched just now stays, even where it does not fit: the replica itself must find room for it."""
        while self.room_tokens < 0 and next(iter(self._entries.values())).touch != touch:
            self._drop(next(iter(self._entries)))
