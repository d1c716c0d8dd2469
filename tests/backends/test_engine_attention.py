import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anaphora.backends import engine_attention, engine_kernels
from anaphora.backends.engine_attention import PackedAttention, Segment, attend
from anaphora.backends.engine_kernels import DecodeAttention, can_compile
from anaphora.kv.pool import KVPool, KVShape

DIM = 8


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_past: int, scale: float) -> torch.Tensor:
    """Softmax attention written out, in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    rows, columns = torch.arange(q.shape[2])[:, None] + num_past, torch.arange(k.shape[2])[None, :]
    return torch.softmax(scores.masked_fill(columns > rows, -torch.inf), -1) @ v


def tensors(
    seed: int, heads: int, kv_heads: int, num_past: int, num_new: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = num_past + num_new
    q = torch.randn((1, heads, num_new, DIM), generator=generator)
    k = torch.randn((1, kv_heads, total, DIM), generator=generator)
    v = torch.randn((1, kv_heads, total, DIM), generator=generator)
    return q, k, v


shapes = st.tuples(
    st.integers(0, 1000), st.sampled_from([(9, 3), (4, 4), (8, 1)]), st.integers(0, 40), st.integers(1, 40), st.booleans()
)


@settings(deadline=None, max_examples=80)
@given(shapes)
def test_every_way_of_attending_is_causal_softmax_attention(shape: tuple[int, tuple[int, int], int, int, bool]) -> None:
    seed, (heads, kv_heads), num_past, num_new, scaled = shape
    q, k, v = tensors(seed, heads, kv_heads, num_past, num_new)
    scale = 0.3 if scaled else DIM**-0.5
    expected = naive(q, k, v, num_past, scale)
    given_scale = 0.3 if scaled else None
    torch.testing.assert_close(attend(q, k, v, num_past, given_scale).double(), expected, rtol=1e-4, atol=1e-5)
    # What runs on other devices than the CPU must be the same function; it runs here too.
    biased = engine_attention._attend_biased(q, k, v, num_past, given_scale)
    torch.testing.assert_close(biased.double(), expected, rtol=1e-4, atol=1e-5)


class Layer(torch.nn.Module):
    layer_idx = 0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=5), st.integers(0, 1000))
def test_a_packed_batch_gives_each_sequence_what_it_gets_alone(parts: list[tuple[int, int]], seed: int) -> None:
    shape = KVShape(num_layers=1, num_kv_heads=2, head_dim=DIM, dtype=torch.float32)
    pool = KVPool(shape, arena_tokens=200, num_blocks=0, block_size=4, device=torch.device("cpu"))
    attention = PackedAttention(pool)
    segments, queries, keys, values, expected = [], [], [], [], []
    first = 0
    for index, (num_past, num_new) in enumerate(parts):
        extent = 37 * (len(parts) - 1 - index)
        q, k, v = tensors(seed + index, 4, 2, num_past, num_new)
        pool.keys[0][:, extent : extent + num_past] = k[0, :, :num_past]
        pool.values[0][:, extent : extent + num_past] = v[0, :, :num_past]
        segments.append(Segment(first, num_new, extent, num_past))
        first += num_new
        queries.append(q)
        keys.append(k[:, :, num_past:])
        values.append(v[:, :, num_past:])
        expected.append(attend(q, k, v, num_past, None))
    attention.begin(tuple(segments), torch.device("cpu"))
    out, _ = attention(Layer(), torch.cat(queries, 2), torch.cat(keys, 2), torch.cat(values, 2), None)
    torch.testing.assert_close(out, torch.cat(expected, 2).transpose(1, 2), rtol=1e-5, atol=1e-6)


batches = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=5)


@pytest.mark.skipif(not can_compile(torch.float32, torch.device("cpu")), reason="numba is not installed")
@settings(deadline=None, max_examples=40)
@given(batches, st.sampled_from([(9, 3), (4, 4), (8, 1)]), st.integers(0, 1000))
def test_the_compiled_kernel_is_softmax_attention(lengths: list[tuple[int, bool]], heads: tuple[int, int], seed: int) -> None:
    """Contexts of some tokens, and of so many that the kernel divides them."""
    sizes = [length + 700 * divided for length, divided in lengths]
    generator = torch.Generator().manual_seed(seed)
    num_heads, kv_heads = heads
    keys, values = (torch.randn((kv_heads, sum(sizes) + 9, DIM), generator=generator) * 3 for _ in range(2))
    queries = torch.randn((len(sizes), num_heads, DIM), generator=generator)
    starts = [sum(sizes[:i]) + 5 for i in range(len(sizes))]
    kernel = DecodeAttention([keys], [values], num_heads)
    kernel.begin(starts, sizes)
    out = kernel(0, queries, 0.3)
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        k, v = keys[None, :, start : start + size], values[None, :, start : start + size]
        expected = naive(queries[i][None, :, None], k, v, size - 1, 0.3)
        torch.testing.assert_close(out[i].double(), expected[0, :, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not can_compile(torch.float32, torch.device("cpu")), reason="numba is not installed")
def test_a_kernel_that_was_compiled_once_is_read_from_disk_from_then_on() -> None:
    """Also one that calls others, and by another process: built anew, none of them is the object it was."""
    found = []
    for _ in range(2):
        for build in (
            engine_kernels._build,
            engine_kernels.part_of_attention,
            engine_kernels.merge,
            engine_kernels.exponential,
        ):
            build.cache_clear()
        keys = torch.zeros((1, 8, 8))
        kernel = DecodeAttention([keys], [keys], 1)
        kernel.begin([0], [8])
        kernel(0, torch.zeros((1, 1, 8)), 1.0)
        found.append(sum(kernel._attend.stats.cache_hits.values()))  # type: ignore[attr-defined]
    assert found[1] == 1
    other_size = DecodeAttention([keys], [keys], 2)
    assert engine_kernels._content(other_size._attend) != engine_kernels._content(kernel._attend)
