"""zstd as nothing but an entropy coder: bytes that come unevenly often, but in no order.

So are exponents and rounded values of KV. Repeated runs of them are chance: where zstd looks for some, it takes longer and
codes worse. It is told not to (a tiny table, long matches only), which was both the smallest and the fastest setting.
"""

from __future__ import annotations

from anaphora.codecs.base import Payload
from anaphora.errors import DamagedBlock


class Coder:
    """For one thread at a time."""

    def __init__(self) -> None:
        import zstandard

        parameters = zstandard.ZstdCompressionParameters(
            compression_level=1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6
        )
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._decompressor = zstandard.ZstdDecompressor()
        self._content_size = zstandard.frame_content_size
        self._error = zstandard.ZstdError

    def encode(self, data: Payload) -> bytes:
        return self._compressor.compress(data)

    def decode(self, encoded: Payload, length: int) -> bytes:
        """Raises DamagedBlock where it is not exactly the code of `length` bytes."""
        try:
            # Asked first: room would be made for as many bytes as the code says there are.
            if self._content_size(encoded) != length:
                raise DamagedBlock("its compressed bytes are of another length")
            return self._decompressor.decompress(encoded, allow_extra_data=False)
        except self._error as error:
            raise DamagedBlock(f"its compressed bytes are damaged: {error}") from error


def most_encoded(length: int) -> float:
    """Bytes that the code of `length` bytes takes at most, as zstd's format guarantees (ZSTD_compressBound)."""
    return length + length / 256 + 64
