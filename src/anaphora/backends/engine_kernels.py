"""Decode attention for float32 on CPU, compiled by numba where that is installed.

torch's kernel is made for many query rows; a decode step has one per sequence, and then reads keys and values at about half
the speed of memory. Here every (sequence, KV head, part of the context) is one task: the scores of the group's query heads,
their softmax, and the weighted values; the parts of a head are merged by their maxima, as in flash decoding (Dao et al.,
"Flash-Decoding for long-context inference", 2023). All sequences of a batch are one call.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch

LOWEST = np.float32(-3.0e38)
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
        self._parts = num_parts(longest, self._threads)
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


def num_parts(longest: int, threads: int) -> int:
    """Into how many parts contexts of up to `longest` tokens are divided."""
    return 1 if longest <= _SHORT else threads


def jit(function: Any, **options: Any) -> Any:
    """`function` compiled, or read from disk where an earlier process has compiled the same."""
    import numba

    compiled: Any = numba.njit(function, fastmath=REASSOCIATE, **options)
    compiled._cache = _cache_type()(function)
    return compiled


@functools.cache
def _cache_type() -> Any:
    from numba.core.caching import FunctionCache

    class Cache(FunctionCache):
        """numba's own key has the compiled functions that a closure calls as they are pickled, which is different in every
        process: it would be compiled, and written, at every start."""

        def _index_key(self, signature: Any, codegen: Any) -> tuple[Any, ...]:
            return signature, codegen.magic_tuple(), hashlib.sha256(_content(self._py_func).encode()).hexdigest()

    return Cache


def _content(thing: Any) -> str:
    """A function by what it and all that it calls do; anything else as it is written."""
    function = getattr(thing, "py_func", None) or getattr(thing, "_defn", None) or thing
    if not isinstance(function, FunctionType):
        return repr(thing)
    cells = [_content(cell.cell_contents) for cell in function.__closure__ or ()]
    return repr((_instructions(function.__code__), cells))


def _instructions(code: CodeType) -> tuple[Any, ...]:
    """With those of the functions and comprehensions in it; without places, which are other ones in every process."""
    constants = [_instructions(constant) if isinstance(constant, CodeType) else constant for constant in code.co_consts]
    return code.co_code, code.co_names, constants


@functools.cache
def exponential() -> Any:
    """exp of a float32 that is not positive, as arithmetic that loops vectorise; off by less than 1.2e-7.

    exp(x) = 2^n · exp(r) with |r| ≤ ln 2 / 2 and a polynomial for exp(r) (coefficients as in Cephes, Moshier 1989).
    """
    import numba
    from numba.core import types
    from numba.extending import intrinsic

    def as_float_of(typingctx: Any, bits: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(types.float32))

        return types.float32(types.int32), codegen

    as_float: Any = intrinsic(as_float_of)

    def exp(x: Any) -> Any:
        x = max(x, np.float32(-87.0))
        n = np.int32(x * np.float32(1.44269504) - np.float32(0.5))
        r = x - np.float32(n) * np.float32(0.693147181)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1)
        return p * as_float((n + np.int32(127)) << np.int32(23))

    return numba.njit(exp, inline="always")


@functools.cache
def part_of_attention(group: int, dim: int) -> Any:
    """Compiled `(q [group, dim], keys, values [tokens, dim], first, end, sums [group, dim + 2], scores [group, tokens])`:
    attention of a group's query heads over the tokens `first .. end - 1`; into `sums` the weighted values, then the highest
    score and the mass. With both sizes known, the inner loops are unrolled."""
    exp = exponential()

    def attend(q: Any, keys: Any, values: Any, first: int, end: int, sums: Any, scores: Any) -> None:
        n = end - first
        for j in range(n):
            for g in range(group):
                dot = np.float32(0)
                for i in range(dim):
                    dot += q[g, i] * keys[first + j, i]
                scores[g, j] = dot
        for g in range(group):
            highest = LOWEST
            for j in range(n):
                highest = max(highest, scores[g, j])
            mass = np.float32(0)
            for j in range(n):
                weight = exp(scores[g, j] - highest)
                scores[g, j] = weight
                mass += weight
            sums[g, dim] = highest
            sums[g, dim + 1] = mass
            for i in range(dim):
                sums[g, i] = np.float32(0)
        for j in range(0, n - 3, 4):
            for g in range(group):
                a, b, c, d = scores[g, j], scores[g, j + 1], scores[g, j + 2], scores[g, j + 3]
                for i in range(dim):
                    sums[g, i] += (
                        a * values[first + j, i] + b * values[first + j + 1, i]
                        + c * values[first + j + 2, i] + d * values[first + j + 3, i]
                    )  # fmt: skip
        for j in range(n - n % 4, n):
            for g in range(group):
                weight = scores[g, j]
                for i in range(dim):
                    sums[g, i] += weight * values[first + j, i]

    return jit(attend)


@functools.cache
def merge(group: int, dim: int) -> Any:
    """Compiled `(sums [parts, group, dim + 2], out [group, dim])`: the parts' weighted values, put together by their maxima."""

    def merge_parts(sums: Any, out: Any) -> None:
        for g in range(group):
            highest = LOWEST
            for p in range(sums.shape[0]):
                highest = max(highest, sums[p, g, dim])
            mass = np.float32(0)
            for i in range(dim):
                out[g, i] = np.float32(0)
            for p in range(sums.shape[0]):
                # A part without tokens has mass 0, so its weight does not matter.
                weight = np.float32(math.exp(sums[p, g, dim] - highest))
                mass += weight * sums[p, g, dim + 1]
                for i in range(dim):
                    out[g, i] += weight * sums[p, g, i]
            for i in range(dim):
                out[g, i] /= mass

    return jit(merge_parts)


@functools.cache
def _build(group: int, dim: int) -> Kernel:
    import numba

    part, merge_parts = part_of_attention(group, dim), merge(group, dim)

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
                merge_parts(sums[task : task + parts], out[b, h])

    built: Kernel = jit(attend, parallel=True, nogil=True)
    return built
