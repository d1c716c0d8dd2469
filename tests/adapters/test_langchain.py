from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("langchain_core")

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from anaphora.adapters.langchain import CachedEmbeddings
from anaphora.backends.encoders.minilm import MiniLM
from anaphora.library import BlockingCache


class Local(Embeddings):
    """A real model behind LangChain's interface, which counts."""

    def __init__(self) -> None:
        self.documents: list[str] = []
        self.queries: list[str] = []
        self._model = MiniLM(threads=1)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.documents += texts
        rows: list[list[float]] = self._model.encode(texts).tolist()
        return rows

    def embed_query(self, text: str) -> list[float]:
        self.queries.append(text)
        row: list[float] = self._model.encode([text])[0].tolist()
        return row


TEXTS = ["Cats sleep most of the day.", "Prompt caching makes long prompts cheap.", "Cats sleep most of the day."]


def test_a_vector_store_is_built_again_without_computing(tmp_path: Path) -> None:
    local = Local()
    with BlockingCache(tmp_path) as cache:
        embeddings = CachedEmbeddings(local, cache, model="minilm")
        for _ in range(2):
            store = InMemoryVectorStore(embeddings)
            store.add_texts(TEXTS)
            assert store.similarity_search("What do long prompts cost?", k=1)[0].page_content == TEXTS[1]
    assert local.documents == TEXTS[:2]
    assert local.queries == ["What do long prompts cost?"]


def test_asynchronous_calls_find_the_same(tmp_path: Path) -> None:
    local = Local()

    async def body(embeddings: CachedEmbeddings) -> None:
        assert await embeddings.aembed_documents(TEXTS) == embeddings.embed_documents(TEXTS)
        assert await embeddings.aembed_query("Why?") == embeddings.embed_query("Why?")

    with BlockingCache(tmp_path) as cache:
        asyncio.run(body(CachedEmbeddings(local, cache, model="minilm")))
    assert (local.documents, local.queries) == (TEXTS[:2], ["Why?"])


def test_what_is_kept_is_close_to_what_the_model_gives(tmp_path: Path) -> None:
    local = Local()
    with BlockingCache(tmp_path) as cache:
        kept = CachedEmbeddings(local, cache, model="minilm").embed_documents(TEXTS)
    assert kept[0] == pytest.approx(local.embed_documents(TEXTS)[0], abs=1e-3)
