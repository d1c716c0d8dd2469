"""Decode attention for float32 on CPU, compiled by numba where that is installed.

torch's kernel is made for many query rows; a decode step has one per sequence, and then reads keys and values at about half
the speed of memory. Here every (sequence, KV head, part of the context) is one task: the scores of the group's query heads,
their softmax, and the weighted values; the parts of a head are merged by their maxima, as in flash decoding (Dao et al.,
"Flash-Decoding for long-context inference", 2023). All sequences of a batch are one call.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

_LOWEST = np.float32(-3.0e38)
REASSOCIATE = {"contract", "reassoc", "nsz", "arcp"}
"""Sums may be taken in any order, which is what lets them be vectorised. Infinities keep their meaning."""
_SHORT = 512
"""Contexts up to this many tokens are not divided."""

Kernel = Callable[..., None]


def can_compile(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype == torch.float32 and importlib.util.find_spec("numba") is not None


def prepare(folder: Path) -> None:
    """Once, before the first kernel is built: compiled code is kept in `folder`, and kernels use torch's number of threads."""
    os.environ.setdefault("NUMBA_CACHE_DIR", str(folder))
    if importlib.util.find_spec("numba") is not None:
        import numba

        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


class DecodeAttention:
    """Attention of one new token in each of several sequences. Holds the views and the scratch memory of one model."""

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], heads: int) -> None:
        """keys, values: per layer [kv_heads, tokens, head_dim]; `heads` is the number of query heads."""
        self._keys = [layer.numpy() for layer in keys]
        self._values = [layer.numpy() for layer in values]
        self._kv_heads, _, self._dim = self._keys[0].shape
        self._group = heads // self._kv_heads
        self._threads = torch.get_num_threads()
        self._attend = _build(self._group, self._dim)

    def begin(self, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Announce the sequences of the next batch: arena position of their token 0, and tokens with the new one."""
        self._starts = np.array(starts, dtype=np.int64)
        self._lengths = np.array(lengths, dtype=np.int64)
        longest = max(lengths)
        self._parts = 1 if longest <= _SHORT else self._threads
        tasks = len(starts) * self._kv_heads * self._parts
        self._sums = np.empty((tasks, self._group, self._dim + 2), dtype=np.float32)
        self._scores = np.empty((tasks, self._group, -(-longest // self._parts)), dtype=np.float32)

    def __call__(self, layer: int, queries: torch.Tensor, scale: float) -> torch.Tensor:
        """queries [sequences, heads, head_dim] → the same shape."""
        q = (queries * scale).view(-1, self._kv_heads, self._group, self._dim)
        out = torch.empty_like(q)
        keys, values = self._keys[layer], self._values[layer]
        self._attend(q.numpy(), keys, values, self._starts, self._lengths, self._parts, self._sums, self._scores, out.numpy())
        return out.view(queries.shape)


@functools.lru_cache
def _build(group: int, dim: int) -> Kernel:
    """The kernel for one shape: with both sizes known, the inner loops are unrolled."""
    import numba

    compile_with: Any = functools.partial(numba.njit, fastmath=REASSOCIATE, cache=True)

    def one_part(q: Any, keys: Any, values: Any, first: int, end: int, sums: Any, scores: Any) -> None:
        n = end - first
        for j in range(n):
            for g in range(group):
                dot = np.float32(0)
                for i in range(dim):
                    dot += q[g, i] * keys[first + j, i]
                scores[g, j] = dot
        for g in range(group):
            highest = _LOWEST
            for j in range(n):
                highest = max(highest, scores[g, j])
            mass = np.float32(0)
            for j in range(n):
                weight = np.float32(math.exp(scores[g, j] - highest))
                scores[g, j] = weight
                mass += weight
            sums[g, dim] = highest
            sums[g, dim + 1] = mass
            for i in range(dim):
                sums[g, i] = np.float32(0)
        for j in range(n):
            for g in range(group):
                weight = scores[g, j]
                for i in range(dim):
                    sums[g, i] += weight * values[first + j, i]

    part = compile_with(one_part)

    def attend(q: Any, keys: Any, values: Any, starts: Any, lengths: Any, parts: int, sums: Any, scores: Any, out: Any) -> None:
        kv_heads = q.shape[1]
        for task in numba.prange(q.shape[0] * kv_heads * parts):
            b, h, p = task // (kv_heads * parts), (task // parts) % kv_heads, task % parts
            step = (lengths[b] + parts - 1) // parts
            first = min(p * step, lengths[b])
            end = min(first + step, lengths[b])
            part(q[b, h], keys[h], values[h], starts[b] + first, starts[b] + end, sums[task], scores[task])
        for b in range(q.shape[0]):
            for h in range(kv_heads):
                task = (b * kv_heads + h) * parts
                for g in range(group):
                    highest = _LOWEST
                    for p in range(parts):
                        highest = max(highest, sums[task + p, g, dim])
                    mass = np.float32(0)
                    for i in range(dim):
                        out[b, h, g, i] = np.float32(0)
                    for p in range(parts):
                        # A part without tokens has mass 0, so its weight does not matter.
                        weight = np.float32(math.exp(sums[task + p, g, dim] - highest))
                        mass += weight * sums[task + p, g, dim + 1]
                        for i in range(dim):
                            out[b, h, g, i] += weight * sums[task + p, g, i]
                    for i in range(dim):
                        out[b, h, g, i] /= mass

    built: Kernel = compile_with(attend, parallel=True, nogil=True)
    return built
