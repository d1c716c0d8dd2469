"""Without loss: the bytes that hold the exponents are compressed, the others are kept.

The most significant byte of a float is its sign and most of its exponent. In KV those are few values, used very unevenly, and
come down to about 3 bits; the bytes of the mantissa are noise, on which no time is spent.

    length of the compressed bytes 4 | compressed bytes | the other bytes, all least significant ones first
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from anaphora.codecs.base import Payload, array_in, bytes_of, check_length
from anaphora.codecs.entropy import Coder, most_encoded

_LENGTH_BYTES = 4


class Zstd:
    name = "zstd"
    lossy = False

    def bits_per_value(self, block: torch.Tensor) -> float:
        """Of values without any pattern; those of KV take 27 bits where float32 has 32, and 11 where bfloat16 has 16."""
        n = block.numel()
        return 8.0 * (block.dtype.itemsize - 1 + (_LENGTH_BYTES + most_encoded(n)) / n)

    def encode(self, blocks: torch.Tensor) -> list[bytes]:
        coder = Coder()
        return [_encode(bytes_of(block), coder) for block in blocks.contiguous()]

    def decode(self, payloads: Sequence[Payload], out: torch.Tensor) -> None:
        coder = Coder()
        for payload, block in zip(payloads, out, strict=True):
            _decode(payload, bytes_of(block), coder)


def _encode(memory: NDArray[np.uint8], coder: Coder) -> bytes:
    planes = np.ascontiguousarray(memory.T)
    top = coder.encode(planes[-1].data)
    return b"".join((len(top).to_bytes(_LENGTH_BYTES, "little"), top, planes[:-1].data))


def _decode(payload: Payload, memory: NDArray[np.uint8], coder: Coder) -> None:
    n, width = memory.shape
    end = _LENGTH_BYTES + int.from_bytes(payload[:_LENGTH_BYTES], "little")
    check_length(payload, end + n * (width - 1))
    memory[:, -1] = array_in(coder.decode(memoryview(payload)[_LENGTH_BYTES:end], n), np.uint8, (n,))
    for number, plane in enumerate(array_in(payload, np.uint8, (width - 1, n), end)):
        memory[:, number] = plane
