"""Several upstreams, and perhaps an engine of one's own, as one backend: who answers which model, and who else if that fails.

A model that the engine has is its own. Any other is answered by the upstreams of the route that names it, or else by those
whose patterns name it most exactly. One of them is chosen; where it cannot answer, the others are asked, then the fallbacks,
then (after the pause that was asked for) all of them again. Once a client was given anything of an answer, nobody else
continues it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from fnmatch import fnmatchcase
from typing import Any, TypedDict

import msgspec

from anaphora.backends.base import Backend, Foreign, Forwarded
from anaphora.backends.breaker import Breaker
from anaphora.backends.optimising import OptimiserOptions
from anaphora.backends.pinging import Pinging
from anaphora.backends.upstream import Upstream
from anaphora.clock import Clock, SystemClock
from anaphora.config import GatewayConfig, OptimiserConfig, RouteConfig, UpstreamConfig
from anaphora.errors import BackendFailed, InvalidRequest, ModelNotFound, NotFound, ServiceError, UpstreamFailed
from anaphora.events import Emit, UpstreamAsked, ignore
from anaphora.fleet.listening import Listening
from anaphora.fleet.replicas import Replica, ReplicaState, Target
from anaphora.fleet.turns import NoChoice, Turns
from anaphora.routing import reports
from anaphora.routing.base import CacheEvent, Question, Strategy
from anaphora.routing.questions import of_request
from anaphora.routing.router import Route, Router
from anaphora.types import Begin, Delta, End, ModelInfo, Raw, Request, Scope, Usage
from anaphora.wire.fields import Json

log = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""The longest pause before everybody is asked again; a client that is told to come back later than that is told so."""
_FIRST_PAUSE_S = 0.5
_WATCH_EVERY_S = 1.0
_PING_EVERY_S = 1.0
_MAX_POOLS = 1024
SHORT_TOKENS = 1024
"""What providers call a prompt that is too short for their cache."""

Sleep = Callable[[float], Awaitable[object]]


class Fleet:
    """A `Backend` over the upstreams that `make` makes of their configurations, and `local`. Owns them all."""

    def __init__(
        self,
        config: GatewayConfig,
        make: Callable[[UpstreamConfig], Upstream],
        strategy: Strategy,
        *,
        local: Backend | None = None,
        pinging: Pinging | None = None,
        clock: Clock | None = None,
        sleep: Sleep = asyncio.sleep,
        rng: random.Random | None = None,
        emit: Emit = ignore,
    ) -> None:
        self._config = config
        self._make = make
        self._pinging = pinging
        self._local = local
        self._clock = clock or SystemClock()
        self._sleep = sleep
        self._rng = rng or random.Random()
        self._router = Router(strategy)
        self._emit = emit
        self._replicas = {one.name: self._joined(one) for one in config.upstreams}
        for replica in self._replicas.values():
            self._router.add(replica.routed())
        self._pools: dict[str, tuple[Target, ...]] = {}
        """By model, until a replica joins or leaves. So the two below."""
        self._infos: dict[str, ModelInfo] = {}
        self._models: tuple[ModelInfo, ...] | None = None
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._pings: asyncio.Task[None] | None = None
        self._local_models: tuple[ModelInfo, ...] = ()
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self.takes_provider_blocks = True

    def _joined(self, one: UpstreamConfig) -> Replica:
        breaker = Breaker(self._config.breaker_failures, self._config.breaker_rest_s)
        replica = Replica(self._make(one), one, breaker, self._clock.monotonic_s())
        if one.kv_events:

            def tell(events: Sequence[CacheEvent]) -> None:
                self._router.events(one.name, events, self._clock.monotonic_s())

            replica.listening = Listening(replica.upstream, one.kv_events, one.kv_events_replay, tell)
        return replica

    # -- who belongs to it -----------------------------------------------------------------------------------------------

    async def add(self, one: UpstreamConfig) -> None:
        """Let a further upstream answer, from now on. Raises InvalidRequest for a name that is taken, ConfigError for what
        cannot be used."""
        if one.name in self._replicas:
            raise InvalidRequest(f"There is a replica {one.name} already.", param="name")
        replica = self._joined(one)
        await replica.upstream.start()
        if self._replicas.setdefault(one.name, replica) is not replica:
            await replica.upstream.aclose()
            raise InvalidRequest(f"There is a replica {one.name} already.", param="name")
        self._changed()
        self._router.add(replica.routed())
        self._watch(replica)

    def drain(self, name: str, *, draining: bool = True) -> None:
        """Have it finish what it has, and be asked nothing new. Raises NotFound."""
        self._replica(name).draining = draining
        self._router.change(name, draining=draining)

    async def remove(self, name: str) -> None:
        """Drain it, and let it go when it has answered what it was asked. Raises NotFound."""
        replica = self._replica(name)
        replica.draining = True
        del self._replicas[name]
        self._changed()
        self._router.remove(name)
        if (watching := self._watching.pop(name, None)) is not None:
            watching.cancel()
        self._leaving[name] = task = asyncio.create_task(replica.leave(), name="anaphora-leave")
        task.add_done_callback(lambda _: self._leaving.pop(name, None))

    def _changed(self) -> None:
        self._pools.clear()
        self._infos.clear()
        self._models = None

    def _watch(self, replica: Replica) -> None:
        """Listen to what its cache says of itself, and ask it for its figures again and again, where it has any: the router is
        told how long its queue is."""
        if replica.listening is not None:
            replica.listening.start()
        path = replica.config.metrics
        if not path:
            return

        async def watch() -> None:
            while True:
                try:
                    found = reports.load(await replica.upstream.text(path))
                except ServiceError as error:
                    log.debug("upstream %s does not say how it is doing: %s", replica.name, error.message)
                    found = None
                if found is not None:
                    self._router.load(replica.name, found, self._clock.monotonic_s())
                await asyncio.sleep(_WATCH_EVERY_S)

        self._watching[replica.name] = asyncio.create_task(watch(), name="anaphora-watch")

    async def _keep_alive(self, pinging: Pinging) -> None:
        async def send(name: str, request: Request, body: Json) -> Usage:
            return await self._replica(name).upstream.ping(request, body)

        while True:
            await asyncio.sleep(_PING_EVERY_S)
            await pinging.once(send)

    def replicas(self) -> tuple[ReplicaState, ...]:
        now_s = self._clock.monotonic_s()
        return tuple([replica.state(now_s) for replica in self._replicas.values()])

    def _replica(self, name: str) -> Replica:
        found = self._replicas.get(name)
        if found is None:
            raise NotFound(f"There is no replica {name}; there is: {', '.join(self._replicas)}.", code="unknown_replica")
        return found

    # -- which models there are ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        for replica in self._replicas.values():
            await replica.upstream.start()
            self._watch(replica)
        if self._pinging is not None:
            self._pings = asyncio.create_task(self._keep_alive(self._pinging), name="anaphora-keep-alive")
        if self._local is not None:
            await self._local.start()

    def ready(self) -> bool:
        return any(replica.upstream.ready() for replica in self._replicas.values())

    async def models(self) -> tuple[ModelInfo, ...]:
        """The engine's as far as they are known without waiting, and those that upstreams name one by one."""
        if self._local is not None and self._local.ready():
            local = await self._local.models()
            if local != self._local_models:
                self._local_models, self._models = local, None
        if self._models is None:
            named = [model.id for replica in self._replicas.values() for model in await replica.upstream.models()]
            own = {model.id for model in self._local_models}
            self._models = (*self._local_models, *(self._hosted(name) for name in dict.fromkeys(named) if name not in own))
        return self._models

    async def loaded(self) -> None:
        """Returns when the engine, if there is one, has said which models it has."""
        if self._local is not None:
            await self._local.models()

    def model(self, name: str) -> ModelInfo | None:
        """One that is not among `models`, but that some upstream is asked for all the same."""
        return self._hosted(name) if self._pool(name) else None

    def hosts(self, model: str) -> bool:
        """Whether upstreams answer for `model`."""
        return not self._is_local(model) and bool(self._pool(model))

    def passes_on(self, model: str, dialect: str) -> bool:
        """Whether a body of `dialect` may go out as it came in."""
        return self.hosts(model) and any(target.upstream.speaks(dialect) for target in self._pool(model))

    def _hosted(self, name: str) -> ModelInfo:
        """With a fingerprint that changes when somebody else answers for it, so that answers do not outlive that."""
        info = self._infos.get(name)
        if info is not None:
            return info
        digest = hashlib.sha256()
        for target in self._pool(name):
            options = target.upstream.options
            digest.update(f"{options.base_url}\0{options.rename.get(name, name)}\n".encode())
        info = self._infos[name] = ModelInfo(name, fingerprint=digest.hexdigest())
        return info

    def _is_local(self, model: str) -> bool:
        return any(model == own.id for own in self._local_models)

    def _pool(self, model: str) -> tuple[Target, ...]:
        """Those of whom one is chosen. Empty: nobody answers for `model`. Asked several times for each request."""
        pool = self._pools.get(model)
        if pool is None:
            if len(self._pools) >= _MAX_POOLS:  # clients choose the names
                self._changed()
            pool = self._pools[model] = self._find_pool(model)
        return pool

    def _find_pool(self, model: str) -> tuple[Target, ...]:
        route = self._route(model)
        if route is not None:
            named = (
                replica for replica in self._replicas.values() if any(fnmatchcase(replica.name, x) for x in route.upstreams)
            )
            return tuple([Target(replica, model) for replica in named])
        found = {replica: replica.upstream.serves(model) for replica in self._replicas.values()}
        best = max((exactness for exactness in found.values() if exactness is not None), default=None)
        return tuple([Target(replica, model) for replica, exactness in found.items() if exactness == best is not None])

    def _route(self, model: str) -> RouteConfig | None:
        matching = (route for route in self._config.routes if any(fnmatchcase(model, pattern) for pattern in route.models))
        return next(matching, None)

    def _fallbacks(self, model: str) -> Iterator[Target]:
        route = self._route(model)
        for fallback in () if route is None else route.fallbacks:
            name, _, other = fallback.partition(":")
            if name in self._replicas:
                yield Target(self._replicas[name], other or model)

    # -- answering -----------------------------------------------------------------------------------------------------

    async def run(self, request: Request) -> AsyncIterator[Delta]:
        async with aclosing(self.bursts(request)) as bursts:
            async for burst in bursts:
                for delta in burst:
                    yield delta

    def bursts(self, request: Request) -> AsyncGenerator[list[Delta], None]:
        """As `run`, whatever came at once as one."""
        if self._local is not None and not self.hosts(request.model):
            return _one_by_one(self._local.run(request))
        return self._from_upstreams(request)

    async def _from_upstreams(self, request: Request) -> AsyncGenerator[list[Delta], None]:
        pool = self._pool(request.model)
        if not pool:
            raise ModelNotFound(f"No upstream answers for the model '{request.model}'.", param="model")
        question = of_request(request) if len(pool) > 1 else None
        fallbacks = tuple(self._fallbacks(request.model))
        retries = max(target.replica.config.retries for target in pool)
        pause_s = _FIRST_PAUSE_S
        for attempt in range(retries + 1):
            failure: ServiceError | None = None
            turns = Turns(self._router, pool, fallbacks, question)
            while (turn := turns.next(self._clock.monotonic_s())) is not None:
                target, route, alone = turn
                try:
                    async with aclosing(self._attempt(target, route, request, question, alone=alone)) as bursts:
                        async for burst in bursts:
                            yield burst
                    return
                except _Nothing as nothing:
                    error = nothing.error
                    log.info("upstream %s did not answer: %s", target.replica.name, error.message)
                    if failure is None or not isinstance(error, InvalidRequest):
                        failure = error
                    if not _elsewhere(error):
                        break
            if failure is None:
                raise self._all_resting(pool, fallbacks)
            wait_s = max(pause_s * (0.5 + self._rng.random()), failure.retry_after_s or 0.0)
            if attempt == retries or not _again(failure) or wait_s > PATIENCE_S:
                raise failure
            await self._sleep(wait_s)
            pause_s *= 2

    async def _attempt(
        self, target: Target, route: Route | NoChoice, request: Request, question: Question | None, *, alone: bool
    ) -> AsyncGenerator[list[Delta], None]:
        """One upstream's answer. Raises _Nothing where somebody else may be asked instead: nothing was given out yet.

        Unless it is `alone`, the beginning of an answer is held back until it says something.
        """
        upstream, breaker = target.upstream, target.replica.breaker
        other = target.model != request.model
        asking = msgspec.structs.replace(request, model=target.model) if other else request
        trial = breaker.sent()
        self._tell(request, target, route)
        if question is not None and target.replica.listening is not None:
            target.replica.listening.sent(asking, question)
        held: list[Delta] = []
        given = spoken = False
        try:
            async with aclosing(upstream.bursts(asking, self._optimiser(target.replica, request.model))) as bursts:
                async for burst in bursts:
                    if spoken and not isinstance(burst[-1], End):  # nearly always
                        yield burst
                        continue
                    for place, delta in enumerate(burst):
                        if isinstance(delta, Raw):
                            continue
                        if isinstance(delta, Begin):
                            burst[place] = msgspec.structs.replace(delta, upstream=upstream.name)
                        elif isinstance(delta, End):
                            # Here, because whoever has the end of an answer reads no further.
                            breaker.succeeded()
                            route.ended(self._clock.monotonic_s(), **_counts(delta.usage, target.replica))
                            # What another model said is no answer to remember under the name of this one.
                            burst[place] = msgspec.structs.replace(delta, faithful=delta.faithful and not other)
                        elif not spoken:
                            spoken = True
                            route.first_token(self._clock.monotonic_s())
                    if not given and not alone and all(isinstance(delta, Raw | Begin) for delta in burst):
                        held += burst
                        continue
                    given = True
                    yield held + burst if held else burst
                    held = []
        except ServiceError as error:
            now_s = self._clock.monotonic_s()
            fault = _its_fault(error)
            if fault:
                breaker.failed(now_s, trial)
            elif isinstance(error, UpstreamFailed):
                breaker.succeeded()  # it answers; that it says no is another matter
            else:
                breaker.left(trial)
            route.failed(now_s, fault=fault or error.status == 429)
            self._tell(request, target, route, error.message)
            if given or not (_elsewhere(error) or _again(error)):
                raise
            raise _Nothing(error) from error
        except BaseException:
            breaker.left(trial)
            route.failed(self._clock.monotonic_s(), fault=False)
            raise

    def _tell(self, request: Request, target: Target, route: Route | NoChoice, error: str = "") -> None:
        choice = route.choice
        request_id = "" if request.native is None else request.native.request_id
        self._emit(
            UpstreamAsked(
                request.tenant,
                request_id,
                target.model,
                target.replica.name,
                choice.expected_s if len(choice.scores) > 1 else None,
                choice.cached_tokens,
                dict(choice.scores),
                error,
            )
        )

    def _optimiser(self, replica: Replica, model: str) -> OptimiserOptions | None:
        """What the route of `model` says of it. None: what holds everywhere."""
        route = self._route(model)
        if route is None or route.optimiser is None:
            return None
        return optimiser_options(route.optimiser, replica.config)

    def _all_resting(self, pool: Sequence[Target], fallbacks: Sequence[Target]) -> UpstreamFailed:
        now_s = self._clock.monotonic_s()
        asked = {target.replica: None for target in (*pool, *fallbacks)}
        waits_s = [replica.breaker.opens_in_s(now_s) for replica in asked if not replica.draining]
        if not waits_s:
            return UpstreamFailed("Everybody who answers for this model is being drained.", 503, code="upstream_draining")
        wait_s = min(waits_s)
        return UpstreamFailed(
            f"{' and '.join(replica.name for replica in asked)} failed too often just now and will be tried again soon.",
            503,
            code="upstream_resting",
            retry_after_s=max(1.0, wait_s),
        )

    # -- the rest of Backend ---------------------------------------------------------------------------------------------

    async def count_tokens(self, request: Request) -> int:
        if self._local is not None and not self.hosts(request.model):
            return await self._local.count_tokens(request)
        failure: ServiceError = NotFound("No upstream can count the tokens of this model.", code="no_token_count")
        for target in self._pool(request.model):
            try:
                return await target.upstream.count_tokens(request)
            except ServiceError as error:
                failure = error
        raise failure

    async def forward(self, asked: Foreign) -> Forwarded:
        """The upstreams of the model that is asked for, where one is, are the first to be thought of."""
        named = [target.upstream for target in self._pool(asked.model)] if asked.model else []
        all_of_them = (replica.upstream for replica in self._replicas.values() if not replica.draining)
        for upstream in dict.fromkeys((*named, *all_of_them)):
            if upstream.options.anthropic == asked.anthropic and upstream.has(asked.path):
                return await upstream.forward(asked)
        raise NotFound(f"There is nothing at {asked.method} {asked.path}.", code="unknown_url")

    async def forget(self, scope: Scope) -> int:
        return 0 if self._local is None else await self._local.forget(scope)

    async def stats(self) -> dict[str, Any]:
        found = {} if self._local is None else dict(await self._local.stats())
        for name, replica in self._replicas.items():
            found |= {f"upstream_{name}_{key}": value for key, value in (await replica.upstream.stats()).items()}
            found[f"upstream_{name}_resting"] = int(not replica.breaker.passes(self._clock.monotonic_s()))
            found[f"upstream_{name}_num_rests"] = replica.breaker.num_opened
            if replica.listening is not None:
                found |= {f"upstream_{name}_{key}": value for key, value in replica.listening.stats().items()}
        return found

    async def aclose(self) -> None:
        for task in (*self._leaving.values(), *self._watching.values(), self._pings):
            if task is not None:
                task.cancel()
        for replica in self._replicas.values():
            if replica.listening is not None:
                await replica.listening.aclose()
            await replica.upstream.aclose()
        if self._local is not None:
            await self._local.aclose()


def optimiser_options(config: OptimiserConfig, upstream: UpstreamConfig) -> OptimiserOptions:
    return OptimiserOptions(config.mode, config.rewrites, upstream.affinity, config.retain, upstream.profile)


class _Counted(TypedDict):
    output_tokens: int
    cached_tokens: int | None


def _counts(usage: Usage, replica: Replica) -> _Counted:
    """What an answer says of itself. Of short prompts most providers say nothing, whatever they have. Some servers never do
    (vLLM without `--enable-prompt-tokens-details`), others only where there is something to say."""
    replica.says_reads |= not usage.reads_unsaid
    cached: int | None = usage.kv_reused_tokens or usage.cache_read_input_tokens
    if not cached and (usage.prompt_tokens < SHORT_TOKENS or not replica.says_reads):
        cached = None
    return _Counted(output_tokens=usage.output_tokens, cached_tokens=cached)


class _Nothing(Exception):
    """An upstream did not answer, and nothing of an answer was given out: somebody else may be asked."""

    def __init__(self, error: ServiceError) -> None:
        super().__init__(error.message)
        self.error = error


def _elsewhere(error: ServiceError) -> bool:
    """Another upstream may well answer the same request: this one cut its answer off, or cannot be asked in its dialect."""
    return error.elsewhere if isinstance(error, UpstreamFailed) else isinstance(error, BackendFailed | InvalidRequest)


def _again(error: ServiceError) -> bool:
    return isinstance(error, UpstreamFailed) and error.again


def _its_fault(error: ServiceError) -> bool:
    """Whether `error` tells that the upstream is not well. That it limits its clients does not."""
    return error.status >= 500 and error.code != "upstream_auth"


async def _one_by_one(deltas: AsyncIterator[Delta]) -> AsyncGenerator[list[Delta], None]:
    """`deltas` as something that can be closed, whatever it is."""
    try:
        async for delta in deltas:
            yield [delta]
    finally:
        aclose = getattr(deltas, "aclose", None)
        if aclose is not None:
            await aclose()
