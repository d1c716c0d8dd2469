"""Without loss: the bytes that hold the exponents are compressed, the others are kept.

The most significant byte of a float is its sign and most of its exponent. In KV those are few values, used very unevenly, and
zstd's entropy coder brings them to about 3 bits; the bytes of the mantissa are noise, on which no time is spent. Repeated
runs of exponents are chance: whatever zstd is told to look for, it finds nothing, takes longer, and codes worse. So it is
told not to look (a tiny table, long matches only), which was both the smallest and the fastest setting.

    length of the compressed bytes 4 | compressed bytes | the other bytes, all least significant ones first
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from anaphora.codecs.base import Payload, array_in, bytes_of, check_length
from anaphora.errors import DamagedBlock

_LENGTH_BYTES = 4


class Zstd:
    name = "zstd"
    lossy = False

    def bits_per_value(self, block: torch.Tensor) -> float:
        """Of values without any pattern; those of KV take 27 bits where float32 has 32, and 11 where bfloat16 has 16."""
        n = block.numel()
        overhead = _LENGTH_BYTES + n / 256 + 64  # of zstd, as its format guarantees (ZSTD_compressBound)
        return 8.0 * (block.dtype.itemsize + overhead / n)

    def encode(self, blocks: torch.Tensor) -> list[bytes]:
        parameters = zstandard.ZstdCompressionParameters(
            compression_level=1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6
        )
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
        return [_encode(bytes_of(block), compressor) for block in blocks.contiguous()]

    def decode(self, payloads: Sequence[Payload], out: torch.Tensor) -> None:
        decompressor = zstandard.ZstdDecompressor()
        for payload, block in zip(payloads, out, strict=True):
            _decode(payload, bytes_of(block), decompressor)


def _encode(memory: NDArray[np.uint8], compressor: zstandard.ZstdCompressor) -> bytes:
    planes = np.ascontiguousarray(memory.T)
    top = compressor.compress(planes[-1].data)
    return b"".join((len(top).to_bytes(_LENGTH_BYTES, "little"), top, planes[:-1].data))


def _decode(payload: Payload, memory: NDArray[np.uint8], decompressor: zstandard.ZstdDecompressor) -> None:
    n, width = memory.shape
    end = _LENGTH_BYTES + int.from_bytes(payload[:_LENGTH_BYTES], "little")
    check_length(payload, end + n * (width - 1))
    compressed = memoryview(payload)[_LENGTH_BYTES:end]
    try:
        # Asked first: room would be made for as many bytes as the payload says there are.
        if zstandard.frame_content_size(compressed) != n:
            raise DamagedBlock("its compressed bytes are of another number of values")
        top = decompressor.decompress(compressed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedBlock(f"its compressed bytes are damaged: {error}") from error
    memory[:, -1] = array_in(top, np.uint8, (n,))
    for number, plane in enumerate(array_in(payload, np.uint8, (width - 1, n), end)):
        memory[:, number] = plane
