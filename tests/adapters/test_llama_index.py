from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from pydantic import PrivateAttr

from anaphora.adapters.llama_index import CachedEmbedding
from anaphora.library import BlockingCache


class Counting(BaseEmbedding):
    """Says what it was asked."""

    _asked: list[str] = PrivateAttr(default_factory=list)

    @property
    def asked(self) -> list[str]:
        return self._asked

    def _vector(self, text: str) -> Embedding:
        self._asked.append(text)
        return [float(len(text)), 1.0]

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._vector(f"query: {query}")

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._vector(text)

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return self._get_query_embedding(query)


def run(body: Any, tmp_path: Path) -> Counting:
    underlying = Counting()
    with BlockingCache(tmp_path) as cache:
        body(CachedEmbedding(underlying, cache, model="m"))
    return underlying


def test_a_batch_computes_what_is_new(tmp_path: Path) -> None:
    def body(embedding: CachedEmbedding) -> None:
        assert embedding.get_text_embedding_batch(["a", "bb", "a"]) == [[1.0, 1.0], [2.0, 1.0], [1.0, 1.0]]
        assert embedding.get_text_embedding("bb") == [2.0, 1.0]

    assert run(body, tmp_path).asked == ["a", "bb"]


def test_queries_are_not_taken_for_texts(tmp_path: Path) -> None:
    def body(embedding: CachedEmbedding) -> None:
        assert embedding.get_query_embedding("a") == [8.0, 1.0]
        assert embedding.get_query_embedding("a") == [8.0, 1.0]
        assert embedding.get_text_embedding("a") == [1.0, 1.0]

    assert run(body, tmp_path).asked == ["query: a", "a"]


def test_asynchronous_calls_find_the_same(tmp_path: Path) -> None:
    def body(embedding: CachedEmbedding) -> None:
        async def main() -> None:
            assert await embedding.aget_text_embedding_batch(["a", "bb"]) == [[1.0, 1.0], [2.0, 1.0]]
            assert await embedding.aget_query_embedding("a") == [8.0, 1.0]

        asyncio.run(main())
        assert embedding.get_text_embedding("a") == [1.0, 1.0]

    assert run(body, tmp_path).asked == ["a", "bb", "query: a"]
