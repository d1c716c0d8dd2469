"""The contract every codec keeps (`anaphora.testing.codecs` checks it), and the bytes of tensors, which all codecs need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from anaphora.errors import DamagedBlock

Payload: TypeAlias = bytes | bytearray | memoryview
"""One encoded block."""


class Codec(Protocol):
    """KV blocks to bytes and back.

    Blocks are CPU tensors of shape [n, layers, 2 (keys, values), kv_heads, block_size, head_dim], of float32, bfloat16 or
    float16, all finite. A payload is one block's alone: it depends on nothing else, so blocks may be decoded in any order and
    company. The same block always gives the same bytes, and the same payload the same values. A codec has no state: several
    threads may use one at once. The heavy parts run without Python's lock.
    """

    @property
    def name(self) -> str:
        """As in the registry; frames carry it (up to 255 bytes of UTF-8). It stands for the format of the payloads, too."""
        ...

    @property
    def lossy(self) -> bool:
        """Whether decoded values may differ from what was encoded."""
        ...

    def bits_per_value(self, block: torch.Tensor) -> float:
        """What a value of such a block takes at most, with all that its payload needs beside the values.

        Only the shape [layers, 2, kv_heads, block_size, head_dim] and the type of `block` count; it may be a meta tensor.
        """
        ...

    def encode(self, blocks: torch.Tensor) -> list[bytes]:
        """One payload for each block."""
        ...

    def decode(self, payloads: Sequence[Payload], out: torch.Tensor) -> None:
        """Fill `out`, which is contiguous, with the blocks of `payloads`, encoded from blocks of its shape and type.

        Raises DamagedBlock for a payload that cannot be that of such a block; `out` may then be filled in part.
        """
        ...


def bytes_of(block: torch.Tensor) -> NDArray[np.uint8]:
    """The memory of one contiguous block: [values, bytes of a value]."""
    array: NDArray[np.uint8] = block.view(-1).view(torch.uint8).view(-1, block.dtype.itemsize).numpy()
    return array


def array_in(payload: Payload, dtype: Any, shape: Sequence[int], start: int = 0) -> NDArray[Any]:
    """The array that lies in `payload` from byte `start` on; not to be written to."""
    return np.frombuffer(payload, dtype, int(np.prod(shape)), start).reshape(shape)


def check_length(payload: Payload, length: int) -> None:
    """Raises DamagedBlock."""
    if len(payload) != length:
        raise DamagedBlock(f"a payload of {len(payload)} bytes, not {length}")
