"""The decoder layers of the Llama family as one compiled call, for the few rows of a decode step in float32 on CPU.

With the weights and the KV read at the speed of memory (`engine_linear`, `engine_kernels`), a third of a decode step is
what surrounds them: hundreds of small operations, each a call into torch. Here norms, rotary embedding, KV writes, attention,
products and activations of all layers are one function.

It knows one architecture: RMSNorm → attention with rotary embedding (optionally with normed queries and keys, as in Qwen 3, and
with biases, as in Qwen 2) → RMSNorm → gated SiLU. Whether a model is of it is read off its modules, and proved by comparing
logits when it is loaded; a model that is not goes on module by module.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from anaphora.backends.engine_kernels import Kernel, jit, merge, num_parts, part_of_attention
from anaphora.backends.engine_linear import LEAST_WEIGHTS, TILE, dot_rows, is_linear, weight_of
from anaphora.backends.engine_quantized import QuantizedLinear
from anaphora.kv.pool import KVPool, KVShape

Array = np.ndarray[Any, np.dtype[np.float32]]
Matrices = Array | np.ndarray[Any, np.dtype[np.int8]]

_NOTHING: Array = np.empty((0, 0), dtype=np.float32)

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_QUERY_KEY_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class Weights(msgspec.Struct, frozen=True):
    """Of all layers, stacked: [layers, out, in], [layers, out], and for weights in 8 bits scales [layers, out, groups]. Arrays
    of size 0 stand for what a model does not have."""

    before_attention: Array
    qkv: Matrices
    qkv_scales: Array
    qkv_bias: Array
    query_norm: Array
    key_norm: Array
    out: Matrices
    out_scales: Array
    out_bias: Array
    before_mlp: Array
    gate_up: Matrices
    gate_up_scales: Array
    down: Matrices
    down_scales: Array
    last_norm: Array
    epsilon: float
    """Of the norms."""
    scale: float
    """Of the attention's scores."""


def stack(base: Any, shape: KVShape, heads: int) -> Weights | None:
    """The weights of a transformers decoder (`base_model`); None where its modules are not of the architecture, or so small
    that waking the other cores would cost more than it gives.

    The layers' own parameters become views of the stacks: nothing is held twice.
    """
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != shape.num_layers:
        return None
    frequencies = getattr(getattr(base, "rotary_emb", None), "inv_freq", None)
    if not all(_fits(layer, shape, heads) for layer in layers) or frequencies is None or 2 * len(frequencies) != shape.head_dim:
        return None
    norms = [module for module in base.modules() if hasattr(module, "variance_epsilon")]
    epsilons = {float(norm.variance_epsilon) for norm in norms}
    scales = {_scale(layer) for layer in layers}
    last = getattr(base, "norm", None)
    if last is None or len(epsilons) != 1 or len(scales) != 1 or not any(last is norm for norm in norms):
        return None
    attention: list[Any] = [layer.self_attn for layer in layers]
    mlp: list[Any] = [layer.mlp for layer in layers]
    qkv = [[a.q_proj, a.k_proj, a.v_proj] for a in attention]
    out = [[a.o_proj] for a in attention]
    gate_up = [[m.gate_proj, m.up_proj] for m in mlp]
    down = [[m.down_proj] for m in mlp]
    normed = hasattr(attention[0], "q_norm")
    name = "values" if isinstance(attention[0].q_proj, QuantizedLinear) else "weight"
    return Weights(
        before_attention=_stacked([[layer.input_layernorm] for layer in layers]),
        qkv=_stacked(qkv, name),
        qkv_scales=_stacked_scales(qkv),
        qkv_bias=_stacked_biases(qkv),
        query_norm=_stacked([[a.q_norm] for a in attention]) if normed else _NOTHING,
        key_norm=_stacked([[a.k_norm] for a in attention]) if normed else _NOTHING,
        out=_stacked(out, name),
        out_scales=_stacked_scales(out),
        out_bias=_stacked_biases(out),
        before_mlp=_stacked([[layer.post_attention_layernorm] for layer in layers]),
        gate_up=_stacked(gate_up, name),
        gate_up_scales=_stacked_scales(gate_up),
        down=_stacked(down, name),
        down_scales=_stacked_scales(down),
        last_norm=last.weight.detach().numpy(),
        epsilon=epsilons.pop(),
        scale=scales.pop(),
    )


def _fits(layer: Any, shape: KVShape, heads: int) -> bool:
    if _children(layer) != _LAYER or _children(layer.mlp) != _MLP:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if _children(attention) not in (_ATTENTION, _ATTENTION | _QUERY_KEY_NORMS) or not hasattr(attention, "scaling"):
        return False
    linears = [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in _QUERY_KEY_NORMS & _children(attention)]
    return (
        all(is_linear(linear) for linear in linears)
        and len({type(linear) for linear in linears}) == 1
        and weight_of(attention.q_proj).numel() >= LEAST_WEIGHTS
        and attention.q_proj.out_features == heads * shape.head_dim
        and attention.k_proj.out_features == attention.v_proj.out_features == shape.num_kv_heads * shape.head_dim
        and all(linear.bias is None for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and all(norm.weight.numel() == shape.head_dim for norm in norms[2:])
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    )


def _scale(layer: Any) -> float:
    return float(layer.self_attn.scaling)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _stacked(modules: list[list[Any]], name: str = "weight") -> Any:
    """The tensors of that name [layers, sum of the rows of a layer's modules, ...], of which the modules' own become views."""
    tensors = [[getattr(module, name) for module in layer] for layer in modules]
    rows = [len(tensor) for tensor in tensors[0]]
    together = torch.empty((len(tensors), sum(rows), *tensors[0][0].shape[1:]), dtype=tensors[0][0].dtype)
    for target, layer in zip(together, tensors, strict=True):
        for tensor, view in zip(layer, target.split(rows), strict=True):
            view.copy_(tensor.detach())
            tensor.data = view
    return together.numpy()


def _stacked_scales(modules: list[list[Any]]) -> Any:
    if isinstance(modules[0][0], QuantizedLinear):
        return _stacked(modules, "scales")
    return np.empty((len(modules), sum(linear.out_features for linear in modules[0]), 0), dtype=np.float32)


def _stacked_biases(modules: list[list[Any]]) -> Array:
    if all(linear.bias is None for layer in modules for linear in layer):
        return _NOTHING
    biases = [[torch.zeros(li.out_features) if li.bias is None else li.bias.detach() for li in layer] for layer in modules]
    return torch.stack([torch.cat(layer) for layer in biases]).numpy()


class DecodeLayers:
    """All layers of one model over the KV arena of `pool`, for one new token of each of several sequences."""

    def __init__(self, base: Any, weights: Weights, pool: KVPool) -> None:
        self._base = base
        self._weights = weights
        self._arena = pool.arena.numpy()
        self._kv_heads, self._dim = self._arena.shape[2], self._arena.shape[4]
        self._group = weights.out.shape[2] // (self._kv_heads * self._dim)
        self._threads = torch.get_num_threads()
        biased = weights.qkv_bias.size > 0, weights.out_bias.size > 0
        quantized = weights.qkv_scales.size > 0
        self._run = _build(self._group, self._dim, *biased, weights.query_norm.size > 0, quantized)

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]
    ) -> torch.Tensor:
        """tokens and positions [1, sequences] → hidden states after the last norm [sequences, hidden].

        `starts` are the arena positions of the sequences' tokens 0, `lengths` their tokens with the new one.
        """
        rows: torch.Tensor = self._base.embed_tokens(tokens)[0]
        cos, sin = self._base.rotary_emb(rows, position_ids=positions)
        parts = num_parts(max(lengths), self._threads)
        tasks = len(starts) * self._kv_heads * parts
        sums = np.empty((tasks, self._group, self._dim + 2), dtype=np.float32)
        scores = np.empty((tasks, self._group, -(-max(lengths) // parts)), dtype=np.float32)
        w = self._weights
        self._run(
            rows.numpy(), cos[0].numpy(), sin[0].numpy(), self._arena,
            np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64), parts, sums, scores,
            w.before_attention, w.qkv, w.qkv_scales, w.qkv_bias, w.query_norm, w.key_norm, w.out, w.out_scales, w.out_bias,
            w.before_mlp, w.gate_up, w.gate_up_scales, w.down, w.down_scales, w.last_norm,
            np.float32(w.epsilon), np.float32(w.scale),
        )  # fmt: skip
        return rows


@functools.lru_cache
def _build(group: int, dim: int, qkv_biased: bool, out_biased: bool, normed: bool, quantized: bool) -> Kernel:
    """The function for one kind of model: what it does not have is not compiled."""
    import numba

    half = dim // 2

    def norm(row: Any, weight: Any, epsilon: Any, out: Any) -> None:
        total = np.float32(0)
        for i in range(row.size):
            total += row[i] * row[i]
        factor = np.float32(1) / np.float32(math.sqrt(total / np.float32(row.size) + epsilon))
        for i in range(row.size):
            out[i] = weight[i] * (row[i] * factor)

    def turn(vector: Any, cos: Any, sin: Any) -> None:
        """Rotary embedding in place, the halves of a head being the two coordinates (Su et al., "RoFormer", 2021)."""
        for i in range(half):
            a, b = vector[i], vector[half + i]
            vector[i] = a * cos[i] - b * sin[i]
            vector[half + i] = b * cos[half + i] + a * sin[half + i]

    attend, merge_parts = part_of_attention(group, dim), merge(group, dim)
    norm, dot, turn = jit(norm), dot_rows(quantized), jit(turn)

    def run(
        hidden: Any, cos: Any, sin: Any, arena: Any, starts: Any, lengths: Any, parts: int, sums: Any, scores: Any,
        before_attention: Any, qkv: Any, qkv_scales: Any, qkv_bias: Any, query_norm: Any, key_norm: Any, out: Any,
        out_scales: Any, out_bias: Any, before_mlp: Any, gate_up: Any, gate_up_scales: Any, down: Any, down_scales: Any,
        last_norm: Any, epsilon: Any, scale: Any,
    ) -> None:  # fmt: skip
        num_rows, width = hidden.shape
        num_layers, kv_heads = arena.shape[0], arena.shape[2]
        heads = kv_heads * group
        num_qkv, inner = qkv.shape[1], gate_up.shape[1] // 2
        normed_rows = np.empty((num_rows, width), dtype=np.float32)
        projected = np.empty((num_rows, num_qkv), dtype=np.float32)
        attended = np.empty((num_rows, heads * dim), dtype=np.float32)
        gates = np.empty((num_rows, inner), dtype=np.float32)
        ups = np.empty((num_rows, inner), dtype=np.float32)
        added = np.empty((num_rows, width), dtype=np.float32)
        for layer in range(num_layers):
            for m in range(num_rows):
                norm(hidden[m], before_attention[layer], epsilon, normed_rows[m])
            for tile in numba.prange((num_qkv + TILE - 1) // TILE):
                for r in range(tile * TILE, min((tile + 1) * TILE, num_qkv)):
                    dot(normed_rows, qkv[layer, r], qkv_scales[layer, r], projected, r)
            for m in range(num_rows):
                if qkv_biased:
                    for i in range(num_qkv):
                        projected[m, i] += qkv_bias[layer, i]
                where = starts[m] + lengths[m] - 1
                for h in range(heads + kv_heads):
                    vector = projected[m, h * dim : (h + 1) * dim]
                    if normed:
                        norm(vector, query_norm[layer] if h < heads else key_norm[layer], epsilon, vector)
                    turn(vector, cos[m], sin[m])
                    if h < heads:
                        for i in range(dim):
                            vector[i] *= scale
                    else:
                        for i in range(dim):
                            arena[layer, 0, h - heads, where, i] = vector[i]
                            arena[layer, 1, h - heads, where, i] = projected[m, (h + kv_heads) * dim + i]
            for task in numba.prange(num_rows * kv_heads * parts):
                b, h, p = task // (kv_heads * parts), (task // parts) % kv_heads, task % parts
                step = (lengths[b] + parts - 1) // parts
                first = min(p * step, lengths[b])
                end = min(first + step, lengths[b])
                q = projected[b, h * group * dim : (h + 1) * group * dim].reshape(group, dim)
                attend(q, arena[layer, 0, h], arena[layer, 1, h], starts[b] + first, starts[b] + end, sums[task], scores[task])
            for b in range(num_rows):
                for h in range(kv_heads):
                    first_task = (b * kv_heads + h) * parts
                    o = attended[b, h * group * dim : (h + 1) * group * dim].reshape(group, dim)
                    merge_parts(sums[first_task : first_task + parts], o)
            for tile in numba.prange((width + TILE - 1) // TILE):
                for r in range(tile * TILE, min((tile + 1) * TILE, width)):
                    dot(attended, out[layer, r], out_scales[layer, r], added, r)
            for m in range(num_rows):
                for i in range(width):
                    hidden[m, i] += added[m, i]
                if out_biased:
                    for i in range(width):
                        hidden[m, i] += out_bias[layer, i]
                norm(hidden[m], before_mlp[layer], epsilon, normed_rows[m])
            for tile in numba.prange((inner + TILE - 1) // TILE):
                for r in range(tile * TILE, min((tile + 1) * TILE, inner)):
                    dot(normed_rows, gate_up[layer, r], gate_up_scales[layer, r], gates, r)
                for r in range(tile * TILE, min((tile + 1) * TILE, inner)):
                    dot(normed_rows, gate_up[layer, inner + r], gate_up_scales[layer, inner + r], ups, r)
                for m in range(num_rows):
                    for r in range(tile * TILE, min((tile + 1) * TILE, inner)):
                        gate = gates[m, r]
                        gates[m, r] = gate / (np.float32(1) + np.float32(math.exp(-gate))) * ups[m, r]
            for tile in numba.prange((width + TILE - 1) // TILE):
                for r in range(tile * TILE, min((tile + 1) * TILE, width)):
                    dot(gates, down[layer, r], down_scales[layer, r], added, r)
            for m in range(num_rows):
                for i in range(width):
                    hidden[m, i] += added[m, i]
        for m in range(num_rows):
            norm(hidden[m], last_norm, epsilon, hidden[m])

    built: Kernel = jit(run, parallel=True, nogil=True)
    return built
