"""LlamaIndex's `BaseEmbedding`: every text is embedded once.

with BlockingCache() as cache:
    Settings.embed_model = CachedEmbedding(OpenAIEmbedding(model=NAME), cache, model=NAME)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from pydantic import PrivateAttr

if TYPE_CHECKING:
    from anaphora.library import BlockingCache, Compute


class CachedEmbedding(BaseEmbedding):
    """What `underlying` gives, computed once for each text. `model` and `revision` as for `library.Cache.embed`.

    Texts and queries are kept apart, as many models embed them in two ways.
    """

    _underlying: BaseEmbedding = PrivateAttr()
    _cache: BlockingCache = PrivateAttr()
    _model: str = PrivateAttr()
    _revision: str = PrivateAttr()

    def __init__(self, underlying: BaseEmbedding, cache: BlockingCache, *, model: str, revision: str = "") -> None:
        super().__init__(model_name=model, embed_batch_size=underlying.embed_batch_size)
        self._underlying = underlying
        self._cache = cache
        self._model = model
        self._revision = revision

    @classmethod
    def class_name(cls) -> str:
        return "AnaphoraCachedEmbedding"

    def _get_query_embedding(self, query: str) -> Embedding:
        def compute(texts: list[str]) -> list[Embedding]:
            return [self._underlying.get_query_embedding(text) for text in texts]

        return self._embedded([query], compute, "query")[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._embedded(texts, self._underlying.get_text_embedding_batch, "passage")

    async def _aget_query_embedding(self, query: str) -> Embedding:
        async def compute(texts: list[str]) -> list[Embedding]:
            return [await self._underlying.aget_query_embedding(text) for text in texts]

        return (await self._aembedded([query], compute, "query"))[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self._aembedded(texts, self._underlying.aget_text_embedding_batch, "passage")

    def _embedded(self, texts: list[str], compute: Compute, kind: str) -> list[Embedding]:
        vectors = self._cache.embed(texts, compute, model=self._model, revision=self._revision, kind=kind)
        found: list[Embedding] = vectors.tolist()
        return found

    async def _aembedded(self, texts: list[str], compute: Compute, kind: str) -> list[Embedding]:
        vectors = await self._cache.aembed(texts, compute, model=self._model, revision=self._revision, kind=kind)
        found: list[Embedding] = vectors.tolist()
        return found
