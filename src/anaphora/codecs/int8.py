"""Eight bits a value and one scale a token and head: small, quick, and about as exact as bfloat16.

A few channels of keys are far larger than the rest, and on a scale that suits them the rest is rounded coarsely. So heads
are turned first, by a Hadamard matrix: afterwards every channel has its share of every other, all are about the same size,
and the turn is undone by the same matrix (as Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024).
Scales are bfloat16, rounded up so that the largest value has a code.

    scales [layers, 2, kv_heads, block_size] | codes [layers, 2, kv_heads, block_size, head_dim]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from anaphora.codecs.base import Payload, check_length

_MOST = 127
_LEAST_SCALE = 2.0**-100
"""What would need smaller ones is zero for every purpose, and dividing by them would leave the range of float32."""


class Int8:
    name = "int8"
    lossy = True

    def bits_per_value(self, block: torch.Tensor) -> float:
        return 8.0 + 16.0 / block.shape[-1]

    def encode(self, blocks: torch.Tensor) -> list[bytes]:
        return [_encode(block) for block in blocks]

    def decode(self, payloads: Sequence[Payload], out: torch.Tensor) -> None:
        for payload, block in zip(payloads, out, strict=True):
            _decode(payload, block)


def _encode(block: torch.Tensor) -> bytes:
    turned = _turn(block.to(torch.float32))
    scales = _rounded_up(turned.abs().amax(-1, keepdim=True).div_(_MOST).clamp_(min=_LEAST_SCALE))
    codes = turned.div_(scales.float()).round_().to(torch.int8)
    return b"".join((scales.view(torch.uint8).numpy().data, codes.numpy().data))


def _decode(payload: Payload, out: torch.Tensor) -> None:
    scale_bytes = 2 * out.numel() // out.shape[-1]
    check_length(payload, scale_bytes + out.numel())
    memory = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    scales = memory[:scale_bytes].view(torch.bfloat16).view(*out.shape[:-1], 1)
    codes = memory[scale_bytes:].view(torch.int8).view(out.shape)
    turned = codes * scales.float()
    if out.dtype == torch.float32:
        _turn(turned, out)
    else:
        out.copy_(_turn(turned))


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """Positive float32 to bfloat16, which is its upper half."""
    return ((scales.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def _turn(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Each head by the largest Hadamard matrix whose size divides it; into `out`, which is contiguous, if there is one."""
    size = x.shape[-1] & -x.shape[-1]
    rows = None if out is None else out.view(-1, size)
    return torch.matmul(x.reshape(-1, size), _hadamard(size), out=rows).view(x.shape)


@functools.cache
def _hadamard(size: int) -> torch.Tensor:
    """Sylvester's, divided so that it is its own inverse. `size` is a power of two."""
    matrix = torch.ones((1, 1))
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)
