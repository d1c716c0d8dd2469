"""What every encoder owes its callers, as tests to inherit.

class TestMyEncoder(EncoderContract):
    def make(self) -> Encoder:
        return MyEncoder()
"""

from __future__ import annotations

import re
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anaphora.backends.encoders.base import Encoder

TEXTS = (
    "How do I reset my password?",
    "Please tell me how to reset the password that I have forgotten.",
    "The recipe needs two eggs and a cup of flour.",
    "¿Cuál es la capital de Francia?",
    "Какая столица у Франции?",
    "naïve Ünïcode 漢字 😀 a\0b [CLS] 3.5%",
    "word " * 40,
    "x",
)


class EncoderContract:
    """Inherit, and say how an encoder is made. One is made for all tests of a class."""

    _made: ClassVar[Encoder | None] = None

    def make(self) -> Encoder:
        raise NotImplementedError

    @property
    def encoder(self) -> Encoder:
        if self._made is None:
            type(self)._made = self.make()
        assert self._made is not None
        return self._made

    def test_a_text_becomes_a_row_of_so_many_numbers_of_32_bits_whose_length_is_one(self) -> None:
        vectors = self.encoder.encode(TEXTS)
        assert vectors.shape == (len(TEXTS), self.encoder.dimensions)
        assert vectors.dtype == np.float32
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)

    def test_no_text_is_no_row(self) -> None:
        assert self.encoder.encode([]).shape == (0, self.encoder.dimensions)

    def test_an_empty_text_has_a_vector_of_finite_numbers(self) -> None:
        assert np.isfinite(self.encoder.encode(["", " "])).all()

    def test_a_text_is_the_same_alone_and_among_others(self) -> None:
        together = self.encoder.encode(TEXTS)
        alone = np.concatenate([self.encoder.encode([text]) for text in TEXTS])
        assert np.abs(together - alone).max() < 1e-5
        assert np.abs(self.encoder.encode(TEXTS[::-1])[::-1] - together).max() < 1e-5

    def test_a_text_whose_tokens_were_counted_before_is_the_same(self) -> None:
        before = self.encoder.encode(TEXTS)
        num_tokens = [self.encoder.num_tokens(text) for text in TEXTS]
        for _ in range(2):
            assert np.array_equal(self.encoder.encode(TEXTS), before)
        assert [self.encoder.num_tokens(text) for text in TEXTS] == num_tokens

    def test_a_paraphrase_is_nearer_than_something_else(self) -> None:
        question, paraphrase, recipe = self.encoder.encode(TEXTS[:3])
        assert question @ paraphrase > question @ recipe + 0.1

    def test_another_one_that_is_made_alike_is_the_same(self) -> None:
        other = self.make()
        assert other.fingerprint == self.encoder.fingerprint
        assert re.fullmatch("[0-9a-f]{64}", other.fingerprint)
        assert np.abs(other.encode(TEXTS) - self.encoder.encode(TEXTS)).max() < 1e-5

    def test_a_text_longer_than_the_limit_is_cut_there(self) -> None:
        encoder = self.encoder
        long = "word " * (encoder.max_tokens + 10)
        assert encoder.num_tokens(long) > encoder.max_tokens
        vectors = encoder.encode([long, long + "and something else altogether"])
        assert np.abs(vectors[0] - vectors[1]).max() < 1e-5

    def test_a_kind_that_it_tells_apart_changes_the_vector_and_any_other_does_not(self) -> None:
        encoder = self.encoder
        usual = encoder.encode(TEXTS[:1], encoder.kinds[0])
        assert np.array_equal(encoder.encode(TEXTS[:1]), usual)
        for kind in ("query", "passage"):
            other = encoder.encode(TEXTS[:1], kind)
            assert np.array_equal(other, usual) == (kind not in encoder.kinds[1:])

    @settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.differing_executors])
    @given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
    def test_any_text_has_a_vector(self, texts: list[str]) -> None:
        vectors = self.encoder.encode(texts)
        assert np.isfinite(vectors).all()
        assert (np.linalg.norm(vectors, axis=1) <= 1 + 1e-5).all()
        assert all(self.encoder.num_tokens(text) >= 0 for text in texts)
