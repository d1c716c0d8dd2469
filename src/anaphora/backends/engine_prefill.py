"""Attention of several new tokens of a sequence, for float32 on CPU, compiled by numba where that is installed.

A request that finds its past in the cache has some tens of new tokens over thousands of cached ones. torch's kernel takes query
rows in tiles of 32, and leaves their products to a library that is made for large matrices. Here the query heads that share a
KV head, times the new tokens, are the rows of one matrix; blocks of them meet tiles of keys and values that stay in the core's
own cache, with an online softmax (Dao et al., "FlashAttention", 2022).

The numbers of a vector belong to query rows side by side, which are packed so once. Keys and values are then read as they lie,
one number for a whole vector of rows, and a softmax needs no sum or maximum across a vector. What is done for every number is
written as vector instructions by hand: numba keeps small arrays in memory, and these sums must stay in registers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from anaphora.backends.engine_kernels import LOWEST, Kernel, jit

LANES = 8
"""Numbers in a vector."""
VECTORS = 3
WIDTH = VECTORS * LANES
"""Query rows in a block."""
ROWS = 4
"""With VECTORS vectors each, the sums of a micro-kernel: 12 of AVX2's 16 registers."""
TILE = 64
"""Keys in a tile: with their values, half of what a core's own cache holds."""
LEAST_ROWS = LANES
"""With fewer query rows torch is as fast, or faster: most of a block would be empty."""
BLOCKS = 8
"""Most blocks of query rows in a task."""


class PrefillAttention:
    """Attention of several new tokens of one sequence. Holds the views of one model's arena."""

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """keys, values: per layer [kv_heads, tokens, head_dim]."""
        self._keys = [layer.numpy() for layer in keys]
        self._values = [layer.numpy() for layer in values]
        self._threads = torch.get_num_threads()
        self._attend = _build()

    def __call__(self, layer: int, queries: torch.Tensor, start: int, num_past: int, scale: float, out: torch.Tensor) -> None:
        """queries [tokens, heads, head_dim] of a sequence whose token 0 is at arena position `start` → `out`, of the same shape
        and contiguous. The keys and values of the new tokens are in the arena already."""
        keys, values = self._keys[layer], self._values[layer]
        num_new, heads, dim = queries.shape
        kv_heads = keys.shape[0]
        blocks = -(-num_new * (heads // kv_heads) // WIDTH)
        chunks = -(-blocks // BLOCKS)
        # Every thread gets the same number of tasks.
        parts = self._threads // math.gcd(self._threads, kv_heads * chunks)
        columns = np.empty((self._threads, BLOCKS, dim, WIDTH), dtype=np.float32)
        scratch = np.empty((self._threads, TILE + 1, WIDTH), dtype=np.float32)
        # Weighted values, then the highest score and the mass.
        sums = np.zeros((kv_heads, blocks, parts, dim + 2, WIDTH), dtype=np.float32)
        sums[:, :, :, dim] = LOWEST
        rows = queries.contiguous().numpy()
        self._attend(rows, keys, values, start, num_past, np.float32(scale), chunks, columns, scratch, sums, out.numpy())


class _Instructions:
    """Vector instructions into the function that numba is generating code for."""

    def __init__(self, builder: Any) -> None:
        from llvmlite import ir  # type: ignore[import-untyped]
        from numba.core import cgutils

        self._ir = ir
        self._builder = builder
        self._allocate: Any = cgutils.alloca_once
        self._vector = ir.VectorType(ir.FloatType(), LANES)
        self._integers = ir.VectorType(ir.IntType(32), LANES)

    def variable(self, value: Any) -> Any:
        """One that keeps its register in a loop."""
        place = self._allocate(self._builder, self._vector)
        self._builder.store(value, place)
        return place

    def get(self, variable: Any) -> Any:
        return self._builder.load(variable)

    def set(self, variable: Any, value: Any) -> None:
        self._builder.store(value, variable)

    def index(self, start: Any, *products: Any) -> Any:
        """start + the sum of the products, which are pairs."""
        for a, b in products:
            factors = [self._ir.Constant(start.type, x) if isinstance(x, int) else x for x in (a, b)]
            start = self._builder.add(start, self._builder.mul(*factors))
        return start

    def load(self, data: Any, index: Any) -> Any:
        return self._builder.load(self._at(data, index), align=4)

    def store(self, value: Any, data: Any, index: Any) -> None:
        self._builder.store(value, self._at(data, index), align=4)

    def _at(self, data: Any, index: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(data, [index]), self._vector.as_pointer())

    def broadcast(self, data: Any, index: Any) -> Any:
        number = self._builder.load(self._builder.gep(data, [index]))
        nothing = self._ir.Constant(self._vector, self._ir.Undefined)
        first = self._builder.insert_element(nothing, number, self._ir.Constant(self._ir.IntType(32), 0))
        return self._builder.shuffle_vector(first, nothing, self._ir.Constant(self._integers, None))

    def constant(self, number: float) -> Any:
        return self._ir.Constant(self._vector, [float(np.float32(number))] * LANES)

    def multiply(self, a: Any, b: Any) -> Any:
        return self._builder.fmul(a, b, flags=["contract"])

    def add(self, a: Any, b: Any) -> Any:
        return self._builder.fadd(a, b, flags=["contract"])

    def subtract(self, a: Any, b: Any) -> Any:
        return self._builder.fsub(a, b, flags=["contract"])

    def maximum(self, a: Any, b: Any) -> Any:
        return self._builder.select(self._builder.fcmp_ordered(">", a, b), a, b)

    def exp(self, x: Any) -> Any:
        """As `engine_kernels.exponential`."""
        x = self.maximum(x, self.constant(-87))
        n = self._builder.fptosi(self.subtract(self.multiply(x, self.constant(1.44269504)), self.constant(0.5)), self._integers)
        r = self.subtract(x, self.multiply(self._builder.sitofp(n, self._vector), self.constant(0.693147181)))
        p = self.constant(_EXP[0])
        for coefficient in _EXP[1:]:
            p = self.add(self.multiply(p, r), self.constant(coefficient))
        n = self._builder.add(n, self._ir.Constant(self._integers, [127] * LANES))
        n = self._builder.shl(n, self._ir.Constant(self._integers, [23] * LANES))
        return self.multiply(p, self._builder.bitcast(n, self._vector))


_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0)


def _product(num_rows: int, fresh: bool) -> Any:
    """Compiled `(out, out_at, factors_at, left, left_at, left_row, left_step, right, right_at, count)`, for `num_rows` rows m
    of WIDTH numbers, one behind the other:

    out[m] = out[m] * factors + sum over i < count of left[m * left_row + i * left_step] * right[i],

    without the first term if `fresh`. Arrays come with where in their memory to begin; the factors are in `right`.
    """
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    def product_of(
        typingctx: Any, out: Any, out_at: Any, factors_at: Any, left: Any, left_at: Any, left_row: Any, left_step: Any,
        right: Any, right_at: Any, count: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            do = _Instructions(builder)
            o, a, b = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3, 7))
            _, o_at, f_at, _, a_at, a_row, a_step, _, b_at, count = args
            places = [[do.index(o_at, (m, WIDTH), (v, LANES)) for v in range(VECTORS)] for m in range(num_rows)]
            if fresh:
                sums = [[do.variable(do.constant(0)) for _ in row] for row in places]
            else:
                factors = [do.load(b, do.index(f_at, (v, LANES))) for v in range(VECTORS)]
                sums = [
                    [do.variable(do.multiply(do.load(o, at), f)) for at, f in zip(row, factors, strict=True)] for row in places
                ]
            with cgutils.for_range(builder, count) as loop:
                columns = [do.load(b, do.index(b_at, (loop.index, WIDTH), (v, LANES))) for v in range(VECTORS)]
                for m, row in enumerate(sums):
                    number = do.broadcast(a, do.index(a_at, (loop.index, a_step), (m, a_row)))
                    for place, column in zip(row, columns, strict=True):
                        do.set(place, do.add(do.get(place), do.multiply(number, column)))
            for row, at_row in zip(sums, places, strict=True):
                for place, at in zip(row, at_row, strict=True):
                    do.store(do.get(place), o, at)
            return context.get_dummy_value()

        n = types.intp
        return types.void(out, n, n, left, n, n, n, right, n, n), codegen

    return intrinsic(product_of)


def _softmax() -> Any:
    """Compiled `(scratch, scores_at, factors_at, count, state, state_at)`: scores [count, WIDTH] become weights. The state, the
    highest score so far and the mass, goes on; the factors are for what was summed so far."""
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    def softmax_of(
        typingctx: Any, scratch: Any, scores_at: Any, factors_at: Any, count: Any, state: Any, state_at: Any
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            do = _Instructions(builder)
            s, t = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 4))
            _, s_at, f_at, count, _, t_at = args
            tops = [do.index(t_at, (v, LANES)) for v in range(VECTORS)]
            masses = [do.index(t_at, (1, WIDTH), (v, LANES)) for v in range(VECTORS)]
            before = [do.load(t, at) for at in tops]
            highest = [do.variable(top) for top in before]
            with cgutils.for_range(builder, count) as loop:
                for v, place in enumerate(highest):
                    score = do.load(s, do.index(s_at, (loop.index, WIDTH), (v, LANES)))
                    do.set(place, do.maximum(do.get(place), score))
            now = [do.get(place) for place in highest]
            sums = []
            for v in range(VECTORS):
                factor = do.exp(do.subtract(before[v], now[v]))
                do.store(factor, s, do.index(f_at, (v, LANES)))
                do.store(now[v], t, tops[v])
                sums.append(do.variable(do.multiply(do.load(t, masses[v]), factor)))
            with cgutils.for_range(builder, count) as loop:
                for v, place in enumerate(sums):
                    at = do.index(s_at, (loop.index, WIDTH), (v, LANES))
                    weight = do.exp(do.subtract(do.load(s, at), now[v]))
                    do.store(weight, s, at)
                    do.set(place, do.add(do.get(place), weight))
            for place, at in zip(sums, masses, strict=True):
                do.store(do.get(place), t, at)
            return context.get_dummy_value()

        n = types.intp
        return types.void(scratch, n, n, n, state, n), codegen

    return intrinsic(softmax_of)


@functools.cache
def _build() -> Kernel:
    import numba

    score_rows, score_row, add_values = _product(ROWS, True), _product(1, True), _product(ROWS, False)
    softmax = _softmax()

    def attend(
        task: int, queries: Any, keys: Any, values: Any, start: int, num_past: int, scale: Any, chunks: int, thread: int,
        columns: Any, scratch: Any, sums: Any,
    ) -> None:  # fmt: skip
        """A task: some blocks of the query rows of a KV head, over a part of the tokens."""
        kv_heads, num_blocks, parts = sums.shape[0], sums.shape[1], sums.shape[2]
        num_new, heads, dim = queries.shape
        group = heads // kv_heads
        width = columns.shape[3]  # not a constant: unrolled by it, loops that need no speed would take long to compile
        c, h, p = task // (kv_heads * parts), (task // parts) % kv_heads, task % parts
        per_chunk = (num_blocks + chunks - 1) // chunks
        first_block, end_block = c * per_chunk, min((c + 1) * per_chunk, num_blocks)
        for b in range(first_block, end_block):
            block = columns[thread, b - first_block]
            for r in range(width):
                row = min(b * WIDTH + r, num_new * group - 1)
                query = queries[row // group, h * group + row % group]
                for i in range(dim):
                    block[i, r] = query[i] * scale
        seen = num_past + min(num_new, (end_block * WIDTH - 1) // group + 1)
        step = (seen + parts * ROWS - 1) // (parts * ROWS) * ROWS
        end = min((p + 1) * step, seen)
        scores = thread * (TILE + 1) * WIDTH
        factors = scores + TILE * WIDTH
        for tile in range(p * step, end, TILE):
            kv = (h * keys.shape[1] + start + tile) * dim
            for b in range(first_block, end_block):
                q = (thread * BLOCKS + b - first_block) * dim * WIDTH
                s = ((h * num_blocks + b) * parts + p) * (dim + 2) * WIDTH
                # This many of the tile's tokens are seen by the first row of the block, and by the last one.
                least = num_past + b * WIDTH // group + 1 - tile
                n = min(min(TILE, end - tile), num_past + (b * WIDTH + WIDTH - 1) // group + 1 - tile)
                if n <= 0:
                    continue
                for j in range(0, n - 3, ROWS):
                    score_rows(scratch, scores + j * WIDTH, 0, keys, kv + j * dim, dim, 1, columns, q, dim)
                for j in range(n - n % ROWS, n):
                    score_row(scratch, scores + j * WIDTH, 0, keys, kv + j * dim, dim, 1, columns, q, dim)
                if least < n:
                    for r in range(width):
                        for j in range(max(0, num_past + (b * WIDTH + r) // group + 1 - tile), n):
                            scratch[thread, j, r] = LOWEST
                softmax(scratch, scores, factors, n, sums, s + dim * WIDTH)
                for i in range(0, dim, ROWS):
                    add_values(sums, s + i * WIDTH, factors, values, kv + i, 1, dim, scratch, scores, n)

    def merge(task: int, sums: Any, out: Any) -> None:
        """The parts of a block of query rows, put together by their maxima."""
        kv_heads, num_blocks, parts = sums.shape[0], sums.shape[1], sums.shape[2]
        num_new, heads, dim = out.shape
        group = heads // kv_heads
        h, b = task // num_blocks, task % num_blocks
        for r in range(min(WIDTH, num_new * group - b * WIDTH)):
            row = b * WIDTH + r
            o = out[row // group, h * group + row % group]
            highest, mass = LOWEST, np.float32(0)
            for p in range(parts):
                highest = max(highest, sums[h, b, p, dim, r])
            for i in range(dim):
                o[i] = np.float32(0)
            for p in range(parts):
                part = sums[h, b, p]
                weight = np.float32(math.exp(part[dim, r] - highest))
                mass += weight * part[dim + 1, r]
                for i in range(dim):
                    o[i] += weight * part[i, r]
            for i in range(dim):
                o[i] /= mass

    attend, merge = jit(attend, error_model="numpy"), jit(merge, error_model="numpy")

    def attend_all(
        queries: Any, keys: Any, values: Any, start: int, num_past: int, scale: Any, chunks: int, columns: Any, scratch: Any,
        sums: Any, out: Any,
    ) -> None:  # fmt: skip
        num_tasks, num_threads = chunks * sums.shape[0] * sums.shape[2], scratch.shape[0]
        # One parallel loop, run twice, takes seconds less to compile than two.
        for merging in range(2):
            for thread in numba.prange(num_threads):
                if merging:
                    for block in range(thread, sums.shape[0] * sums.shape[1], num_threads):
                        merge(block, sums, out)
                else:
                    # Later chunks see more tokens: every thread gets early and late ones.
                    for task in range(thread, num_tasks, num_threads):
                        attend(task, queries, keys, values, start, num_past, scale, chunks, thread, columns, scratch, sums)

    built: Kernel = jit(attend_all, parallel=True, nogil=True)
    return built
