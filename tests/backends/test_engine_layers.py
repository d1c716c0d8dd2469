"""The compiled layers say what the model's own modules say, and are used only for the architecture they know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from anaphora.backends import engine_layers
from anaphora.backends.engine_attention import Segment
from anaphora.backends.engine_kernels import can_compile, exponential
from anaphora.backends.engine_linear import MOST_ROWS
from anaphora.backends.engine_model import Model
from anaphora.kv.pool import KVPool

CPU = torch.device("cpu")
TinyModel = Callable[..., Path]

pytestmark = pytest.mark.skipif(not can_compile(torch.float32, CPU), reason="numba is not installed")


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_layers, "LEAST_WEIGHTS", 0)


KNOWN = [
    ("Llama", {}),
    ("Llama", {"num_key_value_heads": 1, "head_dim": 32, "attention_bias": True}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 16}),
]


def load(folder: Path) -> Model:
    return Model(folder, dtype=torch.float32, device=CPU)


def filled_pool(model: Model, tokens: int) -> KVPool:
    pool = KVPool(model.kv_shape, arena_tokens=tokens, num_blocks=0, block_size=16, device=CPU)
    torch.manual_seed(1)
    pool.arena.normal_()
    return pool


@pytest.mark.parametrize(("family", "config"), KNOWN, ids=str)
def test_they_say_what_the_models_own_modules_say(tiny_model: TinyModel, family: str, config: dict[str, Any]) -> None:
    model = load(tiny_model(family, **config))
    assert model._layers is not None
    lengths = [1, 3, 40, 700, 1025]  # 700 and 1,025 are divided into parts
    segments, start = [], 0
    for row, length in enumerate(lengths):
        segments.append(Segment(row, 1, start, length - 1))
        start += length
    pool = filled_pool(model, start)
    before = pool.arena.clone()
    tokens, positions, rows = [5, 6, 7, 8, 9], [length - 1 for length in lengths], range(5)
    model.attach(pool)
    compiled = model.forward(tokens, positions, tuple(segments), rows)
    written = pool.arena.clone()
    one_by_one = [
        model.forward([t], [p], (Segment(0, 1, s.extent, p),), [0])[0]
        for t, p, s in zip(tokens, positions, segments, strict=True)
    ]
    model._layers = None
    pool.arena.copy_(before)
    plain = model.forward(tokens, positions, tuple(segments), rows)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(one_by_one), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(written, pool.arena, rtol=1e-4, atol=1e-4)
    assert (written != before).sum() <= 5 * model.kv_shape.bytes_per_token // 4


def test_more_rows_and_several_tokens_of_a_sequence_go_module_by_module(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    model.attach(filled_pool(model, 64))

    def refuse(*args: object) -> None:
        raise AssertionError

    model._layers = refuse  # type: ignore[assignment]
    model.forward([1, 2], [0, 1], (Segment(0, 2, 0, 0),), [1])
    many = MOST_ROWS + 1
    model.forward([1] * many, [1] * many, tuple(Segment(i, 1, 2 * i, 1) for i in range(many)), range(many))
    with pytest.raises(AssertionError):
        model.forward([1], [0], (Segment(0, 1, 0, 0),), [0])


def test_the_weights_are_held_once(tiny_llama: Path) -> None:
    net: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = load(tiny_llama)
    weights = model._weights
    assert weights is not None
    assert {array.dtype for array in (weights.qkv, weights.gate_up, weights.down)} == {np.dtype(np.float32)}
    for index, layer in enumerate(model._net.base_model.layers):
        theirs = net.base_model.layers[index]
        thin = layer.self_attn.q_proj._shared._together
        np.testing.assert_array_equal(
            weights.qkv[index][: theirs.self_attn.q_proj.out_features], theirs.self_attn.q_proj.weight.detach()
        )
        assert np.shares_memory(thin._array, weights.qkv[index])
        assert np.shares_memory(layer.mlp.gate_proj._shared._together._array, weights.gate_up[index])
        assert np.shares_memory(layer.mlp.down_proj._array, weights.down[index])


@pytest.mark.parametrize(
    ("family", "config"), [("Phi3", {"pad_token_id": 0}), ("Llama", {"mlp_bias": True}), ("Olmo2", {})], ids=str
)
def test_another_architecture_goes_module_by_module(tiny_model: TinyModel, family: str, config: dict[str, Any]) -> None:
    assert load(tiny_model(family, **config))._layers is None


def test_what_only_looks_like_the_architecture_is_found_out_by_its_logits(tiny_model: TinyModel) -> None:
    folder = tiny_model("Granite", residual_multiplier=0.5)
    net: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert engine_layers.stack(net.base_model, load(folder).kv_shape, 4) is not None
    assert load(folder)._layers is None


@given(st.lists(st.floats(-86, 0, width=32), min_size=1))
def test_the_exponential_is_right_to_the_last_place_of_one(xs: list[float]) -> None:
    exp = exponential()
    array = np.array(xs, dtype=np.float32)
    got = np.array([exp(x) for x in array])
    np.testing.assert_allclose(got, np.exp(array.astype(np.float64)), rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(got, np.exp(array.astype(np.float64)), rtol=1e-5)


def test_the_exponential_of_what_is_far_below_is_nearly_nothing() -> None:
    assert 0 <= exponential()(np.float32(-3e38)) < 1e-37
