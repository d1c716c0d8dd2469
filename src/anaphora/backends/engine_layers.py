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
from anaphora.backends.engine_linear import LEAST_WEIGHTS, TILE
from anaphora.kv.pool import KVPool, KVShape

Array = np.ndarray[Any, np.dtype[np.float32]]

_NOTHING: Array = np.empty((0, 0), dtype=np.float32)

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_QUERY_KEY_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class Weights(msgspec.Struct, frozen=True):
    """Of all layers, stacked: [layers, out, in] and [layers, out]. Arrays of size 0 stand for what a model does not have."""

    before_attention: Array
    qkv: Array
    qkv_bias: Array
    query_norm: Array
    key_norm: Array
    out: Array
    out_bias: Array
    before_mlp: Array
    gate_up: Array
    down: Array
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
    normed = hasattr(attention[0], "q_norm")
    return Weights(
        before_attention=_stacked([[layer.input_layernorm] for layer in layers]),
        qkv=_stacked(qkv),
        qkv_bias=_stacked_biases(qkv),
        query_norm=_stacked([[a.q_norm] for a in attention]) if normed else _NOTHING,
        key_norm=_stacked([[a.k_norm] for a in attention]) if normed else _NOTHING,
        out=_stacked([[a.o_proj] for a in attention]),
        out_bias=_stacked_biases([[a.o_proj] for a in attention]),
        before_mlp=_stacked([[layer.post_attention_layernorm] for layer in layers]),
        gate_up=_stacked([[m.gate_proj, m.up_proj] for m in mlp]),
        down=_stacked([[m.down_proj] for m in mlp]),
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
        all(type(linear) is nn.Linear for linear in linears)
        and attention.q_proj.weight.numel() >= LEAST_WEIGHTS
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


def _stacked(modules: list[list[Any]]) -> Array:
    """The weights [layers, sum of the rows of a layer's modules, ...], of which the modules' own become views."""
    rows = sum(module.weight.shape[0] for module in modules[0])
    together = torch.empty((len(modules), rows, *modules[0][0].weight.shape[1:]))
    for target, layer in zip(together, modules, strict=True):
        views = target.split([module.weight.shape[0] for module in layer])
        for module, view in zip(layer, views, strict=True):
            view.copy_(module.weight.detach())
            module.weight.data = view
    return together.numpy()


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
        self._run = _build(self._group, self._dim, *biased, weights.query_norm.size > 0)

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
            w.before_attention, w.qkv, w.qkv_bias, w.query_norm, w.key_norm, w.out, w.out_bias, w.before_mlp, w.gate_up, w.down,
            w.last_norm, np.float32(w.epsilon), np.float32(w.scale),
        )  # fmt: skip
        return rows


@functools.lru_cache
def _build(group: int, dim: int, qkv_biased: bool, out_biased: bool, normed: bool) -> Kernel:
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

    def dot_rows(rows: Any, weight: Any, out: Any, column: int) -> None:
        """out[m, column] = rows[m] · weight; four rows share each pass over the weight."""
        num_rows, num_in = rows.shape
        for m in range(0, num_rows - 3, 4):
            a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for i in range(num_in):
                w = weight[i]
                a += rows[m, i] * w
                b += rows[m + 1, i] * w
                c += rows[m + 2, i] * w
                d += rows[m + 3, i] * w
            out[m, column], out[m + 1, column], out[m + 2, column], out[m + 3, column] = a, b, c, d
        for m in range(num_rows - num_rows % 4, num_rows):
            a = np.float32(0)
            for i in range(num_in):
                a += rows[m, i] * weight[i]
            out[m, column] = a

    def turn(vector: Any, cos: Any, sin: Any) -> None:
        """Rotary embedding in place, the halves of a head being the two coordinates (Su et al., "RoFormer", 2021)."""
        for i in range(half):
            a, b = vector[i], vector[half + i]
            vector[i] = a * cos[i] - b * sin[i]
            vector[half + i] = b * cos[half + i] + a * sin[half + i]

    attend, merge_parts = part_of_attention(group, dim), merge(group, dim)
    norm, dot_rows, turn = jit(norm), jit(dot_rows), jit(turn)

    def run(
        hidden: Any, cos: Any, sin: Any, arena: Any, starts: Any, lengths: Any, parts: int, sums: Any, scores: Any,
        before_attention: Any, qkv: Any, qkv_bias: Any, query_norm: Any, key_norm: Any, out: Any, out_bias: Any,
        before_mlp: Any, gate_up: Any, down: Any, last_norm: Any, epsilon: Any, scale: Any,
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
                    dot_rows(normed_rows, qkv[layer, r], projected, r)
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
                    dot_rows(attended, out[layer, r], added, r)
            for m in range(num_rows):
                for i in range(width):
                    hidden[m, i] += added[m, i]
                if out_biased:
                    for i in range(width):
                        hidden[m, i] += out_bias[layer, i]
                norm(hidden[m], before_mlp[layer], epsilon, normed_rows[m])
            for tile in numba.prange((inner + TILE - 1) // TILE):
                for r in range(tile * TILE, min((tile + 1) * TILE, inner)):
                    dot_rows(normed_rows, gate_up[layer, r], gates, r)
                for r in range(tile * TILE, min((tile + 1) * TILE, inner)):
                    dot_rows(normed_rows, gate_up[layer, inner + r], ups, r)
                for m in range(num_rows):
                    for r in range(tile * TILE, min((tile + 1) * TILE, inner)):
                        gate = gates[m, r]
                        gates[m, r] = gate / (np.float32(1) + np.float32(math.exp(-gate))) * ups[m, r]
            for tile in numba.prange((width + TILE - 1) // TILE):
                for r in range(tile * TILE, min((tile + 1) * TILE, width)):
                    dot_rows(gates, down[layer, r], added, r)
            for m in range(num_rows):
                for i in range(width):
                    hidden[m, i] += added[m, i]
        for m in range(num_rows):
            norm(hidden[m], last_norm, epsilon, hidden[m])

    built: Kernel = jit(run, parallel=True, nogil=True)
    return built
