"""The endpoints. Errors before the first byte have their own status; after it they are the stream's error event."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from anaphora.accounting import Asked, Bill
from anaphora.answer import Live, Recalled
from anaphora.clock import ManualClock
from anaphora.errors import BackendFailed, InvalidRequest, NotFound, PermissionDenied, ServiceError
from anaphora.explain import Trail
from anaphora.server import headers, passing
from anaphora.server.endpoint import ANTHROPIC, JSON, OPENAI, Api, Call, Endpoint, id_header
from anaphora.server.foreign import Elsewhere
from anaphora.server.headers import RawHeaders
from anaphora.server.metrics import CONTENT_TYPE
from anaphora.types import Begin, Delta, End, Raw, Request, Scope, Tenant
from anaphora.wire import sse
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Dialect, Parsed, Rendering, StreamWriter
from anaphora.wire.openai_common import render_model, render_models

log = logging.getLogger(__name__)

Shape = TypeVar("Shape")

_EVENTS = [(b"content-type", sse.CONTENT_TYPE.encode() + b"; charset=utf-8"), (b"cache-control", b"no-cache")]


_BUG = "Something went wrong inside Anaphora."
_SHORT_BODY = 32 << 10
_NUM_PARSED = 256
"""Bodies of at most `_SHORT_BODY` bytes of which the parsed form is kept, for each dialect."""


# -- answers -----------------------------------------------------------------------------------------------------------


class Answers(Endpoint):
    """`POST` of a question in one dialect."""

    def __init__(self, api: Api, dialect: Dialect) -> None:
        super().__init__(api)
        self._dialect = dialect

        # The same bytes of the same tenant mean the same, and what they mean is never changed: parsing is pure, its result
        # frozen. Found by comparing the bytes themselves, not a digest of them.
        self._parse_again = lru_cache(maxsize=_NUM_PARSED)(self._parse)
        api.gateway.on_forget(lambda _: self._parse_again.cache_clear())  # whose is whose is not known

    def dialect(self, path: str, head: Mapping[bytes, bytes]) -> Dialect:
        return self._dialect

    def _parse(self, body: bytes, tenant: Tenant, version: str | None) -> Parsed:
        return self._dialect.parse(body, tenant=tenant, version=version)

    async def answer(self, call: Call) -> None:
        body = await call.body()
        answer_id = self._dialect.answer_id(call.ids)
        trail = self.api.explanations.open(call.tenant, f"req_{call.ids.id}", answer_id, self._dialect.name)
        try:
            await self._answer(call, body, answer_id, trail)
        except ServiceError as error:
            trail.failed(error.message)
            raise
        except Exception:  # of any kind, and it goes on its way
            trail.failed(_BUG)
            raise
        finally:
            trail.over("left")

    async def _answer(self, call: Call, body: bytes, answer_id: str, trail: Trail) -> None:
        parsed, request = self._read(call, body)
        request = headers.with_wishes(request, call.head.get(b"x-anaphora-kv"), call.head.get(b"x-anaphora-kv-keep"))
        trail.model = request.model
        control = headers.cache_control(call.head.get(b"cache-control"))
        risk = headers.semantic_risk(call.head.get(b"x-anaphora-semantic"))
        if risk is not None:
            control = msgspec.structs.replace(control, semantic_risk=risk)
        name = self._dialect.name
        # A translated question leaves nothing with the provider.
        stored = request.native is not None and passing.is_stored(name, body)
        if stored and self.api.gateway.passes_on(request.model, name):
            control = msgspec.structs.replace(control, no_cache=True, no_store=True)
        tag = headers.tag(call.head.get(b"x-anaphora-tag"))
        asked = Asked(lambda: parsed.prompt, answer_id, call.workspace, request.model, f"req_{call.ids.id}", tag)
        answer = await self.api.gateway.complete(request, control, asked)
        if isinstance(answer, Recalled):
            trail.recalled(answer)
            await self._recalled(call, parsed, answer)
        else:
            self.api.explanations.note(call.tenant, trail, answer, asked)
            rendering = parsed.rendering if answer.bill is None else _billed(parsed.rendering, answer.bill)
            await self._live(call, rendering, answer, trail)

    def _read(self, call: Call, body: bytes) -> tuple[Parsed, Request]:
        parse = self._parse_again if len(body) <= _SHORT_BODY else self._parse
        return _read(self.api, self._dialect, call, body, lambda: parse(body, call.tenant, call.version))

    async def _recalled(self, call: Call, parsed: Parsed, answer: Recalled) -> None:
        raw = [id_header(self._dialect, call.ids), *headers.of_answer(answer, 0), *self._limits(call)]
        if parsed.rendering.stream:
            writer = self._dialect.writer(parsed.rendering, call.ids)
            await call.sender.start(200, _EVENTS + raw)
            await call.sender.last(b"".join(map(writer.feed, answer.deltas())))
            return
        raw.append(JSON)
        await call.sender.whole(200, raw, self._dialect.render(answer.completion, parsed.rendering, call.ids))

    async def _live(self, call: Call, rendering: Rendering, answer: Live, trail: Trail) -> None:
        await asyncio.sleep(0)  # what takes no waiting is done after this, and nobody needs to watch the client meanwhile
        gone: asyncio.Future[None] | None = None
        if not answer.over:
            gone = asyncio.create_task(call.gone(), name="anaphora-client-gone")
            gone.add_done_callback(lambda _: answer.leave())
        try:
            if rendering.stream:
                await self._stream(call, rendering, answer, trail)
            else:
                await self._whole(call, rendering, answer, trail)
        finally:
            if gone is not None:
                gone.cancel()
            answer.leave()

    async def _whole(self, call: Call, rendering: Rendering, answer: Live, trail: Trail) -> None:
        completion = await answer.whole()
        if completion is None:  # the client is gone: nobody to answer to
            return
        trail.reused(completion.usage.kv_reused_tokens)
        trail.over("finished")
        raw = self._headers(call, answer, completion.usage.kv_reused_tokens, answer.raw)
        raw.append(JSON)
        own = b"".join(part.data for part in answer.raw if part.dialect == self._dialect.name)
        await call.sender.whole(200, raw, own or self._dialect.render(completion, rendering, call.ids))

    async def _stream(self, call: Call, rendering: Rendering, answer: Live, trail: Trail) -> None:
        """The head waits for the first delta: so an error before it has a status of its own, and the reuse is known."""
        burst = await answer.burst()
        if not burst:
            return
        reused = next((delta.usage.kv_reused_tokens for delta in burst if isinstance(delta, Begin)), 0)
        trail.reused(reused)
        await call.sender.start(200, _EVENTS + self._headers(call, answer, reused, burst))
        writer = self._dialect.writer(rendering, call.ids)
        events = _Events(self._dialect.name, writer)
        try:
            while burst and not isinstance(burst[-1], End):
                if written := events.of(burst):
                    await call.sender.more(written)
                burst = await answer.burst()
        except ServiceError as error:
            trail.failed(error.message)
            await call.sender.last(events.fail(error))
            return
        except Exception:  # the status is out; the stream can still say that it failed
            log.exception("a stream failed unexpectedly (req_%s)", call.ids.id)
            trail.failed(_BUG)
            await call.sender.last(events.fail(BackendFailed(_BUG)))
            return
        if burst:  # else the client is gone
            trail.over("finished")
        await call.sender.last(events.of(burst))

    def _headers(self, call: Call, answer: Live, kv_reused_tokens: int, said: Iterable[Delta]) -> RawHeaders:
        own = [id_header(self._dialect, call.ids), *headers.of_answer(answer, kv_reused_tokens), *self._limits(call)]
        names = {name for name, _ in own}
        return [header for header in _passed_on(said) if header[0] not in names] + own

    def _limits(self, call: Call) -> RawHeaders:
        books = self.api.books
        if books is None or books.allowance is None:
            return []
        standings = books.allowance.standings(call.tenant)
        return headers.of_limits(standings, self._dialect.name, self.api.clock.now_s())


def _billed(rendering: Rendering, bill: Bill) -> Rendering:
    """With what the profile makes of caching: which counters there are, and the comparison that was asked for."""
    charge = bill.charge
    return msgspec.structs.replace(
        rendering,
        writes_billed=charge.profile.accounting == "openai-breakpoints",
        diagnosed=charge.diagnoses,
        diagnosis=charge.diagnosis,
    )


class _Events:
    """Deltas as one client's stream: an upstream's own events where they are of the client's dialect, or else `writer`'s."""

    def __init__(self, dialect: str, writer: StreamWriter) -> None:
        self._dialect = dialect
        self._writer = writer
        self._passes_on = False
        self._passed: list[bytes] = []
        """The latest events that were passed on; whatever comments came since as well."""

    def of(self, burst: list[Delta]) -> bytes:
        own = [delta.data for delta in burst if isinstance(delta, Raw) and delta.dialect == self._dialect]
        self._passes_on = self._passes_on or bool(own)  # what a `Raw` means may come in a later burst than itself
        if self._passes_on:
            if own:
                self._passed = self._passed + own if own[0][:1] == b":" else own
            return b"".join(own)
        return b"".join(self._writer.feed(delta) for delta in burst if not isinstance(delta, Raw))

    def fail(self, error: ServiceError) -> bytes:
        return self._writer.fail(error, b"".join(self._passed))


def _passed_on(deltas: Iterable[Delta]) -> RawHeaders:
    """The headers of an upstream's answer that are the client's business."""
    passed = [header for delta in deltas if isinstance(delta, Raw) for header in delta.headers]
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in passed]


def _read(api: Api, dialect: Dialect, call: Call, body: bytes, parse: Callable[[], Parsed]) -> tuple[Parsed, Request]:
    """The body, and the question that it is; for one that an upstream may answer, with the body itself."""
    gateway = api.gateway
    unread = ""
    try:
        parsed = parse()
    except InvalidRequest as error:
        found = _unread(api, dialect, call, body)
        if found is None:
            raise
        parsed, unread = found, error.message
    request = parsed.request
    if gateway.hosts(request.model):
        own_keys, request_id = bool(api.keyring), f"req_{call.ids.id}"
        request = passing.with_native(
            request, dialect.name, body, call.head, own_keys=own_keys, unread=unread, request_id=request_id
        )
    return parsed, request


def _unread(api: Api, dialect: Dialect, call: Call, body: bytes) -> Parsed | None:
    """A body that was refused, where an upstream may know better; None: nobody does, or nobody can be found by it."""
    if not api.gateway.hosting:
        return None
    try:
        parsed = dialect.unread(body, tenant=call.tenant)
    except InvalidRequest:
        return None
    return parsed if api.gateway.passes_on(parsed.request.model, dialect.name) else None


class CountTokens(Endpoint):
    """`POST /v1/messages/count_tokens`."""

    def __init__(self, api: Api, dialect: Anthropic) -> None:
        super().__init__(api)
        self._dialect = dialect

    async def answer(self, call: Call) -> None:
        body = await call.body()
        dialect, version = self._dialect, call.version
        parse = partial(dialect.parse_count, body, tenant=call.tenant, version=version)
        parsed, request = _read(self.api, dialect, call, body, parse)
        num_tokens = await self.api.gateway.count_tokens(request, parsed.prompt)
        await call.json(self._dialect.render_count(num_tokens), self._dialect)


class Models(Endpoint):
    """`GET /v1/models` and `GET /v1/models/{id}`, in the dialect that the headers ask for."""

    async def answer(self, call: Call) -> None:
        anthropic = b"anthropic-version" in call.head
        name = call.connection["path_params"].get("id")
        if name is not None:
            model = await self.api.gateway.model(name)
            body = ANTHROPIC.render_model(model) if anthropic else render_model(model)
        else:
            models = await self.api.gateway.models()
            if not models and self.api.gateway.hosting:  # patterns name none: the upstream itself knows which it has
                await Elsewhere(self.api).answer(call)
                return
            page = read_query(call, _Page)
            body = (
                ANTHROPIC.render_models(models, limit=page.limit, after_id=page.after_id, before_id=page.before_id)
                if anthropic
                else render_models(models)
            )
        await call.json(body, ANTHROPIC if anthropic else OPENAI)


class _Page(msgspec.Struct, frozen=True):
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 20
    after_id: str | None = None
    before_id: str | None = None


def read_query(call: Call, shape: type[Shape]) -> Shape:
    """The query of the URL. Raises InvalidRequest."""
    query = dict(parse_qsl(call.connection["query_string"].decode("latin-1")))
    try:
        return msgspec.convert(query, shape, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The query is wrong: {error}.") from error


class NoSuchPath(Endpoint):
    """Whatever is not served. Open: whether a path exists is no secret."""

    open = True

    async def answer(self, call: Call) -> None:
        raise NotFound(f"There is nothing at {call.connection['method']} {call.connection['path']}.", code="unknown_url")


# -- for operators -------------------------------------------------------------------------------------------------------


class Health(Endpoint):
    """`GET /health`: the process is up."""

    open = True

    async def answer(self, call: Call) -> None:
        await call.json(b'{"status":"ok"}')


class Ready(Endpoint):
    """`GET /ready`: 200 when a question would be answered now, else 503 and what is being waited for."""

    open = True

    async def answer(self, call: Call) -> None:
        if self.api.gateway.ready():
            await call.json(b'{"ready":true}')
            return
        stats = await self.api.gateway.stats()
        waiting_for = str(stats.get("stage", "the backend"))
        body = msgspec.json.encode({"ready": False, "waiting_for": waiting_for})
        await call.sender.whole(503, [JSON, (b"retry-after", b"1")], body)


class MetricsPage(Endpoint):
    """`GET /metrics`, for Prometheus."""

    open = True

    async def answer(self, call: Call) -> None:
        gateway = self.api.gateway
        models = await gateway.models() if gateway.ready() else ()
        body = self.api.metrics.render(await gateway.stats(), models[0].id if models else "", gateway.promises())
        await call.sender.whole(200, [(b"content-type", CONTENT_TYPE.encode())], body)


class Stats(Endpoint):
    """`GET /anaphora/stats`: the caller's own account, and the figures of the answer cache and the backend."""

    async def answer(self, call: Call) -> None:
        gateway = self.api.gateway
        figures: dict[str, Any] = {
            "tenant": call.tenant,
            "ready": gateway.ready(),
            "answers": self.api.ledger.account(call.tenant),
            "prompt_cache": self.api.ledger.prompt_caching(call.tenant),
            "promises": gateway.promises(),
            "cache": await gateway.memory_stats(),
            "backend": await gateway.stats(),
        }
        await call.json(msgspec.json.encode(figures))


class Explain(Endpoint):
    """`GET /anaphora/explain/{id}`: why that request of the caller's tenant was answered as it was; the id is the request's or
    its answer's. `GET /anaphora/explain?limit=`: the latest ones."""

    async def answer(self, call: Call) -> None:
        explanations = self.api.explanations
        self.api.gateway.heed()
        name = call.connection["path_params"].get("id")
        if name is None:
            limit = read_query(call, _Latest).limit
            await call.json(msgspec.json.encode({"requests": explanations.latest(call.tenant, limit)}))
            return
        found = explanations.find(call.tenant, name)
        if found is None:
            kept = f"the latest {explanations.size} requests of this tenant that this process answered"
            raise NotFound(f"'{name}' is not among {kept}.", code="not_explained")
        await call.json(msgspec.json.encode(found))


class _Latest(msgspec.Struct, frozen=True):
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 20


class _Move(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    advance_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class MoveClock(Endpoint):
    """`POST /anaphora/clock` with `{"advance_s"}`: moves the virtual clock, for everybody. It never goes back."""

    async def answer(self, call: Call) -> None:
        clock = self.api.clock
        if not isinstance(clock, ManualClock):
            raise PermissionDenied("This server follows the real clock; start it with --virtual-clock to move it.")
        try:
            move = msgspec.json.decode(await call.body(), type=_Move)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"The body is wrong: {error}.") from error
        clock.advance(move.advance_s)
        await call.json(msgspec.json.encode({"now_s": clock.now_s()}))


class _WhatToForget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tag: str | None = None
    model: str | None = None


class Forget(Endpoint):
    """`POST /anaphora/forget` with `{"model"?, "tag"?}`: forgets what the caller's tenant has, in every level and tier."""

    async def answer(self, call: Call) -> None:
        body = await call.body()
        try:
            what = msgspec.json.decode(body or b"{}", type=_WhatToForget)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"The body is wrong: {error}.") from error
        receipt = await self.api.gateway.forget(Scope(tenant=call.tenant, tag=what.tag, model=what.model))
        await call.json(msgspec.json.encode(receipt))
