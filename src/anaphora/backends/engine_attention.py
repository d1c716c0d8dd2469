"""Attention for packed batches over the KV arena: one registered function serves every transformers model.

A batch packs the tokens of many sequences in one row of length T. Linear layers run over all of them at once; here each
sequence's queries meet that sequence's own keys. Four cases, chosen by segment:

- one new token (decode): all such sequences at once in the compiled kernel (`engine_kernels`) where there is one; else the
  query heads that share a KV head become query rows of one small attention over the KV heads, so that no head is ever
  repeated in memory;
- several new tokens, where there is a compiled kernel for them (`engine_prefill`): in that;
- a prompt from its first token: plain causal attention;
- new tokens over earlier ones: on CPU, attention over the past without a mask and over the new tokens with the causal
  flag, merged by their log-sum-exp (the kernels skip what a mask would make them compute); elsewhere torch's own
  lower-right causal bias.
"""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from anaphora.backends.engine_kernels import DecodeAttention
from anaphora.backends.engine_prefill import LEAST_ROWS, ROWS, TILE, WIDTH, PrefillAttention
from anaphora.kv.pool import KVPool

_numbers = itertools.count()


class Segment(msgspec.Struct, frozen=True):
    """A run of new tokens of one sequence: batch rows `first .. first+num_new-1`, after `num_past` tokens in the arena."""

    first: int
    num_new: int
    extent: int
    """Arena position of the sequence's token 0."""
    num_past: int


class PackedAttention:
    """Holds what the attention function needs for the batch now in flight. One engine loop, one batch at a time."""

    def __init__(self, pool: KVPool | None = None) -> None:
        self.pool = pool
        self.decode: DecodeAttention | None = None
        """The compiled kernel for single tokens, where there is one."""
        self.prefill: PrefillAttention | None = None
        """The one for several."""
        self._decode_rows: torch.Tensor | None = None
        self.name = f"anaphora_{next(_numbers)}"
        """In transformers' registry, which is global: two models in one process must not take each other's attention."""
        self._segments: tuple[Segment, ...] = ()
        self._slots = torch.empty(0, dtype=torch.int64)

    def register(self) -> None:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(self.name, self.__call__)
        # Masks are this module's business: the model must not build a [T, T] one over the packed row.
        AttentionMaskInterface.register(self.name, lambda *args, **kwargs: None)

    def begin(self, segments: tuple[Segment, ...], device: torch.device) -> None:
        """Announce the next batch: its segments in row order, without gaps."""
        single = [s for s in segments if s.num_new == 1] if self.decode is not None else []
        self._segments = tuple(s for s in segments if s.num_new > 1) if single else segments
        self._decode_rows = torch.tensor([s.first for s in single]) if single else None
        if self.decode is not None and single:
            self.decode.begin([s.extent for s in single], [s.num_past + 1 for s in single])
        slots = [torch.arange(s.extent + s.num_past, s.extent + s.num_past + s.num_new) for s in segments]
        self._slots = torch.cat(slots).to(device)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim] → [1, T, heads, head_dim]."""
        assert self.pool is not None
        layer = int(module.layer_idx)  # type: ignore[arg-type]  # an int on every transformers attention module
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys.index_copy_(1, self._slots, key[0])
        values.index_copy_(1, self._slots, value[0])
        out = torch.empty((1, query.shape[2], query.shape[1], query.shape[3]), dtype=query.dtype, device=query.device)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self.decode is not None and self._decode_rows is not None:
            rows_of = self._decode_rows
            out[0, rows_of] = self.decode(layer, query[0].transpose(0, 1)[rows_of], scale)
        for s in self._segments:
            rows = slice(s.first, s.first + s.num_new)
            if self.prefill is not None and s.num_new * query.shape[1] >= LEAST_ROWS * len(keys):
                self.prefill(layer, query[0, :, rows].transpose(0, 1), s.extent, s.num_past, scale, out[0, rows])
                continue
            end = s.extent + s.num_past + s.num_new
            k, v = keys[None, :, s.extent : end], values[None, :, s.extent : end]
            out[:, rows] = attend(query[:, :, rows], k, v, s.num_past, scaling).transpose(1, 2)
        return out, None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_past: int, scale: float | None) -> torch.Tensor:
    """Causal attention of the last queries of a sequence: q [1, heads, n, d] over k, v [1, kv_heads, num_past + n, d]."""
    heads, num_new, dim = q.shape[1:]
    kv_heads = k.shape[1]
    if num_new == 1:
        grouped = q.reshape(1, kv_heads, heads // kv_heads, dim)
        return F.scaled_dot_product_attention(grouped, k, v, scale=scale).view(1, heads, 1, dim)
    if num_past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads != kv_heads)
    if q.device.type == "cpu":
        return _attend_in_two(q, k, v, num_past, scale)
    return _attend_biased(q, k, v, num_past, scale)


def prefill_agrees(group: int, dim: int) -> bool:
    """Whether the compiled kernel can be used for such heads, and gives on this machine what torch gives: over the borders of
    its tiles and blocks, with what a naive exponential would not survive."""
    if dim % ROWS:
        return False
    num_past, num_new = TILE + 3, WIDTH + 1
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn((2, 2, num_past + num_new, dim), generator=generator)
    queries = torch.randn((num_new, 2 * group, dim), generator=generator) * 30
    out = torch.empty_like(queries)
    PrefillAttention([keys], [values])(0, queries, 0, num_past, 1.0, out)
    expected = attend(queries.transpose(0, 1)[None], keys[None], values[None], num_past, 1.0)[0].transpose(0, 1)
    return torch.allclose(out, expected, rtol=1e-3, atol=1e-3)


def _attend_biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_past: int, scale: float | None) -> torch.Tensor:
    bias = causal_lower_right(q.shape[2], num_past + q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _attend_in_two(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_past: int, scale: float | None) -> torch.Tensor:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    heads, num_new, dim = q.shape[1:]
    kv_heads = k.shape[1]
    group = heads // kv_heads
    # Without a mask every query row sees all past keys, so the heads of a group may again stand in for query rows.
    past, past_lse = flash(q.reshape(1, kv_heads, group * num_new, dim), k[:, :, :num_past], v[:, :, :num_past], scale=scale)
    new_k = k[:, :, num_past:].repeat_interleave(group, 1)
    new_v = v[:, :, num_past:].repeat_interleave(group, 1)
    new, new_lse = flash(q, new_k, new_v, is_causal=True, scale=scale)
    # softmax over both parts = the parts weighted by their share of the summed exponentials.
    share = torch.sigmoid(new_lse - past_lse.reshape(1, heads, num_new)).unsqueeze(-1).to(q.dtype)
    return torch.lerp(past.reshape(1, heads, num_new, dim), new, share)
