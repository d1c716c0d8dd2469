"""Weights in 8 bits: each group of inputs of each output row has a scale, and its weights are whole numbers from -127 to 127.

The products are taken in the model's own numbers. A decode step in float32 on CPU runs a compiled kernel that widens weights in
registers, so that they cost reading little more than a quarter of the bytes. Everything else (prompts, other devices and
dtypes, no numba) widens a slice of the weights at a time and leaves the product to torch. The figures are in
`docs/decisions/0010-int8-weights.md`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from anaphora.backends.engine_kernels import REASSOCIATE, jit
from anaphora.errors import ConfigError

GROUP = 32
"""Inputs with a common scale."""
SLICE = 2**20
"""Weights that are widened at a time: they stay in the processor's cache until they are multiplied."""
_LANES = 8
"""Numbers in a vector of the kernel."""
_FLAGS = tuple(sorted(REASSOCIATE))


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out, in] → the whole numbers [out, in] and the scales [out, groups], by which they are to be multiplied."""
    groups = F.pad(weight.detach().float(), (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)
    scales = groups.abs().amax(2) / 127
    # Where all weights of a group are 0, any number divides them.
    divisors = torch.where(scales > 0, scales, 1.0).unsqueeze(2)
    values = (groups / divisors).round_().clamp_(-127, 127).to(torch.int8)
    return values.flatten(1)[:, : weight.shape[1]].contiguous(), scales


def widened(values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The weights that `values` [rows, in] and `scales` [rows, groups] stand for, into `out`."""
    out.copy_(values)
    whole = out.shape[1] // GROUP
    torch.unflatten(out[:, : whole * GROUP], 1, (whole, GROUP)).mul_(scales[:, :whole, None])
    if whole < scales.shape[1]:
        out[:, whole * GROUP :].mul_(scales[:, whole:])
    return out


class Scratch:
    """Where slices are widened: one at a time, for all layers of a model."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._room = torch.empty(0, dtype=dtype)

    def slices(self, values: torch.Tensor, scales: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first row, end, the weights of these rows), which are good until the next ones."""
        num_out, num_in = values.shape
        step = max(1, SLICE // num_in)
        if self._room.numel() < step * num_in or self._room.device != values.device:
            self._room = torch.empty(step * num_in, dtype=self._dtype, device=values.device)
        for first in range(0, num_out, step):
            end = min(first + step, num_out)
            room = self._room[: (end - first) * num_in].view(end - first, num_in)
            yield first, end, widened(values[first:end], scales[first:end], room)


class QuantizedLinear(nn.Module):
    """Takes over an `nn.Linear`. It has no `weight`: who would read that past `forward` gets an error, not whole numbers."""

    values: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = values.shape
        self.scratch = scratch

    @classmethod
    def of(cls, linear: nn.Linear, scratch: Scratch) -> QuantizedLinear:
        return cls(*quantised(linear.weight), None if linear.bias is None else linear.bias.detach().clone(), scratch)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, self.in_features)
        product = flat.new_empty((len(flat), self.out_features))
        for first, end, weight in self.scratch.slices(self.values, self.scales):
            torch.mm(flat, weight.t(), out=product[:, first:end])
        if self.bias is not None:
            product += self.bias
        return product.view(*rows.shape[:-1], self.out_features)


def quantise(net: nn.Module, dtype: torch.dtype) -> None:
    """Replace every `nn.Linear` below `net` by its `QuantizedLinear`, in place. Raises ConfigError, and leaves `net` as it is,
    where that would not reach all of its weights: embeddings stay as they are, and so does what is not a matrix."""
    linears = {name: module for name, module in net.named_modules(remove_duplicate=False) if type(module) is nn.Linear}
    left = {
        name: parameter.numel()
        for name, parameter in net.named_parameters(remove_duplicate=False)
        if parameter.ndim > 1
        and name.removesuffix(".weight") not in linears
        and not isinstance(net.get_submodule(name.rpartition(".")[0]), nn.Embedding)
    }
    if left or not linears:
        more = f" and {len(left) - 1} others" if left else ""
        what = max(left, key=left.__getitem__, default="no linear layers at all")
        raise ConfigError(
            f"engine.quantization = 'int8' is for weights of plain linear layers, and {type(net).__name__} has {what}{more}; "
            "set engine.quantization = 'none' for this model"
        )
    scratch = Scratch(dtype)
    for name in list(linears):
        parent, _, own = name.rpartition(".")
        setattr(net.get_submodule(parent), own, QuantizedLinear.of(linears.pop(name), scratch))
    for parameter in net.parameters():
        # As it was loaded it is a part of the mapped file, which would stay in memory as a whole.
        parameter.data = parameter.data.clone()


@functools.cache
def dot_rows() -> Any:
    """Compiled `(rows [m, in], values [in], scales [groups], out [m, n], column)`: out[:, column] = rows · weights."""
    four, one = _dot_groups(4, GROUP, _LANES, _FLAGS), _dot_groups(1, GROUP, _LANES, _FLAGS)

    def dot(rows: Any, values: Any, scales: Any, out: Any, column: int) -> None:
        num_rows, num_in = rows.shape
        for m in range(0, num_rows - 3, 4):
            four(rows, m, values, scales, out, column)
        for m in range(num_rows - num_rows % 4, num_rows):
            one(rows, m, values, scales, out, column)
        for i in range(num_in - num_in % GROUP, num_in):  # of the last group, if it is smaller
            weight = np.float32(values[i]) * scales[scales.size - 1]
            for m in range(num_rows):
                out[m, column] += rows[m, i] * weight

    return jit(dot)


def _dot_groups(num_rows: int, group: int, lanes: int, flags: tuple[str, ...]) -> Any:
    """Compiled `(rows, first, values, scales, out, column)`: of rows `first` and so on, over all whole groups; what they widen
    is shared by the rows. Written as vector instructions: a loop over a group would end with a sum across a vector each time.

    The constants are arguments so that they are part of the key under which compiled code is kept.
    """
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    vector, narrow, integers = (ir.VectorType(kind, lanes) for kind in (ir.FloatType(), ir.IntType(8), ir.IntType(32)))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, values, scales, out = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 2, 3, 4))
        first, column = args[1], args[5]
        number = first.type
        num_in = builder.extract_value(rows.shape, 1)
        num_out = builder.extract_value(out.shape, 1)
        at_row = [builder.add(first, number(m)) for m in range(num_rows)]
        starts = [builder.gep(rows.data, [builder.mul(row, num_in)]) for row in at_row]
        nought = ir.Constant(vector, [0.0] * lanes)
        sums = [cgutils.alloca_once_value(builder, nought) for _ in range(num_rows)]  # type: ignore[no-untyped-call]
        nothing = ir.Constant(vector, ir.Undefined)
        with cgutils.for_range(builder, builder.udiv(num_in, number(group))) as loop:
            begin = builder.mul(loop.index, number(group))
            at = [builder.add(begin, number(i)) for i in range(0, group, lanes)]
            places = [builder.bitcast(builder.gep(values.data, [i]), narrow.as_pointer()) for i in at]
            weights = [builder.sitofp(builder.load(place, align=1), vector) for place in places]
            scale = builder.load(builder.gep(scales.data, [loop.index]))
            scale = builder.insert_element(nothing, scale, ir.IntType(32)(0))
            scale = builder.shuffle_vector(scale, nothing, ir.Constant(integers, None))
            for start, total in zip(starts, sums, strict=True):
                part = nought
                for i, weight in zip(at, weights, strict=True):
                    row = builder.load(builder.bitcast(builder.gep(start, [i]), vector.as_pointer()), align=4)
                    part = builder.fadd(part, builder.fmul(row, weight, flags=flags), flags=flags)
                scaled = builder.fmul(part, scale, flags=flags)
                builder.store(builder.fadd(builder.load(total), scaled, flags=flags), total)
        for row, total in zip(at_row, sums, strict=True):
            parts = builder.load(total)
            product = ir.FloatType()(0.0)
            for lane in range(lanes):
                product = builder.fadd(product, builder.extract_element(parts, ir.IntType(32)(lane)), flags=flags)
            builder.store(product, builder.gep(out.data, [builder.add(builder.mul(row, num_out), column)]))
        return context.get_dummy_value()

    def dot_groups(typingctx: Any, rows: Any, first: Any, values: Any, scales: Any, out: Any, column: Any) -> Any:
        assert all(array.layout == "C" for array in (rows, values, scales, out)), "places are computed from shapes"
        return types.void(rows, types.intp, values, scales, out, types.intp), codegen

    return intrinsic(dot_groups)
