"""`POST /v1/embeddings`: texts to vectors, by encoders of our own or by whoever of the upstreams has the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anaphora.errors import NotFound
from anaphora.gateway import Gateway
from anaphora.server import headers, passing
from anaphora.server.endpoint import JSON, OPENAI, Call, Endpoint, id_header
from anaphora.server.foreign import Elsewhere
from anaphora.server.headers import RawHeaders
from anaphora.types import CacheControl
from anaphora.wire import openai_embeddings as wire

if TYPE_CHECKING:
    from anaphora.embeddings import EmbeddingAnswer, Embeddings


class EmbeddingsEndpoint(Endpoint):
    """What only an upstream can understand goes there and back as it is, and nothing of it is remembered."""

    async def answer(self, call: Call) -> None:
        gateway = self.api.gateway
        body = await call.body()
        if gateway.embeddings is None:
            await self._pass_on(call, body)
            return
        name = wire.model_of(body)
        asked = _read(gateway.embeddings, gateway, call, name, body)
        if asked is None:
            await self._pass_on(call, body)
            return
        from anaphora.embeddings import EmbeddingRequest, NotEmbeddings

        native = None
        if gateway.embeddings.dimensions(name) is None:
            native = passing.native(OPENAI.name, body, call.head, own_keys=bool(self.api.keyring), further=("content-type",))
        request = EmbeddingRequest(
            model=name,
            texts=asked.texts,
            tenant=call.tenant,
            dimensions=asked.dimensions,
            kind=asked.kind,
            native=native,
            request_id=f"req_{call.ids.id}",
            workspace=call.workspace,
            tag=headers.tag(call.head.get(b"x-anaphora-tag")),
        )
        control = headers.cache_control(call.head.get(b"cache-control"))
        try:
            answer = await gateway.embed(request, control)
        except NotEmbeddings:
            await self._pass_on(call, body)
            return
        rows = [row.tobytes() for row in answer.vectors.astype("<f4", copy=False)]
        raw = [JSON, id_header(OPENAI, call.ids), *_headers(answer, control)]
        await call.sender.whole(200, raw, wire.render(rows, answer.num_tokens, asked))

    async def _pass_on(self, call: Call, body: bytes) -> None:
        if not self.api.gateway.hosting:
            raise NotFound(
                "This server has no embedding models; its setting embeddings.models says which it shall have.",
                code="unknown_url",
            )
        await Elsewhere(self.api).pass_on(call, body)


def _read(embeddings: Embeddings, gateway: Gateway, call: Call, name: str, body: bytes) -> wire.EmbeddingsAsked | None:
    """None: it is for an upstream to read."""
    dimensions = embeddings.dimensions(name)
    if dimensions is not None:
        return wire.parse(body, dimensions=dimensions)
    if not gateway.hosting:
        return wire.parse(body, dimensions=1 << 20)  # and then it is said that there is no such model
    return wire.parse_plain(body) if embeddings.hosts(name) and not call.connection["query_string"] else None


def _headers(answer: EmbeddingAnswer, control: CacheControl) -> RawHeaders:
    """Where the vectors came from, how many had to be computed, and what the rest saved."""
    found = answer.found
    ttl = b"" if found.ttl_s is None else b"; ttl=%d" % found.ttl_s
    if not found.num_computed and found.num_hits:
        status = b"anaphora; hit%b" % ttl
    elif found.num_hits:
        status = b"anaphora; fwd=partial"
    elif found.num_computed:
        reason = b"bypass" if control.no_store else b"request" if control.no_cache else b"miss"
        status = b"anaphora; fwd=%b" % reason
    else:
        status = b"anaphora; fwd=miss; collapsed"
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
    if found.age_s is not None:
        raw.append((b"age", b"%d" % max(0, found.age_s)))
    return [
        *raw,
        (b"cache-status", status),
        (b"x-anaphora-computed-texts", b"%d" % found.num_computed),
        (b"x-anaphora-computed-tokens", b"%d" % found.computed_tokens),
        (b"x-anaphora-saved-ms", b"%d" % (found.saved_s * 1000)),
    ]
