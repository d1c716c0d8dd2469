"""Linear layers for float32 on CPU: weights laid out once for oneDNN instead of anew at every call, and fewer, larger ones.

torch sends float32 products to MKL, which is at its best with hundreds of rows. A decode step has as many rows as there are
streams: there oneDNN on prepacked weights takes about two thirds of the time, and no more with a chunk of a prompt
(`docs/decisions/0005-cpu-linear.md` has the figures). Layers that read the same input (q, k and v; gate and up) become one
product. In bfloat16 torch uses oneDNN by itself.
"""

from __future__ import annotations

import torch
from torch import nn

_TYPICAL_ROWS = 8
"""The batch the layout is chosen for."""
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling layers that are called one after the other on the same input, in transformers' decoders."""


class PackedLinear(nn.Module):
    """Takes over one or several `nn.Linear` with the same input; their outputs lie one behind the other."""

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
        self._bias = None if all(linear.bias is None for linear in linears) else torch.cat(list(map(_bias, linears)))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return product


class _Shared:
    """The last product of layers that are computed together, until its last part is taken."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self._together = PackedLinear(*linears)
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


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and torch._C._has_mkldnn
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack_linears(net: nn.Module) -> None:
    """Replace every plain `nn.Linear` below `net`, in place. Subclasses do something else and are left alone."""
    with torch.inference_mode():
        for module in list(net.modules()):
            plain = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
            for names in _TOGETHER:
                linears = [plain.pop(name) for name in names] if plain.keys() >= set(names) else []
                if linears:
                    shared = _Shared(linears)
                    for index, name in enumerate(names):
                        setattr(module, name, PartOfLinear(shared, index))
            for name, linear in plain.items():
                setattr(module, name, PackedLinear(linear))


def _bias(linear: nn.Linear) -> torch.Tensor:
    return torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
