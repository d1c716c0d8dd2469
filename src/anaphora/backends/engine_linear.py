"""Linear layers for float32 on CPU: few rows at the speed of memory, and sibling layers as one product.

A decode step has one row per stream. Its products then cost what reading the weights costs, if every weight is read once and
all cores read; torch's float32 product leaves a core idle with one row and falls off with a few. The kernel here, compiled by
numba where that is installed, takes up to `MOST_ROWS` rows (`docs/decisions/0005-cpu-kernels.md` has the figures); larger
batches stay with torch. Layers that read the same input (q, k and v; gate and up) become one product. Where the weights are in
8 bits (`engine_quantized`), so are the kernel's.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from anaphora.backends import engine_quantized
from anaphora.backends.engine_kernels import Kernel, jit
from anaphora.backends.engine_quantized import QuantizedLinear

Linear = nn.Linear | QuantizedLinear

MOST_ROWS = 16
FEW_ROWS = 128
"""Up to this many rows, torch is faster with the rows as columns: several cores then divide the weights."""
LEAST_WEIGHTS = 64 * 1024
"""Smaller layers stay with torch: waking the other cores would cost more than the product."""
TILE = 32
"""Weight rows per task."""
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling layers that are called one after the other on the same input, in transformers' decoders."""


class ThinLinear(nn.Module):
    """Takes over one or several linear layers with the same input; their outputs lie one behind the other."""

    def __init__(self, *linears: Linear) -> None:
        super().__init__()
        weights = [weight_of(linear) for linear in linears]
        # A single layer's weight is shared, not copied: it may be tied to the embeddings.
        self._weight = weights[0].contiguous() if len(weights) == 1 else _joined(weights)
        self._array = self._weight.numpy()
        self._bias = None if all(linear.bias is None for linear in linears) else torch.cat(list(map(_bias, linears)))
        self._scales = np.empty((len(self._weight), 0), dtype=np.float32)
        self._quantized: QuantizedLinear | None = None
        if isinstance(linears[0], QuantizedLinear):
            scales = _joined([linear.scales for linear in linears if isinstance(linear, QuantizedLinear)])
            self._scales = scales.numpy()
            self._quantized = QuantizedLinear(self._weight, scales, self._bias, linears[0].scratch)
        self._kernel = _build(self._quantized is not None) if self._weight.numel() >= LEAST_WEIGHTS else None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        num_out, num_in = self._weight.shape
        if self._kernel is None or rows.numel() > MOST_ROWS * num_in:
            if self._quantized is not None:
                return self._quantized(rows)  # type: ignore[no-any-return]
            return _linear(rows, self._weight, self._bias)
        product = torch.empty((*rows.shape[:-1], num_out))
        flat = rows.contiguous().view(-1, num_in)
        self._kernel(flat.numpy(), self._array, self._scales, product.view(-1, num_out).numpy())
        return product if self._bias is None else product.add_(self._bias)


class _Shared:
    """The last product of layers that are computed together, until its last part is taken."""

    def __init__(self, linears: list[Linear]) -> None:
        self._together = ThinLinear(*linears)
        self._sizes = [linear.out_features for linear in linears]
        self._rows: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()

    def part(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        if rows is not self._rows:
            self._rows, self._parts = rows, self._together(rows).split(self._sizes, dim=-1)
        part = self._parts[index]
        if index == len(self._sizes) - 1:
            self._rows, self._parts = None, ()
        return part


class PartOfLinear(nn.Module):
    """Stands in the place of one of the layers that are computed together."""

    def __init__(self, shared: _Shared, index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._shared.part(self._index, rows)


class FusedNorm(nn.Module):
    """Takes over a transformers RMSNorm: one pass over the rows instead of five."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = norm.variance_epsilon

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(rows, self.weight.shape, self.weight, self.variance_epsilon)  # type: ignore[arg-type]


def thin_linears(net: nn.Module) -> None:
    """Replace every plain `nn.Linear`, every `QuantizedLinear` and every RMSNorm below `net`, in place. Other subclasses of
    `nn.Linear` do something else and are left alone."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon") and hasattr(child, "weight"):
                setattr(module, name, FusedNorm(child))
        plain: dict[str, Any] = {name: child for name, child in module.named_children() if is_linear(child)}
        for names in _TOGETHER:
            linears = [plain.pop(name) for name in names] if plain.keys() >= set(names) else []
            if linears:
                shared = _Shared(linears)
                for index, name in enumerate(names):
                    setattr(module, name, PartOfLinear(shared, index))
        for name, linear in plain.items():
            setattr(module, name, ThinLinear(linear))


def is_linear(module: nn.Module) -> bool:
    """Whether it computes rows · weights + bias and nothing else. A subclass may do more."""
    return type(module) in (nn.Linear, QuantizedLinear)


def weight_of(linear: Linear) -> torch.Tensor:
    """[out, in]: the weights, or the whole numbers that stand for them."""
    return linear.values if isinstance(linear, QuantizedLinear) else linear.weight.detach()


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    num_out, num_in = weight.shape
    if rows.numel() > FEW_ROWS * num_in:
        return F.linear(rows, weight, bias)
    product = torch.mm(weight, rows.reshape(-1, num_in).t()).t().contiguous().view(*rows.shape[:-1], num_out)
    return product if bias is None else product.add_(bias)


def _joined(weights: list[torch.Tensor]) -> torch.Tensor:
    """All rows as one matrix: without a copy where they lie one behind the other already."""
    first, end = weights[0], 0
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or not weight.is_contiguous() or weight.storage_offset() != first.storage_offset() + end:
            return torch.cat(weights)
        end += weight.numel()
    return first.as_strided((end // first.shape[1], first.shape[1]), (first.shape[1], 1))


def _bias(linear: Linear) -> torch.Tensor:
    return torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()


@functools.cache
def dot_rows(quantized: bool) -> Any:
    """Compiled `(rows [m, in], weight [in], scales [groups], out [m, n], column)`: out[:, column] = rows · weight; four rows
    share each pass over the weight."""
    if quantized:
        return engine_quantized.dot_rows()

    def dot(rows: Any, weight: Any, scales: Any, out: Any, column: int) -> None:
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

    return jit(dot)


@functools.cache
def _build(quantized: bool) -> Kernel:
    import numba

    dot = dot_rows(quantized)

    def multiply(rows: Any, weight: Any, scales: Any, product: Any) -> None:
        num_out = weight.shape[0]
        for tile in numba.prange((num_out + TILE - 1) // TILE):
            for r in range(tile * TILE, min((tile + 1) * TILE, num_out)):
                dot(rows, weight[r], scales[r], product, r)

    kernel: Kernel = jit(multiply, parallel=True, nogil=True)
    return kernel
