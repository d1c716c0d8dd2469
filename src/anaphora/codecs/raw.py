"""The values as they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from anaphora.codecs.base import Payload, array_in, bytes_of, check_length


class Raw:
    name = "raw"
    lossy = False

    def bits_per_value(self, block: torch.Tensor) -> float:
        return 8.0 * block.dtype.itemsize

    def encode(self, blocks: torch.Tensor) -> list[bytes]:
        return [bytes_of(block).tobytes() for block in blocks.contiguous()]

    def decode(self, payloads: Sequence[Payload], out: torch.Tensor) -> None:
        for payload, block in zip(payloads, out, strict=True):
            memory = bytes_of(block)
            check_length(payload, memory.nbytes)
            memory[...] = array_in(payload, np.uint8, memory.shape)
