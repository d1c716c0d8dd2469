"""THE path of texts that are to become vectors: recall what is known, compute the rest at once, learn it.

Two kinds of models: encoders of our own, and whatever upstreams have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from anaphora.backends.base import Foreign, Hosting
from anaphora.backends.encoders.base import Kind, normalised
from anaphora.backends.encoders.encoding import Encoders, TextTooLong
from anaphora.catalogue import Catalogue
from anaphora.clock import Clock
from anaphora.errors import ContextTooLong, LimitReached, ModelNotFound, NotCached, ServiceError, UpstreamFailed
from anaphora.events import Answered, Computed, Embedded, Emit, Forgotten, ignore
from anaphora.levels.embedding import Embedded as Found
from anaphora.levels.embedding import EmbeddingLevel, Encoded, Space
from anaphora.tiers.base import TierStats
from anaphora.types import LOCAL_TENANT, CacheControl, ModelInfo, Native, Request, Scope, Tenant, Usage
from anaphora.wire import openai_embeddings as wire

if TYPE_CHECKING:
    from anaphora.ledger.allowance import Allowance
    from anaphora.levels.embedding import Vectors

NO_DIRECTIVES = CacheControl()

DIALECT = "openai_chat"
"""Whose errors upstreams answer with."""

_PASSED_ON = ("x-ratelimit-", "openai-", "x-anaphora-upstream")
"""Headers of an upstream's answer, or what they begin with, that are the client's business."""


_BODY_S = 60.0
"""How long the body of an upstream's answer may take."""


class EmbeddingRequest(msgspec.Struct, frozen=True):
    model: str
    texts: tuple[str, ...]
    tenant: Tenant = LOCAL_TENANT
    dimensions: int | None = None
    kind: Kind = ""
    native: Native | None = None
    """The body it was read from, for an upstream."""
    request_id: str = ""
    workspace: str = ""
    tag: str = ""


class EmbeddingAnswer(msgspec.Struct, frozen=True):
    found: Found
    """Where the vectors came from; `vectors` below are those to give."""
    vectors: Vectors
    headers: tuple[tuple[str, str], ...] = ()
    """Of the upstream, if it was asked."""

    @property
    def num_tokens(self) -> int:
        """Of all texts, known ones and repeated ones included, as whoever computes would count them."""
        return sum(self.found.num_tokens)


class EncoderStats(msgspec.Struct, frozen=True):
    text_ms: float
    """Processor time that a text takes lately."""
    lasting: bool
    """Whether its vectors go to disk, or only to memory because it is that fast."""


class NotEmbeddings(Exception):
    """An upstream answered, but nothing that can be remembered text by text."""


class Embeddings:
    """`kinds` of encoders that are served by the names of their models. Owns the level and the encoders.

    Without `remember` nothing is learned, and nothing recalled."""

    def __init__(
        self,
        level: EmbeddingLevel,
        encoders: Encoders,
        kinds: Iterable[str],
        *,
        catalogue: Catalogue,
        hosting: Hosting | None = None,
        allowance: Allowance | None = None,
        remember: bool = True,
        clock: Clock,
        emit: Emit = ignore,
    ) -> None:
        self._level = level
        self._encoders = encoders
        self._kinds: dict[str, Any] = {kind: encoders.kind(kind) for kind in kinds}
        self._used = set(self._kinds)
        self._names = {name: kind for kind, made in self._kinds.items() for name in (kind, made.name, *made.aliases)}
        self._catalogue = catalogue
        self._hosting = hosting
        self._allowance = allowance
        self._remember = remember
        self._clock = clock
        self._emit = emit

    def start(self) -> None:
        """Load the encoders, behind everything else."""
        for kind in self._used:
            self._encoders.get(kind).begin()

    def models(self) -> tuple[ModelInfo, ...]:
        """Those of our own."""
        return tuple(ModelInfo(kind.name, max_input_tokens=kind.max_tokens) for kind in self._kinds.values())

    def model(self, name: str) -> ModelInfo | None:
        """The one of our own that clients may call `name`."""
        kind = self._kinds.get(self._names.get(name, ""))
        return None if kind is None else ModelInfo(kind.name, max_input_tokens=kind.max_tokens)

    def use(self, name: str) -> Any:
        """Have that kind of encoder for ourselves, too: the class. Raises ConfigError."""
        kind = self._encoders.kind(name)
        self._used.add(name)
        return kind

    def ready(self, name: str) -> bool:
        """Whether that kind of encoder is loaded."""
        return self._encoders.get(name).ready

    def dimensions(self, name: str) -> int | None:
        """Of the model of our own that clients may call `name`. None: there is none."""
        kind = self._kinds.get(self._names.get(name, ""))
        return None if kind is None else int(kind.dimensions)

    def hosts(self, name: str) -> bool:
        """Whether it is known who of the upstreams answers for `name`."""
        return self._hosting is not None and self._hosting.hosts(name)

    async def embed(self, request: EmbeddingRequest, control: CacheControl = NO_DIRECTIVES) -> EmbeddingAnswer:
        """Raises ModelNotFound, ContextTooLong, NotCached, LimitReached, NotEmbeddings, and what an upstream says instead."""
        if not self._remember:
            control = msgspec.structs.replace(control, no_cache=True, no_store=True)
        started_s = self._clock.monotonic_s()
        run = _Run(self, request)
        kind = self._names.get(request.model)
        try:
            if kind is not None:
                answer = await self._own(kind, request, control, run)
            else:
                answer = await self._hosted(request, control, run)
        except (LimitReached, NotCached, NotEmbeddings):
            raise  # nothing was computed
        except Exception:
            self._emit(run.failed(self._clock.monotonic_s() - started_s))
            raise
        found = answer.found
        self._emit(Embedded(request.tenant, run.model, found.num_hits, found.num_computed, found.num_shared))
        self._emit(run.answered(answer, control, self._clock.monotonic_s() - started_s))
        return answer

    async def vectors(self, kind: str, texts: Sequence[str], *, tenant: Tenant, model: str) -> Vectors:
        """Of the encoder `kind`, for a level that compares what was asked of `model`, by whose name they are forgotten. Texts
        that are too long are cut."""
        encoding = self._encoders.get(kind)
        encoder = await encoding.encoder()

        async def compute(texts: list[str]) -> Encoded:
            vectors, num_tokens = await encoding.encode(texts, encoder.kinds[0])
            return Encoded(vectors, num_tokens, encoding.text_s)

        space = Space(tenant, model, encoder.fingerprint, kind=encoder.kinds[0])
        return (await self._level.embed(texts, space=space, compute=compute)).vectors

    async def forget(self, scope: Scope) -> Forgotten:
        return await self._level.forget(scope)

    def drop(self, scope: Scope) -> None:
        """Another gateway process of this server is forgetting `scope`. Immediate."""
        self._level.drop(scope)

    async def stats(self) -> dict[str, TierStats]:
        return await self._level.stats()

    def encoders(self) -> dict[str, EncoderStats]:
        """Of those that have computed something."""
        times = {kind: self._encoders.get(kind).text_s for kind in sorted(self._used)}
        return {
            kind: EncoderStats(round(text_s * 1000, 3), self._level.lasts(text_s))
            for kind, text_s in times.items()
            if text_s is not None
        }

    async def aclose(self) -> None:
        await self._level.aclose()
        self._encoders.close()

    # -- encoders of our own -------------------------------------------------------------------------------------------

    async def _own(self, name: str, request: EmbeddingRequest, control: CacheControl, run: _Run) -> EmbeddingAnswer:
        encoding = self._encoders.get(name)
        encoder = await encoding.encoder()
        run.model = encoder.name
        kind = request.kind if request.kind in encoder.kinds else encoder.kinds[0]

        async def compute(texts: list[str]) -> Encoded:
            try:
                vectors, num_tokens = await encoding.encode(texts, kind, whole=True)
            except TextTooLong as error:
                place = f"input[{request.texts.index(texts[error.number])}]"
                raise ContextTooLong(
                    f"Invalid '{place}': it has {error.num_tokens} tokens, and {encoder.name} takes {encoder.max_tokens}.",
                    param=place,
                ) from error
            return Encoded(vectors, num_tokens, encoding.text_s)

        space = Space(request.tenant, encoder.name, encoder.fingerprint, kind=kind)
        found = await self._level.embed(request.texts, space=space, compute=run.computing(compute), control=control)
        return EmbeddingAnswer(found, _shortened(found.vectors, request.dimensions))

    # -- upstreams -----------------------------------------------------------------------------------------------------

    async def _hosted(self, request: EmbeddingRequest, control: CacheControl, run: _Run) -> EmbeddingAnswer:
        native, hosting = request.native, self._hosting
        if native is None or hosting is None:
            names = ", ".join(model.id for model in self.models())
            raise ModelNotFound(f"The model '{request.model}' does not exist here; there is: {names}.", param="model")
        model = await self._catalogue.get(request.model)
        run.model = model.id
        headers: tuple[tuple[str, str], ...] = ()

        async def compute(texts: list[str]) -> Encoded:
            nonlocal headers
            body = wire.write(native.body, texts)
            asked = Foreign(False, "POST", wire.PATH, msgspec.structs.replace(native, body=body), request.model)
            status, headers, data = await _sent(hosting, asked)
            run.upstream = dict(headers).get("x-anaphora-upstream", "")
            if status >= 400:
                raise _refused(status, headers, data, run.upstream)
            try:
                rows, num_tokens = wire.read(data, len(texts))
            except (ValueError, msgspec.MsgspecError) as error:
                raise NotEmbeddings(str(error)) from error
            vectors = np.frombuffer(b"".join(rows), "<f4").reshape(len(rows), -1).astype(np.float32)
            return Encoded(vectors, apportioned(num_tokens, [len(text) for text in texts]))

        space = Space(request.tenant, model.id, model.fingerprint, request.dimensions or 0)
        found = await self._level.embed(request.texts, space=space, compute=run.computing(compute), control=control)
        passed = tuple((name, value) for name, value in headers if name.startswith(_PASSED_ON))
        return EmbeddingAnswer(found, found.vectors, passed)


class _Run:
    """One request, as it is told to metrics and the ledger."""

    def __init__(self, embeddings: Embeddings, request: EmbeddingRequest) -> None:
        self.model = request.model
        self.upstream = ""
        self._request = request
        self._allowance = embeddings._allowance
        self._clock = embeddings._clock
        self._emit = embeddings._emit
        self._reserved = False

    def computing(self, compute: Callable[[list[str]], Any]) -> Callable[[list[str]], Any]:
        """`compute`, within what the tenant may use."""

        async def counted(texts: list[str]) -> Encoded:
            request = self._request
            if self._allowance is not None and not self._reserved:
                asking = Request(self.model, request.tenant, prompts=tuple(texts), max_tokens=0)
                self._reserved = True
                await self._allowance.reserve(asking, request.request_id)
            started_s = self._clock.monotonic_s()
            encoded: Encoded = await compute(texts)
            usage = Usage(input_tokens=sum(encoded.num_tokens))
            compute_s = self._clock.monotonic_s() - started_s
            self._emit(Computed(request.tenant, self.model, usage, compute_s, request.request_id))
            return encoded

        return counted

    def answered(self, answer: EmbeddingAnswer, control: CacheControl, elapsed_s: float) -> Answered:
        """A request of which a part was known counts as computed, with that part as what it saved."""
        found = answer.found
        known = Usage(input_tokens=answer.num_tokens - found.computed_tokens)
        event = self._event("finished", elapsed_s)
        if found.num_computed:
            return msgspec.structs.replace(
                event,
                source="bypass" if control.no_store else "miss",
                usage=Usage(input_tokens=found.computed_tokens),
                known=known if known.input_tokens else None,
                saved_s=found.saved_s,
            )
        source: Any = "hit" if found.num_hits or not found.num_shared else "collapsed"
        return msgspec.structs.replace(event, source=source, usage=known, level="embedding", saved_s=found.saved_s)

    def failed(self, elapsed_s: float) -> Answered:
        return self._event("failed", elapsed_s)

    def _event(self, outcome: Any, elapsed_s: float) -> Answered:
        request = self._request
        return Answered(
            tenant=request.tenant,
            model=self.model,
            source="miss",
            outcome=outcome,
            usage=Usage(),
            reasons=("end_turn",),
            elapsed_s=elapsed_s,
            first_s=None,
            asked=request.model,
            upstream=self.upstream,
            request_id=request.request_id,
            workspace=request.workspace,
            tag=request.tag,
        )


async def _sent(hosting: Hosting, asked: Foreign) -> tuple[int, tuple[tuple[str, str], ...], bytes]:
    """Status, headers and body of the upstream's answer. Others may be waiting for it, too, so it has an end."""
    forwarded = await hosting.forward(asked)
    try:
        async with asyncio.timeout(_BODY_S):
            data = b"".join([chunk async for chunk in forwarded.chunks])
    except TimeoutError as error:
        message = f"The upstream is too slow: its answer was not over within {_BODY_S:g} s of its beginning."
        raise UpstreamFailed(message, 504, code="upstream_timeout") from error
    finally:
        await forwarded.chunks.aclose()
    return forwarded.status, forwarded.headers, data


def _refused(status: int, headers: Sequence[tuple[str, str]], data: bytes, name: str) -> ServiceError:
    """In the upstream's own words, where it has some."""
    try:
        retry_after_s = float(dict(headers).get("retry-after", ""))
    except ValueError:
        retry_after_s = None
    again = status in (429, 500, 502, 503, 529)
    message = f"The upstream {name} answered with status {status}."
    return UpstreamFailed(message, status, retry_after_s=retry_after_s, again=again, dialect=DIALECT, body=data)


def _shortened(vectors: Vectors, dimensions: int | None) -> Vectors:
    """The first so many numbers of each vector, at length 1 again."""
    if dimensions is None or len(vectors) == 0 or dimensions == vectors.shape[1]:
        return vectors
    return normalised(vectors[:, :dimensions])


def apportioned(num_tokens: int, sizes: Sequence[int]) -> list[int]:
    """`num_tokens`, which a provider counted for several texts, by their `sizes`: whole numbers that add up to it."""
    total = sum(sizes) or 1
    shares = [num_tokens * size / total for size in sizes]
    parts = [int(share) for share in shares]
    largest = sorted(range(len(sizes)), key=lambda place: parts[place] - shares[place])
    for place in largest[: num_tokens - sum(parts)]:
        parts[place] += 1
    return parts
