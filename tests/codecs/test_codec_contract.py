import pytest

pytest.importorskip("torch")
pytest.importorskip("zstandard")

from anaphora.codecs.base import Codec
from anaphora.codecs.int8 import Int8
from anaphora.codecs.raw import Raw
from anaphora.codecs.stepped import Int3, Int4
from anaphora.codecs.zstd import Zstd
from anaphora.testing.codecs import CodecContract


class TestRaw(CodecContract):
    def make(self) -> Codec:
        return Raw()


class TestZstd(CodecContract):
    def make(self) -> Codec:
        return Zstd()


class TestInt8(CodecContract):
    most_error = 0.02

    def make(self) -> Codec:
        return Int8()


class TestInt4(CodecContract):
    most_error = 0.18

    def make(self) -> Codec:
        return Int4()


class TestInt3(CodecContract):
    most_error = 0.36

    def make(self) -> Codec:
        return Int3()
