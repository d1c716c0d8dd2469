"""The tensors of the KV cache, allocated once: an arena for running sequences and a pool of cached blocks.

- arena: per layer keys and values of shape [kv_heads, arena_tokens, head_dim]. A sequence owns a contiguous extent, so
  attention reads views and nothing ever grows by concatenation.
- blocks: shape [num_blocks, layers, 2, kv_heads, block_size, head_dim]: one cached block is one contiguous run of bytes,
  which is what a slower tier wants to store.

A matched prefix is copied from blocks into the arena once per request; computed blocks are copied back once.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch


class KVShape(msgspec.Struct, frozen=True):
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVPool:
    def __init__(self, shape: KVShape, *, arena_tokens: int, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.shape = shape
        self.block_size = block_size
        # `empty`, not `zeros`: the operating system then commits pages as they are first written, and nothing is ever read
        # before it was written.
        arena = (shape.num_layers, 2, shape.num_kv_heads, arena_tokens, shape.head_dim)
        block = (num_blocks, shape.num_layers, 2, shape.num_kv_heads, block_size, shape.head_dim)
        self.arena = torch.empty(arena, dtype=shape.dtype, device=device)
        self._blocks = torch.empty(block, dtype=shape.dtype, device=device)
        self.keys = [self.arena[layer, 0] for layer in range(shape.num_layers)]
        self.values = [self.arena[layer, 1] for layer in range(shape.num_layers)]

    def load(self, block_ids: Sequence[int], start: int) -> None:
        """Copy blocks into the arena, one after the other from position `start` on."""
        for first, count, offset in _runs(block_ids):
            target = self._span(start + offset * self.block_size, count)
            target.copy_(self._blocks[first : first + count].permute(1, 2, 3, 0, 4, 5))

    def load_head(self, block_id: int, count: int, start: int) -> None:
        """Copy the first `count` tokens of a block into the arena, from position `start` on."""
        self.arena[:, :, :, start : start + count].copy_(self._blocks[block_id, :, :, :, :count])

    def save(self, block_ids: Sequence[int], start: int) -> None:
        """Copy the arena's positions from `start` on into blocks."""
        for first, count, offset in _runs(block_ids):
            source = self._span(start + offset * self.block_size, count)
            self._blocks[first : first + count].copy_(source.permute(3, 0, 1, 2, 4, 5))

    def read_arena(self, start: int, length: int) -> torch.Tensor:
        """A copy of `length` positions from `start` on: [layers, 2, kv_heads, length, head_dim]."""
        return self.arena[:, :, :, start : start + length].clone()

    def write_arena(self, start: int, kv: torch.Tensor) -> None:
        self.arena[:, :, :, start : start + kv.shape[3]].copy_(kv)

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.shape.bytes_per_token

    @property
    def block_like(self) -> torch.Tensor:
        """A block's shape and type, without content."""
        return torch.empty(self._blocks.shape[1:], dtype=self.shape.dtype, device="meta")

    def empty_blocks(self, count: int) -> torch.Tensor:
        """Room in the host's memory for the content of `count` blocks, in the pool's layout."""
        return torch.empty((count, *self._blocks.shape[1:]), dtype=self.shape.dtype)

    def read_blocks(self, block_ids: Sequence[int]) -> torch.Tensor:
        """A copy of blocks in the host's memory, in their order."""
        return self._blocks[torch.tensor(block_ids, device=self._blocks.device)].cpu()

    def write_blocks(self, block_ids: Sequence[int], content: torch.Tensor) -> None:
        for first, count, offset in _runs(block_ids):
            self._blocks[first : first + count].copy_(content[offset : offset + count])

    def move(self, source: int, target: int, length: int) -> None:
        """Copy `length` positions inside the arena; the extents must not overlap."""
        self.arena[:, :, :, target : target + length].copy_(self.arena[:, :, :, source : source + length])

    def _span(self, start: int, count: int) -> torch.Tensor:
        """`count` blocks' worth of arena positions as [layers, 2, kv_heads, count, block_size, head_dim]."""
        span = self.arena[:, :, :, start : start + count * self.block_size]
        return span.view(*span.shape[:3], count, self.block_size, span.shape[4])


def _runs(block_ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """Consecutive ids as (first id, count, index of the first in `block_ids`): one copy each instead of one per block."""
    runs: list[tuple[int, int, int]] = []
    for index, block in enumerate(block_ids):
        if runs and runs[-1][0] + runs[-1][1] == block:
            first, count, offset = runs[-1]
            runs[-1] = (first, count + 1, offset)
        else:
            runs.append((block, 1, index))
    return runs
