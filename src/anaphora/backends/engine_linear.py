"""Linear layers for float32 on CPU: weights laid out once for oneDNN instead of anew at every call.

torch sends float32 products to MKL, which is at its best with one row or with hundreds. A decode step has as many rows as
there are streams; with 2 to 32 of them oneDNN on prepacked weights takes about two thirds of the time, and no more with a
chunk of a prompt (`docs/decisions/0005-cpu-linear.md` has the figures). One row stays with MKL, which computes it on one
core at the speed of memory and so does not mind a busy machine. In bfloat16 torch uses oneDNN already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_TYPICAL_ROWS = 8
"""The batch the layout is chosen for."""
_KEEP_PLAIN_BYTES = 2 * 1024**3
"""Models up to this size keep the plain weights too; larger ones compute single rows on the packed ones."""


class PackedLinear(nn.Module):
    """Takes over a `nn.Linear`."""

    def __init__(self, linear: nn.Linear, *, keep_plain: bool) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
        self._plain = weight if keep_plain else None
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self._plain is not None and rows.numel() == rows.shape[-1]:
            return F.linear(rows, self._plain, self._bias)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return product


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
    found = [
        (module, name, child) for module in net.modules() for name, child in module.named_children() if type(child) is nn.Linear
    ]
    keep_plain = sum(linear.weight.nbytes for _, _, linear in found) <= _KEEP_PLAIN_BYTES
    with torch.inference_mode():
        for module, name, linear in found:
            setattr(module, name, PackedLinear(linear, keep_plain=keep_plain))
