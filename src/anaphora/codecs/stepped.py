"""Rounding to steps, then as many bits as each code needs: about four bits a value, or three.

Attention feels an error in a small channel of the keys as much as one in a large channel. So all channels of a token are
rounded to the same step, a fixed share of the token's root mean square, and large channels get large codes: a fixed number
of bits for every code would be wasted on most, and an entropy coder gives each what it needs. Keys turn with their position
(rotary embeddings), but the slow channels hardly move within a block: of keys each channel's mean code is taken off first.

At the same divergence this takes about a bit less per value than codes of a fixed size, whether heads are rotated first (as
in `int8`) or channels have scales of their own.

    length of the first 4 | keys: steps, means, codes less their mean; entropy-coded | values: steps, codes; entropy-coded

All are signed bytes; a step is 2 to the power of a quarter of its byte.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import torch

from anaphora.codecs.base import Payload
from anaphora.codecs.entropy import Coder, most_encoded

_LENGTH_BYTES = 4
_MOST = 127
_PER_OCTAVE = 4


class _Stepped:
    """Subclasses say their name, and the steps as shares of a token's root mean square."""

    name: ClassVar[str]
    key_step: ClassVar[float]
    value_step: ClassVar[float]
    lossy = True

    def bits_per_value(self, block: torch.Tensor) -> float:
        """Were every bit of every byte needed, which is about twice what real KV takes."""
        keys, values = (sum(map(torch.Size.numel, shapes)) for shapes in _shapes(block))
        return 8.0 * (_LENGTH_BYTES + most_encoded(keys) + most_encoded(values)) / block.numel()

    def encode(self, blocks: torch.Tensor) -> list[bytes]:
        coder = Coder()
        return [self._encode(block, coder) for block in blocks]

    def decode(self, payloads: Sequence[Payload], out: torch.Tensor) -> None:
        coder = Coder()
        for payload, block in zip(payloads, out, strict=True):
            _decode(payload, block, coder)

    def _encode(self, block: torch.Tensor, coder: Coder) -> bytes:
        steps, codes = _rounded(block[:, 0], self.key_step)
        means = codes.mean(-2, keepdim=True).round_()
        keys = coder.encode(_as_bytes(steps, means, codes.sub_(means)))
        values = coder.encode(_as_bytes(*_rounded(block[:, 1], self.value_step)))
        return b"".join((len(keys).to_bytes(_LENGTH_BYTES, "little"), keys, values))


class Int4(_Stepped):
    name = "int4"
    key_step = 0.125
    value_step = 0.3


class Int3(_Stepped):
    name = "int3"
    key_step = 0.25
    value_step = 0.6


def _rounded(x: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps (their exponents) [..., tokens, 1] and codes [..., tokens, head_dim] of `x`: whole numbers of -127 to 127."""
    x = x.float()
    root_mean_square = x.square().mean(-1, keepdim=True).sqrt_()
    needed = x.abs().amax(-1, keepdim=True).div_(_MOST)  # for the largest code to fit
    least = torch.maximum(root_mean_square.mul_(share), needed).clamp_(min=2.0**-31)
    steps = least.log2_().mul_(_PER_OCTAVE).ceil_().clamp_(-_MOST, _MOST)
    return steps, x.div(_sizes(steps.to(torch.int8))).round_().clamp_(-_MOST, _MOST)


def _decode(payload: Payload, out: torch.Tensor, coder: Coder) -> None:
    end = _LENGTH_BYTES + int.from_bytes(payload[:_LENGTH_BYTES], "little")
    whole = memoryview(payload)
    of_keys, of_values = _shapes(out)
    steps, means, codes = _from_bytes(whole[_LENGTH_BYTES:end], of_keys, coder)
    out[:, 0] = codes.add_(means) * _sizes(steps)
    steps, codes = _from_bytes(whole[end:], of_values, coder)
    out[:, 1] = codes * _sizes(steps)


def _shapes(block: torch.Tensor) -> tuple[tuple[torch.Size, ...], tuple[torch.Size, ...]]:
    """Of what is kept of keys, and of values."""
    layers, _, heads, tokens, dim = block.shape
    steps, codes, means = (torch.Size((layers, heads, *last)) for last in ((tokens, 1), (tokens, dim), (1, dim)))
    return (steps, means, codes), (steps, codes)


def _as_bytes(*parts: torch.Tensor) -> memoryview:
    # By way of int16, from which a difference of two codes wraps around; adding the mean wraps it back.
    return torch.cat([part.flatten() for part in parts]).to(torch.int16).to(torch.int8).numpy().data


def _from_bytes(encoded: memoryview, shapes: tuple[torch.Size, ...], coder: Coder) -> list[torch.Tensor]:
    sizes = [shape.numel() for shape in shapes]
    together = torch.frombuffer(bytearray(coder.decode(encoded, sum(sizes))), dtype=torch.int8)
    return [part.view(shape) for part, shape in zip(torch.split(together, sizes), shapes, strict=True)]


def _sizes(steps: torch.Tensor) -> torch.Tensor:
    """Of steps of these exponents, in float32."""
    return _table()[steps.long() + 128]


@functools.cache
def _table() -> torch.Tensor:
    """By exponent from -128 on. Not computed by torch, whose last bits differ from one processor to the next."""
    return torch.tensor([2.0 ** (exponent / _PER_OCTAVE) for exponent in range(-128, 128)])
