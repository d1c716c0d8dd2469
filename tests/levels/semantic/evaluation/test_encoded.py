from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anaphora.levels.semantic.evaluation.encoded import BATCH, encoded
from anaphora.levels.semantic.evaluation.kept import Vector, Vectors


class Encoding:
    def __init__(self) -> None:
        self.num_texts = 0

    def __call__(self, texts: Sequence[str]) -> Vector:
        self.num_texts += len(texts)
        assert len(texts) <= BATCH
        return np.array([[len(text), ord(text[0])] for text in texts], np.float32)


TEXTS = [f"{'abc'[n % 3] * (n % 7 + 1)}{n}" for n in range(3 * BATCH)]


def vectors(folder: Path, encode: Encoding, fingerprint: str = "one") -> Vectors:
    return encoded(TEXTS, encode, folder, fingerprint=fingerprint, progress=lambda _text: None)


def test_every_text_gets_its_own_vector_and_is_computed_once(tmp_path: Path) -> None:
    encode = Encoding()
    found = vectors(tmp_path / "new", encode)
    assert all(found[text].tolist() == [len(text), ord(text[0])] for text in TEXTS)
    again = vectors(tmp_path / "new", encode)
    assert encode.num_texts == len(TEXTS)
    assert all((again[text] == found[text]).all() for text in TEXTS)


def test_vectors_of_another_encoder_and_those_of_a_damaged_file_are_computed_anew(tmp_path: Path) -> None:
    encode = Encoding()
    vectors(tmp_path, encode)
    vectors(tmp_path, encode, "another")
    assert encode.num_texts == 2 * len(TEXTS)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert vectors(tmp_path, encode)[TEXTS[5]].tolist() == [len(TEXTS[5]), ord(TEXTS[5][0])]
    assert encode.num_texts == 3 * len(TEXTS)
