from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anaphora.backends import engine_attention, engine_kernels, engine_prefill
from anaphora.backends.engine_attention import PackedAttention, Segment, attend, prefill_agrees
from anaphora.backends.engine_kernels import DecodeAttention, can_compile
from anaphora.backends.engine_prefill import BLOCKS, LEAST_ROWS, TILE, WIDTH, PrefillAttention
from anaphora.kv.pool import KVPool, KVShape

DIM = 8


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_past: int, scale: float) -> torch.Tensor:
    """Softmax attention written out, in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    rows, columns = torch.arange(q.shape[2])[:, None] + num_past, torch.arange(k.shape[2])[None, :]
    return torch.softmax(scores.masked_fill(columns > rows, -torch.inf), -1) @ v


compiled = pytest.mark.skipif(not can_compile(torch.float32, torch.device("cpu")), reason="numba is not installed")


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


def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_past: int, scale: float, start: int = 5) -> torch.Tensor:
    """The compiled kernel over an arena in which the sequence begins at `start`, and NaN lies around it."""
    num_tokens = k.shape[2]
    arena = torch.full((2, k.shape[1], start + num_tokens + 3, k.shape[3]), torch.nan)
    arena[:, :, start : start + num_tokens] = torch.cat((k, v))
    keys, values = arena
    queries = q[0].transpose(0, 1)
    out = torch.full(queries.shape, torch.nan)
    PrefillAttention([keys], [values])(0, queries, start, num_past, scale, out)
    return out.transpose(0, 1)[None]


def random(seed: int, heads: int, kv_heads: int, dim: int, num_past: int, num_new: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, num_new), (kv_heads, num_past + num_new), (kv_heads, num_past + num_new)
    return tuple(torch.randn((1, *shape, dim), generator=generator) for shape in shapes)


near = st.sampled_from([0, 1, TILE, 2 * TILE, 9 * TILE]).flatmap(lambda n: st.integers(max(0, n - 5), n + 5))


@compiled
@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 1000), st.integers(1, 8), st.integers(1, 3), st.sampled_from([4, 8, 64, 80, 128]), near, st.integers(1, 80),
    st.sampled_from([1.0, 30.0, 1e4, 1e10]),
)  # fmt: skip
def test_the_kernel_for_several_tokens_is_causal_softmax_attention(
    seed: int, group: int, kv_heads: int, dim: int, num_past: int, num_new: int, magnitude: float
) -> None:
    """Also around the borders of tiles, and for scores of which no exponential is finite."""
    q, k, v = random(seed, group * kv_heads, kv_heads, dim, num_past, num_new)
    scale = 0.3 * dim**-0.5
    out = prefill(q * magnitude, k, v, num_past, scale)
    # What a float32 score of that size may be off by is what two weights may be off by.
    off = magnitude * 1e-6
    if magnitude > 100:
        # The highest score takes all, but for those that come near it.
        scores = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2)
        rows, columns = torch.arange(num_new)[:, None] + num_past, torch.arange(num_past + num_new)[None, :]
        best = scores.masked_fill(columns > rows, -torch.inf).topk(min(2, num_past + num_new), -1).values
        clear = (best[..., 0] - best[..., -1] > 0.05) | (best.shape[-1] == 1)
        assert torch.isfinite(out).all()
        expected = naive(q * magnitude, k, v, num_past, scale)
        torch.testing.assert_close(out[clear].double(), expected[clear], rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(out.double(), naive(q * magnitude, k, v, num_past, scale), rtol=1e-4 + off, atol=1e-5 + off)


@compiled
@pytest.mark.parametrize("num_new", [2, 3, 40, 512])
@pytest.mark.parametrize("num_past", [0, 1, 7000])
def test_the_kernel_for_several_tokens_takes_many_chunks_and_long_pasts(num_past: int, num_new: int) -> None:
    q, k, v = random(num_past + num_new, 9, 3, 64, num_past, num_new)
    torch.testing.assert_close(
        prefill(q, k, v, num_past, 0.125).double(), naive(q, k, v, num_past, 0.125), rtol=1e-4, atol=1e-5
    )


@compiled
@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("num_new", [3, 60, WIDTH * BLOCKS + 1])
def test_the_kernel_for_several_tokens_divides_its_work_among_any_number_of_threads(
    threads: int, num_new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, k, v = random(threads, 4, 2, 8, 70, num_new)
    torch.testing.assert_close(prefill(q, k, v, 70, 0.3).double(), naive(q, k, v, 70, 0.3), rtol=1e-4, atol=1e-5)


@compiled
def test_scores_of_minus_infinity_weigh_nothing_and_give_no_nan() -> None:
    q, k, v = random(0, 2, 1, 8, 100, 9)
    q[..., 0] = 3e38
    k[..., 0] = 0
    k[:, :, 20:90, 0] = -3e38
    out = prefill(q, k, v, 100, 1.0)
    torch.testing.assert_close(out.double(), naive(q, k, v, 100, 1.0), rtol=1e-4, atol=1e-5)
    k[..., 0] = -3e38
    assert torch.isfinite(prefill(q, k, v, 100, 1.0)).all()


@compiled
@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 80), st.integers(1, 30)), min_size=1, max_size=4), st.integers(0, 1000))
def test_a_packed_batch_through_the_kernels_is_what_torch_makes_of_it(parts: list[tuple[int, int]], seed: int) -> None:
    """Single tokens, few rows, and many, each in its own way."""
    shape = KVShape(num_layers=1, num_kv_heads=2, head_dim=DIM, dtype=torch.float32)
    pool = KVPool(shape, arena_tokens=120 * len(parts), num_blocks=0, block_size=4, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    pool.arena.copy_(torch.randn(pool.arena.shape, generator=generator))
    total = sum(num_new for _, num_new in parts)
    firsts = [sum(n for _, n in parts[:i]) for i in range(len(parts))]
    segments = tuple(
        Segment(first, num_new, 120 * i, num_past)
        for i, (first, (num_past, num_new)) in enumerate(zip(firsts, parts, strict=True))
    )
    # As models hand them over: rows of all heads, seen as heads of rows.
    q, k, v = (torch.randn((1, total, heads, DIM), generator=generator).transpose(1, 2) for heads in (6, 2, 2))
    outs = []
    for kernels in (False, True):
        attention = PackedAttention(pool)
        if kernels:
            attention.decode = DecodeAttention(pool.keys, pool.values, 6)
            attention.prefill = PrefillAttention(pool.keys, pool.values)
        attention.begin(segments, torch.device("cpu"))
        outs.append(attention(Layer(), q, k, v, None)[0])
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)


@compiled
def test_few_query_rows_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = KVShape(num_layers=1, num_kv_heads=1, head_dim=DIM, dtype=torch.float32)
    pool = KVPool(shape, arena_tokens=60, num_blocks=0, block_size=4, device=torch.device("cpu"))
    attention = PackedAttention(pool)
    attention.prefill = PrefillAttention(pool.keys, pool.values)
    seen: list[int] = []
    kernel = attention.prefill._attend

    def attend(rows: Any, *rest: Any) -> None:
        seen.append(len(rows))
        kernel(rows, *rest)

    monkeypatch.setattr(attention.prefill, "_attend", attend)
    for num_new in (LEAST_ROWS // 2 - 1, LEAST_ROWS // 2):
        attention.begin((Segment(0, num_new, 0, 0),), torch.device("cpu"))
        q, k, v = (torch.randn((1, heads, num_new, DIM)) for heads in (2, 1, 1))
        attention(Layer(), q, k, v, None)
    assert seen == [LEAST_ROWS // 2]


@compiled
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (3, 64), (7, 128), (8, 80)])
def test_the_kernel_proves_itself_before_it_is_used(group: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prefill_agrees(group, dim)
    monkeypatch.setattr(engine_prefill, "_build", lambda: lambda *args: args[-1].fill(0))
    assert not prefill_agrees(group, dim)


@compiled
def test_a_model_goes_on_with_torch_where_the_kernel_does_not_prove_itself(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from anaphora.backends.engine_model import Model

    hidden = []
    for wrong in (False, True):
        if wrong:
            monkeypatch.setattr(engine_prefill, "_build", lambda: lambda *args: args[-1].fill(0))
        model = Model(tiny_llama, dtype=torch.float32, device=torch.device("cpu"))
        assert (model._attention.prefill is None) == wrong
        model.attach(KVPool(model.kv_shape, arena_tokens=90, num_blocks=0, block_size=16, device=torch.device("cpu")))
        tokens = [i % model.vocab_size for i in range(90)]
        model.forward(tokens[:50], range(50), (Segment(0, 50, 0, 0),), [])
        hidden.append(model.forward(tokens[50:], range(50, 90), (Segment(0, 40, 0, 50),), range(40)))
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-3, atol=1e-4)


def test_heads_that_are_no_multiple_of_the_kernels_rows_are_not_for_it() -> None:
    assert not prefill_agrees(3, 66)


batches = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=5)


@compiled
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


@compiled
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
