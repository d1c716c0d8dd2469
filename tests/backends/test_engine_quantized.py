"""Weights in 8 bits: what they stand for, the kernels that multiply by them, which models take them, and what is kept apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers import AutoModelForCausalLM

from anaphora.backends import engine_layers, engine_linear, engine_model, engine_quantized
from anaphora.backends.engine_attention import Segment
from anaphora.backends.engine_kernels import can_compile
from anaphora.backends.engine_linear import MOST_ROWS, ThinLinear, thin_linears
from anaphora.backends.engine_model import Model
from anaphora.backends.engine_quantized import GROUP, QuantizedLinear, Scratch, quantise, quantised, widened
from anaphora.errors import ConfigError
from anaphora.kv.pool import KVPool
from anaphora.types import Message, Request, Sampling, Scope, TextPart

if TYPE_CHECKING:
    from anaphora.testing.engines import Asked, Driver

CPU = torch.device("cpu")
MakeDriver = Callable[..., "Driver"]
TinyModel = Callable[..., Path]
PROMPTS = (Path(__file__).parent.parent / "data" / "prompts.txt").read_text().splitlines()
WIDTHS = [1, 31, 32, 33, 64, 100, 576]

compiled = pytest.mark.skipif(not can_compile(torch.float32, CPU), reason="numba is not installed")


def floats(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return widened(values, scales, torch.empty(values.shape))


def quantised_layer(num_out: int, num_in: int, *, bias: bool = False) -> QuantizedLinear:
    torch.manual_seed(num_out * num_in)
    return QuantizedLinear.of(torch.nn.Linear(num_in, num_out, bias=bias), Scratch(torch.float32))


def exact(layer: QuantizedLinear, rows: torch.Tensor) -> torch.Tensor:
    """rows · weights + bias in float64, the weights one by one as their group says."""
    scales = layer.scales.double().repeat_interleave(GROUP, 1)[:, : layer.in_features]
    product = rows.double() @ (layer.values.double() * scales).T
    return product if layer.bias is None else product + layer.bias.double()


# -- what the numbers stand for ------------------------------------------------------------------------------------------

shapes = arrays.array_shapes(min_dims=2, max_dims=2, max_side=3 * GROUP)
finite = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)


@given(arrays.arrays(np.float32, shapes, elements=finite))
def test_a_weight_is_off_by_half_its_scale_at_most(weight: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    values, scales = quantised(torch.from_numpy(weight))
    assert values.shape == weight.shape
    assert scales.shape == (weight.shape[0], -(-weight.shape[1] // GROUP))
    bound = scales.repeat_interleave(GROUP, 1)[:, : weight.shape[1]].numpy() / 2
    assert (np.abs(floats(values, scales).numpy() - weight) <= bound * (1 + 1e-5)).all()


@given(arrays.arrays(np.float32, shapes, elements=finite))
def test_what_is_in_8_bits_already_stays_as_it_is(weight: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    values, scales = quantised(torch.from_numpy(weight))
    again, _ = quantised(floats(values, scales))
    assert torch.equal(again, values)


def test_the_largest_weight_of_each_group_has_all_seven_bits() -> None:
    values, scales = quantised(torch.randn(5, 100) * torch.logspace(-20, 3, 100))
    for start in range(0, 100, GROUP):
        assert (values[:, start : start + GROUP].abs().amax(1) == 127).all()
    values, scales = quantised(torch.zeros(2, 40))
    assert not values.any()
    assert not scales.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_widened_weights_are_the_products_rounded_once(width: int, dtype: torch.dtype) -> None:
    layer = quantised_layer(7, width)
    products = layer.values.double() * layer.scales.double().repeat_interleave(GROUP, 1)[:, :width]
    found = widened(layer.values, layer.scales, torch.empty((7, width), dtype=dtype))
    torch.testing.assert_close(found.double(), products, rtol=torch.finfo(dtype).eps, atol=0.0)


# -- products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_layer_multiplies_by_what_its_numbers_stand_for(width: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_quantized, "SLICE", 20 * width)  # several slices, the last of them smaller
    layer = quantised_layer(70, width, bias=bias)
    for shape in ((width,), (1, width), (3, 300, width), (0, width)):
        rows = torch.randn(shape)
        torch.testing.assert_close(layer(rows).double(), exact(layer, rows), rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 7, 8, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_kernel_multiplies_by_what_the_numbers_stand_for(
    width: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_linear, "LEAST_WEIGHTS", 0)
    for num_out, bias in ((1, False), (70, True)):
        layer = quantised_layer(num_out, width, bias=bias)
        rows = torch.randn(1, num_rows, width)
        torch.testing.assert_close(ThinLinear(layer)(rows).double(), exact(layer, rows), rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize("num_rows", [1, MOST_ROWS + 1])
def test_layers_with_the_same_input_are_one_product_also_in_8_bits(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_linear, "LEAST_WEIGHTS", 0)
    layers = [quantised_layer(num_out, 96, bias=num_out == 24) for num_out in (64, 24, 40)]
    rows = torch.randn(1, num_rows, 96)
    expected = torch.cat([exact(layer, rows) for layer in layers], -1)
    torch.testing.assert_close(ThinLinear(*layers)(rows).double(), expected, rtol=1e-5, atol=1e-5)


# -- models --------------------------------------------------------------------------------------------------------------


def widened_net(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model, its linear layers' weights rounded as 8 bits round them."""
    net: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for module in net.modules():
        if type(module) is torch.nn.Linear:
            module.weight = torch.nn.Parameter(floats(*quantised(module.weight)).to(dtype), requires_grad=False)
    return net


def chat(text: str, max_tokens: int) -> Request:
    messages = (Message("user", (TextPart(text),)),)
    return Request("m", messages=messages, max_tokens=max_tokens, sampling=Sampling(temperature=0.0))


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With the kernels, also for tiny layers; and as without numba."""
    if request.param == "plain":
        monkeypatch.setattr(engine_model, "can_compile", lambda dtype, device: False)
    elif not can_compile(torch.float32, CPU):
        pytest.skip("numba is not installed")
    monkeypatch.setattr(engine_linear, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(engine_layers, "LEAST_WEIGHTS", 0)
    return request.param


FAMILIES = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": False, "attention_bias": True}),
    ("Llama", {"hidden_size": 72, "head_dim": 16}),  # the last group of a row is smaller
    ("Qwen3", {"head_dim": 16}),
    ("Phi3", {"pad_token_id": 0}),  # goes module by module
]


@pytest.mark.parametrize(("family", "config"), FAMILIES, ids=str)
def test_greedy_answers_are_those_of_transformers_with_the_rounded_weights(
    make_driver: MakeDriver, tiny_model: TinyModel, way: str, family: str, config: dict[str, Any]
) -> None:
    folder = tiny_model(family, eos_token_id=None, **config)
    driver = make_driver(folder, quantization="int8", prefill_chunk=13)
    assert (driver.core.model._layers is not None) == (way == "compiled" and family != "Phi3")
    asked = driver.ask_together(chat(prompt, 12) for prompt in PROMPTS[:6])
    net = widened_net(folder)
    for one in asked:
        assert one.job is not None
        sequence = one.job.generations[0]
        logits = net(torch.tensor([sequence.tokens]), use_cache=False).logits[0]
        assert one.tokens[0] == logits[sequence.num_prompt - 1 : -1].argmax(-1).tolist()


def test_answers_are_the_same_cold_warm_and_in_a_batch(make_driver: MakeDriver, way: str) -> None:
    driver = make_driver(quantization="int8")
    cold = [driver.ask(chat(prompt, 8)) for prompt in PROMPTS[:12]]
    driver.core._scheduler._ends.forget(Scope())  # so that blocks are reused, and the rest is computed
    warm = [driver.ask(chat(prompt, 8)) for prompt in PROMPTS[:12]]
    assert all(asked.usage.kv_reused_tokens for asked in warm)
    assert [asked.tokens for asked in warm] == [asked.tokens for asked in cold]
    driver.core.forget(Scope())
    together = driver.ask_together(chat(prompt, 8) for prompt in PROMPTS[:12])
    assert [asked.tokens for asked in together] == [asked.tokens for asked in cold]


def test_a_model_in_bfloat16_computes_with_the_rounded_weights_too(tiny_llama: Path) -> None:
    model = Model(tiny_llama, dtype=torch.bfloat16, device=CPU, quantization="int8")
    assert type(model._net.lm_head) is QuantizedLinear
    model.attach(KVPool(model.kv_shape, arena_tokens=32, num_blocks=0, block_size=16, device=CPU))
    tokens = list(range(5, 37))
    found = model.logits(model.forward(tokens, range(32), (Segment(0, 32, 0, 0),), range(32)))
    with torch.inference_mode():
        expected = widened_net(tiny_llama, torch.bfloat16)(torch.tensor([tokens]), use_cache=False).logits[0].float()
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "config", "what"),
    [
        ("Mixtral", {"num_local_experts": 2, "sliding_window": None}, "experts"),
        ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}, "c_fc.weight"),
    ],
    ids=str,
)
def test_a_model_whose_weights_are_not_all_reached_is_refused(
    make_driver: MakeDriver, tiny_model: TinyModel, family: str, config: dict[str, Any], what: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"engine.quantization = 'int8' .*{re.escape(what)}.* set engine.quantization = 'none'"
    ):
        make_driver(tiny_model(family, **config), quantization="int8")


class Peeking(torch.nn.Module):
    """Uses its layer's weight by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(rows, self.layer.weight)


def test_a_model_that_uses_a_weight_past_its_layer_fails_and_is_not_silently_wrong() -> None:
    net = Peeking()
    quantise(net, torch.float32)
    with pytest.raises(AttributeError, match="weight"):
        net(torch.randn(1, 64))


def test_a_model_that_is_refused_is_left_as_it_is() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Conv1d(4, 4, 1))
    with pytest.raises(ConfigError):
        quantise(net, torch.float32)
    assert type(net[0]) is torch.nn.Linear
    with pytest.raises(ConfigError, match="no linear layers"):
        quantise(torch.nn.LayerNorm(4), torch.float32)


def test_embeddings_stay_as_they_are_also_where_the_head_is_tied_to_them(tiny_llama: Path) -> None:
    net: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert net.lm_head.weight is net.model.embed_tokens.weight
    before = net.model.embed_tokens.weight.clone()
    quantise(net, torch.float32)
    assert torch.equal(net.model.embed_tokens.weight, before)
    assert torch.equal(net.lm_head.values, quantised(before)[0])


@compiled
def test_the_numbers_are_held_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_layers, "LEAST_WEIGHTS", 0)
    model = Model(tiny_llama, dtype=torch.float32, device=CPU, quantization="int8")
    weights = model._weights
    assert weights is not None
    assert {array.dtype for array in (weights.qkv, weights.out, weights.gate_up, weights.down)} == {np.dtype(np.int8)}
    for index, layer in enumerate(model._net.base_model.layers):
        thin = layer.self_attn.q_proj._shared._together
        assert np.shares_memory(thin._array, weights.qkv[index])
        assert np.shares_memory(thin._scales, weights.qkv_scales[index])
        assert np.shares_memory(thin._quantized.values.numpy(), weights.qkv[index])
        assert np.shares_memory(layer.mlp.down_proj._array, weights.down[index])


@compiled
def test_kernels_that_are_wrong_are_found_out_at_the_start(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_linear, "LEAST_WEIGHTS", 0)

    def spoiled(net: torch.nn.Module) -> None:
        thin_linears(net)
        layer: Any = net.get_submodule("model.layers.0.mlp.down_proj")
        layer._scales[:] *= 1.5

    monkeypatch.setattr(engine_model, "thin_linears", spoiled)
    with pytest.raises(ConfigError, match="its logits on the engine's attention are off"):
        Model(tiny_llama, dtype=torch.float32, device=CPU, quantization="int8")


# -- another model -------------------------------------------------------------------------------------------------------


def test_the_same_model_in_8_bits_is_another_one_for_every_cache(
    make_driver: MakeDriver, endless: Path, tmp_path: Path
) -> None:
    plain, rounded = make_driver(), make_driver(quantization="int8")
    assert plain.core.info.id == rounded.core.info.id
    assert plain.core.info.fingerprint != rounded.core.info.fingerprint  # which answers are kept under
    assert make_driver(quantization="int8").core.info.fingerprint == rounded.core.info.fingerprint
    assert plain.core.info.fingerprint == engine_model.fingerprint(endless, torch.float32, 16, tmp_path)


def test_kv_of_the_one_is_not_found_by_the_other(make_driver: MakeDriver) -> None:
    from anaphora.clock import SystemClock
    from anaphora.policies.lru import LRU
    from anaphora.store import Store
    from anaphora.tiers.ram import RamOptions, RamTier

    tier = RamTier(RamOptions(2**24), policy=LRU(), clock=SystemClock())
    question = chat("What is kept of this, and for whom? " * 4, 4)

    def ask(quantization: str) -> Asked:
        driver = make_driver(store=Store([tier], clock=SystemClock()), quantization=quantization)
        asked = driver.ask(question)
        driver.core.flush(10.0)
        return asked

    assert ask("none").usage.kv_reused_tokens == 0
    assert ask("int8").usage.kv_reused_tokens == 0
    assert ask("none").usage.kv_reused_tokens > 0
    assert ask("int8").usage.kv_reused_tokens > 0


def test_stats_say_what_is_in_force(make_driver: MakeDriver) -> None:
    assert make_driver().core.stats()["quantization"] == "none"
    assert make_driver(quantization="int8").core.stats()["quantization"] == "int8"


# -- the real model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(make_driver: MakeDriver, smollm2: Path) -> Iterator[Driver]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield make_driver(smollm2, kv_memory=2**29, quantization="int8")
    torch.set_num_threads(before)


def test_the_real_model_answers_the_same_cold_warm_and_in_a_batch(real: Driver) -> None:
    cold = [real.ask(chat(prompt, 8)) for prompt in PROMPTS[:16]]
    real.core._scheduler._ends.forget(Scope())
    warm = [real.ask(chat(prompt, 8)) for prompt in PROMPTS[:16]]
    real.core.forget(Scope())
    together = real.ask_together(chat(prompt, 8) for prompt in PROMPTS[:16])
    assert [asked.tokens for asked in warm] == [asked.tokens for asked in cold]
    assert [asked.tokens for asked in together] == [asked.tokens for asked in cold]


def test_the_real_model_says_what_transformers_says_with_the_rounded_weights(real: Driver, smollm2: Path) -> None:
    net = widened_net(smollm2)
    for prompt in PROMPTS[:4]:
        asked = real.ask(chat(prompt, 8))
        assert asked.job is not None
        sequence = asked.job.generations[0]
        with torch.inference_mode():
            logits = net(torch.tensor([sequence.tokens]), use_cache=False).logits[0]
        assert asked.tokens[0] == logits[sequence.num_prompt - 1 : -1].argmax(-1).tolist()
