"""THE path of a request: recall, or compute once and learn. Read `Gateway.complete` from top to bottom."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, cast

import msgspec

from anaphora.accounting import NOBODY, Accounting, Asked
from anaphora.answer import Answer, Live, Meter, Recalled, Source
from anaphora.backends.base import Backend, Bursting, Foreign, Forwarded, Hosting, StandsIn
from anaphora.catalogue import Catalogue
from anaphora.clock import Clock, SystemClock
from anaphora.errors import LimitReached, NotCached, NotFound, ServiceError
from anaphora.events import Computed, Emit, Failed, Forgotten, Hit, MissReason, ignore
from anaphora.flight import Flights
from anaphora.forgets import Forgets
from anaphora.memory import Memory, Recall
from anaphora.promises import Stats as PromiseStats
from anaphora.prompt import Prompt
from anaphora.types import CacheControl, Completion, Delta, Key, ModelInfo, Request, Scope

if TYPE_CHECKING:
    from anaphora.embeddings import EmbeddingAnswer, EmbeddingRequest, Embeddings  # as is NumPy
    from anaphora.fleet import Fleet  # its HTTP client is of no use to who only computes here
    from anaphora.ledger.allowance import Allowance
    from anaphora.levels.semantic.level import SemanticLevel

log = logging.getLogger(__name__)

NO_DIRECTIVES = CacheControl()

Compute = Callable[[Request], AsyncIterator[Delta] | AsyncIterator[list[Delta]]]

_ALONE = frozenset({MissReason.NO_CACHE, MissReason.SAMPLED, MissReason.EMPTY_BUCKET})
"""Misses of requests that want a computation of their own: they join nobody, and nobody joins them."""
_REFRESH = ".refresh"
"""Behind the id of a request: the computation that nobody waits for."""
_BYPASS = frozenset({MissReason.SAMPLED, MissReason.PREWARM, MissReason.UNKNOWN_MODEL})
"""Misses of requests that the answer cache does not serve at all."""


_MAX_LATEST = 1024


class Receipt(msgspec.Struct, frozen=True):
    """What a forget did: in each level of answers, how many blocks or entries went in the backend, how many promises."""

    answers: tuple[Forgotten, ...]
    backend: int
    promises: int = 0
    embeddings: Forgotten | None = None
    """In the cache of vectors of texts. None: there is none."""


class Stale(msgspec.Struct, frozen=True):
    """How long past its lifetime an answer may be given, where the request does not say: seconds."""

    if_error_s: float = 0.0
    """Where no new one can be computed."""
    while_revalidate_s: float = 0.0
    """While a new one is computed for those who come later."""


class Gateway:
    """Answers requests from `memory`, or from `backend`, whose models `catalogue` knows. Owns all three.

    With `accounting`, usage of what is computed follows the rules of prompt caching; with `allowance`, tenants are held to
    limits. `forgets` is what tells several gateway processes of one server what one of them was asked to forget."""

    def __init__(
        self,
        backend: Backend,
        memory: Memory,
        catalogue: Catalogue,
        *,
        accounting: Accounting | None = None,
        allowance: Allowance | None = None,
        embeddings: Embeddings | None = None,
        semantic: SemanticLevel | None = None,
        stale: Stale = Stale(),  # noqa: B008 (frozen)
        forgets: Forgets | None = None,
        clock: Clock | None = None,
        emit: Emit = ignore,
    ) -> None:
        self._backend = backend
        self._memory = memory
        self._catalogue = catalogue
        self._accounting = accounting
        self._allowance = allowance
        self._embeddings = embeddings
        self._semantic = semantic
        self._stale = stale
        self._num_landed = 0
        self._latest: OrderedDict[Key, int] = OrderedDict()
        """Questions whose answers were learned, and when, in order."""
        self._refreshing: set[asyncio.Task[None]] = set()
        self._hosting = backend if isinstance(backend, Hosting) else None
        self._compute: Compute = backend.bursts if isinstance(backend, Bursting) else backend.run
        self._clock = clock or SystemClock()
        self._emit = emit
        self._flights = Flights()
        self._forgets = forgets
        self._on_forget: list[Callable[[Scope], object]] = []

    async def start(self) -> None:
        if self._embeddings is not None:
            self._embeddings.start()
        if self._semantic is not None:
            self._semantic.start()
        await self._backend.start()

    async def aclose(self) -> None:
        """Cut what is being computed, let what is finished be learned, and close the backend and the memory."""
        await self._flights.aclose()
        if self._refreshing:
            await asyncio.wait(self._refreshing)
        await self._memory.aclose()  # before what it asks
        if self._embeddings is not None:
            await self._embeddings.aclose()
        await self._backend.aclose()

    def ready(self) -> bool:
        return self._backend.ready()

    @property
    def takes_provider_blocks(self) -> bool:
        """Whether requests may have what only a provider's own models can take."""
        return isinstance(self._backend, StandsIn) and self._backend.takes_provider_blocks

    @property
    def shared(self) -> bool:
        """Whether this is one of several gateway processes of one server."""
        return self._forgets is not None

    def fleet(self) -> Fleet:
        """The upstreams. Raises NotFound where there are none."""
        if self._hosting is None:
            raise NotFound("This server has no upstreams.", code="no_upstreams")
        return cast("Fleet", self._hosting)

    @property
    def hosting(self) -> bool:
        """Whether there are upstreams at all."""
        return self._hosting is not None

    def hosts(self, model: str) -> bool:
        """Whether others than an engine of this server answer for `model`."""
        return self._hosting is not None and self._hosting.hosts(model)

    def passes_on(self, model: str, dialect: str) -> bool:
        """Whether a body of `dialect` that asks for `model` may go to whoever answers for it as it came in."""
        return self._hosting is not None and self._hosting.passes_on(model, dialect)

    async def forward(self, asked: Foreign) -> Forwarded:
        """What only an upstream can answer. Nothing of it is remembered. Raises NotFound where nobody may be asked."""
        if self._hosting is None:
            raise NotFound(f"There is nothing at {asked.method} {asked.path}.", code="unknown_url")
        return await self._hosting.forward(asked)

    async def complete(self, request: Request, control: CacheControl = NO_DIRECTIVES, asked: Asked | None = None) -> Answer:
        """Answer one request. Raises ModelNotFound, LimitReached, NotCached where `only_if_cached` finds nothing, and
        InvalidRequest for a caching field that the model does not have. `asked` None: the backend's own usage is the answer's.

        Whatever else goes wrong is raised by the answer, before or between its deltas. Who gets a `Live` answer must
        `leave` it in the end. On a hit in memory this does not suspend, unless the tenant's limits hold for several servers.
        """
        started_s, arrived_s = self._clock.monotonic_s(), self._clock.now_s()
        self.heed()
        model = await self._catalogue.get(request.model)
        if model.id != request.model:
            request = msgspec.structs.replace(request, model=model.id)
        if self._allowance is not None:
            await self._allowance.admit(request.tenant)

        request_id = "" if asked is None else asked.request_id
        num_landed = self._num_landed
        recalled = await self._recall(request, control, request_id)
        if recalled.hit is None and self._has_landed(recalled.key, num_landed):
            # The same question was answered, and its flight is over, while a slower tier was being asked: look again.
            recalled = await self._recall(request, control, request_id)
        if recalled.hit is not None:
            answer = Recalled(recalled.hit, recalled.key or recalled.hit.key, recalled.misses)
            self._emit(answer.answered(request, self._clock.monotonic_s() - started_s, asked or NOBODY))
            return answer
        older = await self._older(request, control, recalled, _while_revalidate(control, self._stale))
        if control.only_if_cached and older is None:
            raise NotCached("Nothing that this request accepts is cached, and it asks for cached answers only.")

        bill = None
        if self._accounting is not None and asked is not None and not self.hosts(request.model):
            bill = await self._accounting.open(request, asked, arrived_s)

        teller = asked or NOBODY

        async def landed(completion: Completion) -> None:
            self._emit(Computed(request.tenant, request.model, completion.usage, completion.compute_s, teller.request_id))
            await self._learn(request, model, control, completion, recalled, request_id)
            self._landed(recalled.key)

        # With the mark: who asks after a forget does not get an answer from before it. With what is to be kept: or it is not.
        # Of an upstream's own bytes there is one form only: streamed or whole, in its dialect.
        native = request.native
        form = None if native is None else (native.dialect, native.credential, native.names_usage, request.stream)
        key = None if _alone(recalled, control) else (recalled.key, request.max_tokens, request.keep, recalled.mark, form)
        asking = request if bill is None else bill.keeping(request)
        if older is not None:
            answer = Recalled(older, recalled.key or older.key, recalled.misses)
            self._emit(answer.answered(request, self._clock.monotonic_s() - started_s, teller))
            teller = msgspec.structs.replace(teller, request_id=f"{teller.request_id}{_REFRESH}" if teller.request_id else "")
        if self._allowance is not None:
            try:
                await self._allowance.reserve(request, teller.request_id)
            except LimitReached:
                if older is None:
                    raise
                return answer  # and it stays as old as it is
        subscription = self._flights.join(key, lambda: self._compute(asking), landed)
        if self._allowance is not None and subscription.collapsed:
            self._allowance.settle(teller.request_id, 0, 0)
        source: Source = "collapsed" if subscription.collapsed else "bypass" if _bypass(recalled, control) else "miss"
        meter = Meter(
            request,
            source,
            started_s,
            self._clock,
            self._emit,
            asked=teller,
            bill=bill,
            refresh=older is not None,
            audit=_audit(recalled),
        )
        if older is not None:
            self._refresh(Live(subscription, source, recalled, meter, bill))
            return answer
        if_error_s = self._stale.if_error_s if control.stale_if_error_s is None else control.stale_if_error_s
        return Live(subscription, source, recalled, meter, bill, lambda: self._older(request, control, recalled, if_error_s))

    def semantic(self) -> SemanticLevel:
        """The level of answers in other words, which is one of memory's. Raises NotFound where there is none."""
        if self._semantic is None:
            raise NotFound("This server gives no answers in other words (semantic.mode).", code="no_semantic")
        return self._semantic

    @property
    def embeddings(self) -> Embeddings | None:
        """What turns texts into vectors. None: nothing here does."""
        return self._embeddings

    async def embed(self, request: EmbeddingRequest, control: CacheControl = NO_DIRECTIVES) -> EmbeddingAnswer:
        """Vectors of texts. Raises LimitReached, and what `Embeddings.embed` raises; there must be `embeddings`."""
        assert self._embeddings is not None
        self.heed()
        if self._allowance is not None:
            await self._allowance.admit(request.tenant)
        return await self._embeddings.embed(request, control)

    async def models(self) -> tuple[ModelInfo, ...]:
        """None where there are only upstreams that name none: they know better."""
        models = await self._catalogue.all()
        return models if self._embeddings is None or not models else (*models, *self._embeddings.models())

    async def model(self, name: str) -> ModelInfo:
        """Raises ModelNotFound."""
        own = None if self._embeddings is None else self._embeddings.model(name)
        return await self._catalogue.get(name) if own is None else own

    async def count_tokens(self, request: Request, prompt: Prompt | None = None) -> int:
        """Prompt tokens of `request`, whatever is cached; with `prompt`, as they are accounted for."""
        model = await self._catalogue.get(request.model)
        request = msgspec.structs.replace(request, model=model.id)
        if self._accounting is not None and prompt is not None and not self.hosts(request.model):
            counted = await self._accounting.count(request, prompt)
            if counted is not None:
                return counted
        return await self._backend.count_tokens(request)

    async def forget(self, scope: Scope) -> Receipt:
        """Forget everything of `scope`. What is being computed now still reaches its clients, and is not learned.

        The server's other gateway processes heed it before they answer anything more.
        """
        if self._forgets is not None:
            self._forgets.tell(scope)  # first: nothing that another one looks up or learns from here on is of before
        promises = self._drop(scope)
        answers = await self._memory.forget(scope)
        embeddings = None if self._embeddings is None else await self._embeddings.forget(scope)
        return Receipt(answers, await self._backend.forget(scope), promises, embeddings)

    def heed(self) -> None:
        """Forget here what any gateway process of this server was asked to forget since the last call. Immediate."""
        if self._forgets is None:
            return
        for scope in self._forgets.news():
            self._drop(scope)
            try:
                if self._embeddings is not None:
                    self._embeddings.drop(scope)
                self._memory.drop(scope)
            except Exception as error:  # as in `_recall`
                self._cache_failed("drop", error)

    def on_forget(self, forget: Callable[[Scope], object]) -> None:
        """Have `forget` called with every scope: for those who remember something of requests beside memory."""
        self._on_forget.append(forget)

    def _drop(self, scope: Scope) -> int:
        """Drop what this process has beside memory; how many promises went."""
        for forget in self._on_forget:
            forget(scope)
        return 0 if self._accounting is None else self._accounting.forget(scope)

    async def stats(self) -> dict[str, Any]:
        """The backend's own counters and gauges by name, as `Backend.stats` gives them."""
        return await self._backend.stats()

    def promises(self) -> PromiseStats:
        """Figures of this process's books of prompt caching."""
        return PromiseStats() if self._accounting is None else self._accounting.stats

    async def memory_stats(self) -> dict[str, dict[str, Any]]:
        """Level name → tier name → figures of the answer cache, and of that of embeddings, and what `encoders` take."""
        stats: dict[str, dict[str, Any]] = {**await self._memory.stats()}
        if self._embeddings is not None:
            stats["embedding"] = {**await self._embeddings.stats(), "encoders": self._embeddings.encoders()}
        return stats

    # -- what landed ---------------------------------------------------------------------------------------------------

    def _landed(self, key: Key | None) -> None:
        if key is None:
            return
        self._num_landed += 1
        self._latest[key] = self._num_landed
        self._latest.move_to_end(key)
        if len(self._latest) > _MAX_LATEST:
            self._latest.popitem(last=False)

    def _has_landed(self, key: Key | None, since: int) -> bool:
        """Whether an answer to the question `key` was, or may have been, learned after the `since`-th one."""
        if key is None or self._num_landed == since:
            return False
        return self._num_landed - since >= _MAX_LATEST or self._latest.get(key, 0) > since

    # -- answers past their lifetime -----------------------------------------------------------------------------------

    async def _older(self, request: Request, control: CacheControl, recalled: Recall, stale_s: float) -> Hit[Completion] | None:
        """The answer that is past its lifetime, if that is why there was none, and if it is so for no more than `stale_s`."""
        if stale_s <= control.stale_s or all(miss.reason is not MissReason.EXPIRED for miss in recalled.misses):
            return None
        return (await self._recall(request, msgspec.structs.replace(control, stale_s=stale_s))).hit

    def _refresh(self, live: Live) -> None:
        """Have `live` computed and learned though nobody waits for it."""

        async def refresh() -> None:
            try:
                await live.whole()
            except ServiceError as error:
                log.info("an answer past its lifetime could not be computed anew: %s", error.message)
            finally:
                live.leave()

        task = asyncio.create_task(refresh(), name="anaphora-refresh")
        self._refreshing.add(task)
        task.add_done_callback(self._refreshing.discard)

    # -- the cache, which may fail without harm (invariant 8) ----------------------------------------------------------

    async def _recall(self, request: Request, control: CacheControl, request_id: str = "") -> Recall:
        try:
            return await self._memory.recall(request, control, request_id)
        except Exception as error:  # whatever breaks in a level, the request goes on
            self._cache_failed("recall", error)
            return Recall(None, None)

    async def _learn(
        self,
        request: Request,
        model: ModelInfo,
        control: CacheControl,
        completion: Completion,
        recalled: Recall,
        request_id: str,
    ) -> None:
        try:
            if recalled.mark is None or await self._catalogue.get(model.id) != model:
                return  # what was forgotten meanwhile is not known; or another model answered than the key says
            self.heed()
            await self._memory.learn(
                request, control, completion, clean=True, key=recalled.key, since=recalled.mark, request_id=request_id
            )
        except Exception as error:  # likewise: the clients have their answer already
            self._cache_failed("learn", error)

    def _cache_failed(self, operation: str, error: Exception) -> None:
        log.warning("the answer cache failed to %s; the request goes on without it", operation, exc_info=error)
        self._emit(Failed("memory", operation, repr(error)))


def _while_revalidate(control: CacheControl, stale: Stale) -> float:
    wish = control.stale_while_revalidate_s
    return stale.while_revalidate_s if wish is None else wish


def _alone(recalled: Recall, control: CacheControl) -> bool:
    """Whether the request must not share a computation: it wants a fresh or a private one, or nothing is ever shared."""
    return (
        recalled.key is None
        or not recalled.misses
        or control.no_store
        or any(miss.reason in _ALONE for miss in recalled.misses)
    )


def _audit(recalled: Recall) -> bool:
    return any(miss.reason is MissReason.AUDITED for miss in recalled.misses)


def _bypass(recalled: Recall, control: CacheControl) -> bool:
    """Whether the answer cache has no part in this request. Without a level to ask it never has."""
    return control.no_store or all(miss.reason in _BYPASS for miss in recalled.misses)
