"""How whole prompts end: what it takes to answer a known prompt without any forward pass.

The pool holds full blocks, and `match` always leaves a token to compute, because the first answer token follows from the last
position's hidden state. Where a prompt comes again word for word, that state is kept here, with the KV of the tokens behind its
last matched block: the output head and sampling are all that is left to do.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import msgspec
import torch

from anaphora.keys import digest
from anaphora.types import BlockHash, Scope, Tenant


class PromptEnd(msgspec.Struct, frozen=True):
    tenant: Tenant
    kv: torch.Tensor
    """Of the tokens behind the last matched block: [layers, 2, kv_heads, 1 to block_size tokens, head_dim]."""
    hidden: torch.Tensor
    """[hidden size], as the output head takes it."""

    @property
    def num_bytes(self) -> int:
        return self.kv.nbytes + self.hidden.nbytes


def end_key(parent: bytes, tail: Sequence[int]) -> BlockHash:
    """The name of a prompt whose last tokens `tail` stand behind the block `parent` (or the namespace)."""
    return BlockHash(digest((b"end", parent, array("q", tail).tobytes())))


class PromptEnds:
    """At most `capacity_bytes`; the least recently used one leaves first."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._ends: OrderedDict[BlockHash, PromptEnd] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, key: BlockHash) -> bool:
        return key in self._ends

    def get(self, key: BlockHash) -> PromptEnd | None:
        end = self._ends.get(key)
        if end is not None:
            self._ends.move_to_end(key)
        return end

    def put(self, key: BlockHash, end: PromptEnd) -> None:
        """Nothing happens where it is larger than all the room there is."""
        self._drop(key)
        if end.num_bytes > self._capacity:
            return
        self._ends[key] = end
        self.num_bytes += end.num_bytes
        while self.num_bytes > self._capacity:
            self._drop(next(iter(self._ends)))

    def forget(self, scope: Scope) -> int:
        """How many went. They carry no tags, and are of one model, as in `KVCache.forget`."""
        if scope.tag is not None:
            return 0
        doomed = [key for key, end in self._ends.items() if scope.tenant in (None, end.tenant)]
        for key in doomed:
            self._drop(key)
        return len(doomed)

    def _drop(self, key: BlockHash) -> None:
        end = self._ends.pop(key, None)
        if end is not None:
            self.num_bytes -= end.num_bytes
