"""Which blocks of tokens in a replica's cache stand for which pieces of text. Pure.

The router's chains name pieces of text, a replica's own events name blocks of tokens. Where the tokens of a prompt are known,
each of its pieces is taken to end in the last block that its share of the prompt covers, and from then on what the replica says
of that block it says of the piece: once the block is gone, so is the piece and all that lies behind it; and where the blocks of
a piece and of all before it are stored, the piece is there. Of a piece whose block is not known nothing is said.

What was said of blocks before anybody knew which piece they are is remembered, as far as it is newer than the request.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from anaphora.routing.base import BlocksCleared, BlocksRemoved, BlocksStored, CacheEvent, Question
from anaphora.types import BlockHash

MAX_PIECES = 1 << 15
"""Beyond them those that were sent longest ago are left to what the router knows without events."""
MAX_REMOVED = 1 << 16
"""Blocks that are gone, of which it is remembered when they went."""


class _Piece:
    __slots__ = ("block", "children", "lost", "name", "parent", "size", "there")

    def __init__(self, name: BlockHash, size: int, parent: _Piece | None) -> None:
        self.name = name
        self.size = size
        self.parent = parent
        self.children: set[_Piece] = set()
        self.block: BlockHash | None = None
        self.there = False
        """The replica said so, of it and of all before it."""
        self.lost = False
        """It was told to be gone, and neither sent nor stored since. Then so is all behind it."""


class Associations:
    """Of one replica."""

    def __init__(self, *, max_pieces: int = MAX_PIECES, max_removed: int = MAX_REMOVED) -> None:
        self._max_pieces = max_pieces
        self._max_removed = max_removed
        self._pieces: OrderedDict[BlockHash, _Piece] = OrderedDict()
        self._by_block: dict[BlockHash, list[_Piece]] = {}
        self._present: dict[BlockHash, set[str]] = {}
        """Blocks that were said to be stored: where."""
        self._removed: OrderedDict[BlockHash, int] = OrderedDict()
        self._cleared = 0
        self.num_events = 0
        """A point in time: how many were heard."""
        self.num_arrived = self.num_lost = 0
        """Pieces that the replica said to be there, and to be gone."""

    # -- what is asked -------------------------------------------------------------------------------------------------

    def sent(self, question: Question) -> None:
        """`question` is on its way to the replica, which will have what it begins with."""
        parent, begin = None, 0
        for name, end in zip(question.blocks, question.ends, strict=True):
            piece = self._pieces.get(name)
            if piece is None:
                piece = self._pieces[name] = _Piece(name, end - begin, parent)
                if parent is not None:
                    parent.children.add(piece)
            piece.lost = False
            parent, begin = piece, end
        for name in reversed(question.blocks):  # so that what is left out first has nothing behind it
            self._pieces.move_to_end(name)
        while len(self._pieces) > self._max_pieces:
            self._leave_out(self._pieces.popitem(last=False)[1])

    def knows(self, question: Question) -> bool:
        """Nothing more is to be learned of it."""
        return all((piece := self._pieces.get(name)) is not None and piece.block is not None for name in question.blocks)

    def learn(
        self, question: Question, blocks: Sequence[BlockHash], block_size: int, num_tokens: int, since: int
    ) -> list[CacheEvent]:
        """The prompt of `question`, sent at `since` (`num_events` then), has `num_tokens` tokens, in whole `blocks`."""
        chain = [piece for name in question.blocks if (piece := self._pieces.get(name)) is not None]
        if not blocks:
            return []
        ends = range(block_size, block_size * len(blocks) + 1, block_size)
        for piece, end in zip(chain, question.ends, strict=False):
            if piece.block is None:
                covered = bisect_right(ends, end * num_tokens / question.num_tokens)
                piece.block = blocks[max(1, covered) - 1]
                self._by_block.setdefault(piece.block, []).append(piece)
        told: list[CacheEvent] = []
        for piece in chain:
            told += self._stored_slower(piece)
        told += self._arrived(chain)
        gone = next((piece for piece in chain if self._gone(piece, since)), None)
        return told + self._lost([] if gone is None else [gone])

    # -- what the replica says -----------------------------------------------------------------------------------------

    def events(self, events: Iterable[CacheEvent]) -> list[CacheEvent]:
        """Of blocks of tokens, as events of pieces of text."""
        told: list[CacheEvent] = []
        for event in events:
            self.num_events += 1
            if isinstance(event, BlocksCleared):
                self._clear()
                told.append(event)
            elif isinstance(event, BlocksStored):
                told += self._stored(event)
            else:
                told += self._was_removed(event)
        return told

    def _clear(self) -> None:
        self._present.clear()
        self._removed.clear()
        self._cleared = self.num_events
        for piece in self._pieces.values():
            self.num_lost += not piece.lost
            piece.there, piece.lost = False, True

    def _stored(self, event: BlocksStored) -> list[CacheEvent]:
        for block in event.blocks:
            self._present.setdefault(block, set()).add(event.medium)
        pieces = self._at(event.blocks)
        if event.medium:
            return _stored(pieces, event.medium)
        for block in event.blocks:
            self._removed.pop(block, None)
        return self._arrived(pieces)

    def _was_removed(self, event: BlocksRemoved) -> list[CacheEvent]:
        for block in event.blocks:
            places = self._present.get(block)
            if places is not None:
                places.discard(event.medium)
                if not places:
                    del self._present[block]
        pieces = self._at(event.blocks)
        if event.medium:
            return [BlocksRemoved(tuple([piece.name for piece in pieces]), event.medium)] if pieces else []
        for block in event.blocks:
            self._removed[block] = self.num_events
            self._removed.move_to_end(block)
        while len(self._removed) > self._max_removed:
            self._removed.popitem(last=False)
        return self._lost(pieces)

    # -- what that means -----------------------------------------------------------------------------------------------

    def _at(self, blocks: Iterable[BlockHash]) -> list[_Piece]:
        return [piece for block in blocks for piece in self._by_block.get(block, ())]

    def _arrived(self, pieces: Iterable[_Piece]) -> list[CacheEvent]:
        """Of `pieces`, and of what is behind them, those that are there now as all before them are."""
        new: dict[_Piece, None] = {}
        for piece in pieces:
            waiting = [piece]
            while waiting:
                one = waiting.pop()
                if not one.there and self._is_stored(one) and (one.parent is None or one.parent.there):
                    one.there, one.lost = True, False
                    self.num_arrived += 1
                    for before in reversed(_line(one.parent)):  # who counts what is there from its beginning on must have that
                        new.setdefault(before)
                    new.setdefault(one)
                    waiting += one.children
        return _stored(new, "")

    def _lost(self, pieces: Iterable[_Piece]) -> list[CacheEvent]:
        """`pieces` are not there any more, so nothing behind them is of use."""
        lost: list[BlockHash] = []
        waiting = [*pieces]
        while waiting:
            piece = waiting.pop()
            piece.there = False
            if not piece.lost:
                piece.lost = True
                self.num_lost += 1
                lost.append(piece.name)
                waiting += piece.children
        return [BlocksRemoved(tuple(lost))] if lost else []

    def _stored_slower(self, piece: _Piece) -> list[CacheEvent]:
        places = () if piece.block is None else sorted(self._present.get(piece.block, ()))
        return [event for medium in places if medium for event in _stored([piece], medium)]

    def _is_stored(self, piece: _Piece) -> bool:
        return piece.block is not None and "" in self._present.get(piece.block, ())

    def _gone(self, piece: _Piece, since: int) -> bool:
        if piece.block is None or self._is_stored(piece):
            return False
        return self._removed.get(piece.block, self._cleared) > since

    def _leave_out(self, piece: _Piece) -> None:
        if piece.parent is not None:
            piece.parent.children.discard(piece)
        if piece.block is not None:
            self._by_block[piece.block].remove(piece)
            if not self._by_block[piece.block]:
                del self._by_block[piece.block]


def _line(piece: _Piece | None) -> list[_Piece]:
    """It, and all before it."""
    line: list[_Piece] = []
    while piece is not None:
        line.append(piece)
        piece = piece.parent
    return line


def _stored(pieces: Iterable[_Piece], medium: str) -> list[CacheEvent]:
    names, sizes = [piece.name for piece in pieces], [piece.size for piece in pieces]
    return [BlocksStored(tuple(names), tuple(sizes), medium)] if names else []
