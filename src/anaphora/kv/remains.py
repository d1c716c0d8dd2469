"""KV that still lies in the arena where a sequence has ended, until somebody else takes the room.

A prompt's blocks are copied from the pool into the arena for each request. The next turn of a conversation usually comes when
nothing else has been computed: then what it would copy lies there already, and it need only take the same place again. Pure:
places and names, no tensors. Names of blocks cover their tenant and all tokens before them (`keys.block_hashes`).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from anaphora.types import BlockHash, Scope, Tenant


class Place(msgspec.Struct, frozen=True):
    """Where a chain of blocks lies."""

    start: int
    num_blocks: int
    """From the chain's beginning on."""


class _Left(msgspec.Struct, frozen=True):
    start: int
    hashes: tuple[BlockHash, ...]
    tenant: Tenant


class Remains:
    """`block_size` in tokens, which are positions of the arena."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._left: list[_Left] = []
        """No two overlap."""

    def __len__(self) -> int:
        return len(self._left)

    def left(self, start: int, hashes: Sequence[BlockHash], tenant: Tenant) -> None:
        """From position `start` on lie the blocks `hashes`, and nobody owns the room any more."""
        if hashes:
            self._left.append(_Left(start, tuple(hashes), tenant))

    def find(self, hashes: Sequence[BlockHash]) -> Place | None:
        """Where the longest beginning of the chain `hashes` lies. None: not even its first block does."""
        best: Place | None = None
        for one in self._left:
            common = 0
            for mine, asked in zip(one.hashes, hashes, strict=False):
                if mine != asked:
                    break
                common += 1
            if common and (best is None or common > best.num_blocks):
                best = Place(one.start, common)
        return best

    def taken(self, start: int, end: int) -> None:
        """Somebody owns these positions now, and writes there: what lies before them in a chain stays."""
        rest: list[_Left] = []
        for one in self._left:
            if one.start >= end or one.start + len(one.hashes) * self._block_size <= start:
                rest.append(one)
            elif (whole := (start - one.start) // self._block_size) > 0:
                rest.append(_Left(one.start, one.hashes[:whole], one.tenant))
        self._left = rest

    def forget(self, scope: Scope) -> None:
        """They carry no tags, and are of one model, as in `KVCache.forget`."""
        if scope.tag is None:
            self._left = [one for one in self._left if scope.tenant not in (None, one.tenant)]
