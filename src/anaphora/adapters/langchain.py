"""LangChain's `Embeddings`: every text is embedded once.

with BlockingCache() as cache:
    embeddings = CachedEmbeddings(OpenAIEmbeddings(model=NAME), cache, model=NAME)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_core.embeddings import Embeddings

if TYPE_CHECKING:
    from anaphora.library import BlockingCache


class CachedEmbeddings(Embeddings):
    """What `underlying` gives, computed once for each text. `model` and `revision` as for `library.Cache.embed`.

    Documents and queries are kept apart, as many models embed them in two ways.
    """

    def __init__(self, underlying: Embeddings, cache: BlockingCache, *, model: str, revision: str = "") -> None:
        self._underlying = underlying
        self._cache = cache
        self._model = model
        self._revision = revision

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        compute = self._underlying.embed_documents
        vectors = self._cache.embed(texts, compute, model=self._model, revision=self._revision, kind="passage")
        found: list[list[float]] = vectors.tolist()
        return found

    def embed_query(self, text: str) -> list[float]:
        def compute(texts: list[str]) -> list[list[float]]:
            return [self._underlying.embed_query(text) for text in texts]

        vectors = self._cache.embed([text], compute, model=self._model, revision=self._revision, kind="query")
        found: list[float] = vectors[0].tolist()
        return found

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        compute = self._underlying.aembed_documents
        vectors = await self._cache.aembed(texts, compute, model=self._model, revision=self._revision, kind="passage")
        found: list[list[float]] = vectors.tolist()
        return found

    async def aembed_query(self, text: str) -> list[float]:
        async def compute(texts: list[str]) -> list[list[float]]:
            return [await self._underlying.aembed_query(text) for text in texts]

        vectors = await self._cache.aembed([text], compute, model=self._model, revision=self._revision, kind="query")
        found: list[float] = vectors[0].tolist()
        return found
