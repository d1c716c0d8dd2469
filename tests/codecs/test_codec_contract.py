import pytest

pytest.importorskip("torch")
pytest.importorskip("zstandard")

from anaphora.codecs.base import Codec
from anaphora.codecs.raw import Raw
from anaphora.codecs.zstd import Zstd
from anaphora.testing.codecs import CodecContract


class TestRaw(CodecContract):
    def make(self) -> Codec:
        return Raw()


class TestZstd(CodecContract):
    def make(self) -> Codec:
        return Zstd()
