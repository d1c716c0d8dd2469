"""Where a prompt leaves the cached ones in the middle of a block: how much of that block it still shares, token by token.

A block is found by its hash, so by all of its tokens or not at all. Two prompts that part inside one share the tokens before
that place, and their KV: it can be copied from a block that the other one committed. Here is which blocks stand behind which
parent, with their tokens. Whether one is still in the pool is for `KVCache` to say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

import msgspec

from anaphora.types import BlockHash, Scope, Tenant

SIBLINGS = 4
"""Blocks remembered behind one parent, the latest."""


class Tail(msgspec.Struct, frozen=True):
    """A block that begins like a prompt goes on."""

    block: BlockHash
    num_tokens: int
    """That they have in common: at least 1."""


class _Sibling(msgspec.Struct, frozen=True):
    block: BlockHash
    tokens: tuple[int, ...]
    tenant: Tenant


class Tails:
    """Blocks behind at most `capacity` parents; those that were committed to longest ago are forgotten first.

    A parent is a block's hash, or for first blocks the namespace: both cover the tenant, and all tokens before."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._behind: OrderedDict[bytes, list[_Sibling]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._behind)

    def add(self, parent: bytes, block: BlockHash, tokens: Sequence[int], tenant: Tenant) -> None:
        siblings = [sibling for sibling in self._behind.get(parent, ()) if sibling.block != block]
        siblings.append(_Sibling(block, tuple(tokens), tenant))
        self._behind[parent] = siblings[-SIBLINGS:]
        self._behind.move_to_end(parent)
        if len(self._behind) > self._capacity:
            self._behind.popitem(last=False)

    def find(self, parent: bytes, tokens: Sequence[int], tenant: Tenant) -> list[Tail]:
        """The blocks of `tenant` behind `parent` that begin with the first of `tokens`, the longest common beginning first."""
        found = []
        for sibling in reversed(self._behind.get(parent, ())):
            pairs = zip(sibling.tokens, tokens, strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if common and sibling.tenant == tenant:
                found.append(Tail(sibling.block, common))
        return sorted(found, key=lambda tail: -tail.num_tokens)

    def forget(self, scope: Scope) -> None:
        """They hold tokens, so they are content. They carry no tags, and are of one model, as in `KVCache.forget`."""
        if scope.tag is not None:
            return
        for parent in list(self._behind):
            rest = [sibling for sibling in self._behind[parent] if scope.tenant not in (None, sibling.tenant)]
            if rest:
                self._behind[parent] = rest
            else:
                del self._behind[parent]
