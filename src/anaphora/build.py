"""Config → Gateway: the only file that knows every registry."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import msgspec

from anaphora import __version__
from anaphora.accounting import NOBODY, Accounting
from anaphora.answer import Recalled
from anaphora.backends.base import Backend, Measuring
from anaphora.backends.echo import EchoBackend, Options
from anaphora.catalogue import Catalogue
from anaphora.clock import Clock, SystemClock
from anaphora.codecs.effects import check_default
from anaphora.config import Api, CacheConfig, Config, EngineConfig, UpstreamConfig, upstream_key
from anaphora.errors import ConfigError
from anaphora.events import Emit, ignore
from anaphora.forgets import Forgets
from anaphora.gateway import Gateway, Stale
from anaphora.memory import AnswerLevel, Memory
from anaphora.policies.base import Policy
from anaphora.profiles import named
from anaphora.promises import Books
from anaphora.registry import BACKENDS, ENCODERS, LEVELS, POLICIES, ROUTING, TIERS
from anaphora.store import Store, StoreOptions
from anaphora.tiers.base import Eviction, ImmediateTier, Tier, eviction
from anaphora.types import CacheControl, Completion, Key, Message, Request, Sampling, Tenant, TextPart

if TYPE_CHECKING:
    from anaphora.backends.engine import EngineOptions
    from anaphora.backends.engine_ipc import Status
    from anaphora.backends.optimising import Optimising
    from anaphora.embeddings import Embeddings
    from anaphora.fleet import Fleet
    from anaphora.ledger.allowance import Allowance
    from anaphora.levels.embedding import EmbeddingLevel, Vectors
    from anaphora.levels.semantic.level import SemanticLevel
    from anaphora.tiers.valkey import ValkeyTier
    from anaphora.wire.upstream import UpstreamDialect

Say = Callable[[str], None]
OnStatus: TypeAlias = "Callable[[Status], None]"


def build(
    config: Config,
    *,
    clock: Clock | None = None,
    emit: Emit = ignore,
    say: Say | None = None,
    on_status: OnStatus | None = None,
    engine: str | None = None,
    forgets: Forgets | None = None,
    allowance: Allowance | None = None,
) -> Gateway:
    """A gateway that is not started yet. Raises ConfigError.

    `on_status` is told what a loading engine is at, `say` what became of its process. `engine` is the address of an engine
    process that already runs (one serves all gateway workers of a machine); without it the gateway starts its own. `forgets`
    is what those workers tell each other, `allowance` what they hold tenants to.
    """
    clock = clock or SystemClock()
    local = None if config.engine.kind == "none" else _backend(config, say, on_status, engine)
    accounting = None if local is None else _accounting(config.engine, local, clock, emit)
    optimising = _optimising(config, clock, emit) if config.gateway.upstreams else None
    fleet = None if optimising is None else _fleet(config, local, optimising, clock, emit)
    backend: Backend = fleet or local or _nobody()
    further = fleet.model if fleet is not None else local.model if isinstance(local, EchoBackend) else None
    catalogue = Catalogue(backend, config.engine.aliases, further=further)
    levels = [_exact(config.cache, clock, emit)] if config.cache.enabled else []
    embeddings = _embeddings(config, catalogue, fleet, allowance, clock, emit)
    semantic = None
    if config.semantic.mode != "off" and embeddings is not None:
        semantic = _semantic(config, levels[0], embeddings, lambda: gateway, clock, emit)
        levels.append(semantic)
    memory = Memory(levels, fingerprint=catalogue.fingerprint, emit=emit)
    stale = Stale(config.cache.stale_if_error_s, config.cache.stale_while_revalidate_s)
    gateway = Gateway(
        backend,
        memory,
        catalogue,
        accounting=accounting,
        allowance=allowance,
        embeddings=embeddings,
        semantic=semantic,
        stale=stale,
        forgets=forgets,
        clock=clock,
        emit=emit,
    )
    if optimising is not None:
        gateway.on_forget(optimising.forget)  # in every gateway process, for it holds bodies of requests
    return gateway


@asynccontextmanager
async def open(config: Config | None = None, *, emit: Emit = ignore) -> AsyncIterator[Gateway]:
    """A started gateway without a server, closed on the way out: Anaphora as a library."""
    gateway = build(config or Config(), emit=emit)
    try:
        await gateway.start()
        yield gateway
    finally:
        await gateway.aclose()


def engine_options(config: Config) -> EngineOptions:
    """What the engine process is told. Raises ConfigError for a codec that changes more than is allowed."""
    from anaphora.backends.engine import EngineOptions

    engine = config.engine
    shared = {name: getattr(engine, name) for name in EngineOptions.__struct_fields__ if hasattr(engine, name)}
    shared["served_name"] = engine.served_name or None
    shared["kv_dir"] = str(_folder(config.cache) / "kv")
    shared["kv_shared"] = config.cache.shared
    shared["kv_shared_capacity"] = config.cache.shared_size
    shared["kv_shared_prefix"] = f"{config.cache.shared_prefix}kv:"
    shared["kv_shared_ca_file"] = config.cache.shared_ca_file
    check_default(engine.kv_codec, engine.kv_codec_bound, setting="engine.kv_codec", bound_setting="engine.kv_codec_bound")
    return EngineOptions(**shared, models_dir=str(_folder(config.cache) / "models"))


def _backend(config: Config, say: Say | None, on_status: OnStatus | None, address: str | None) -> Backend:
    kind = BACKENDS.load(config.engine.kind)
    if config.engine.kind == "echo":
        options = Options(model=config.engine.served_name or "echo", emulates=True, tokenizer=_tokenizer(config))
        return cast(Backend, kind(options))
    if config.engine.kind == "transformers":
        from anaphora.backends.engine import EngineClient

        if address is not None:
            return EngineClient(address, on_status=on_status)
        return cast(Backend, kind(engine_options(config), on_status=on_status, on_log=say))
    return cast(Backend, kind(config.engine))  # of a third party


def _nobody() -> Backend:
    raise ConfigError("engine.kind: without an engine there must be upstreams; add [[gateway.upstreams]]")


def _optimising(config: Config, clock: Clock, emit: Emit) -> Optimising:
    from anaphora.backends.optimising import Optimising
    from anaphora.backends.pinging import Pinging

    pinging = Pinging(config.gateway.optimiser.ping_tokens_per_hour, clock=clock, emit=emit)
    return Optimising(clock=clock, emit=emit, pinging=pinging)


def _fleet(config: Config, local: Backend | None, optimising: Optimising, clock: Clock, emit: Emit) -> Fleet:
    from anaphora.backends.upstream import Upstream, UpstreamOptions
    from anaphora.fleet import Fleet, optimiser_options
    from anaphora.routing.expected import ExpectedOptions

    shared = set(UpstreamOptions.__struct_fields__) & set(UpstreamConfig.__struct_fields__)

    def make(one: UpstreamConfig) -> Upstream:
        fields = {name: getattr(one, name) for name in shared}
        optimiser = optimiser_options(config.gateway.optimiser, one)
        options = UpstreamOptions(**fields, anthropic=one.dialect == "anthropic", key=upstream_key(one), optimiser=optimiser)
        return Upstream(options, _dialects(one), optimising=optimising, clock=clock)

    gateway = config.gateway
    pinging = optimising.pinging if gateway.optimiser.ping_tokens_per_hour else None
    kind = ROUTING.load(gateway.strategy)
    strategy = kind(ExpectedOptions(cost_weight=gateway.cost_weight)) if gateway.strategy == "expected" else kind()
    return Fleet(gateway, make, strategy, local=local, pinging=pinging, clock=clock, emit=emit)


def _dialects(upstream: UpstreamConfig) -> dict[str, UpstreamDialect]:
    """What it speaks; the first is for questions that came in another dialect."""
    if upstream.dialect == "anthropic":
        from anaphora.wire.upstream_anthropic import UpstreamAnthropic

        return {"anthropic": UpstreamAnthropic(max_tokens=upstream.max_tokens, extensions=upstream.extensions)}
    from anaphora.wire.upstream_chat import UpstreamChat
    from anaphora.wire.upstream_completions import UpstreamCompletions
    from anaphora.wire.upstream_responses import UpstreamResponses

    apis: dict[Api, UpstreamDialect] = {
        "chat": UpstreamChat(limit=upstream.limit, extensions=upstream.extensions),
        "responses": UpstreamResponses(extensions=upstream.extensions),
        "completions": UpstreamCompletions(),
    }
    wanted = upstream.apis or tuple(apis)
    return {apis[api].name: apis[api] for api in wanted}


def _tokenizer(config: Config) -> str:
    """The file that `engine.tokenizer` means; of a model that has to be converted first, it is."""
    name = config.engine.tokenizer
    path = Path(name).expanduser()
    if not name:
        return ""
    if path.is_file() and path.suffix == ".json":
        return str(path)
    if not (path / "tokenizer.json").is_file():
        try:
            from anaphora.backends.engine_model import materialise, resolve
        except ImportError as error:
            raise ConfigError(f"engine.tokenizer: {name} needs a package that is not installed ({error})") from error
        path = materialise(resolve(name), _folder(config.cache) / "models", lambda stage: None)
    return str(path / "tokenizer.json")


def _accounting(engine: EngineConfig, backend: Backend, clock: Clock, emit: Emit) -> Accounting | None:
    """None where nothing can be promised: usage is what the backend says."""
    like = _like(engine.profile)
    if isinstance(backend, EchoBackend):  # the emulator: it has no KV cache that could lose what was promised
        return Accounting(backend, Books(clock), like=like, hosted=True, emit=emit)
    if not isinstance(backend, Measuring) or not engine.prefix_caching:
        return None
    return Accounting(backend, Books(clock), like=like, block_size=engine.block_size, emit=emit)


def _like(profile: str | tuple[str, ...]) -> tuple[str, ...]:
    names = ((profile,) if profile else ()) if isinstance(profile, str) else profile
    try:
        dialects = [named(name).dialect for name in names]
    except ConfigError as error:
        raise ConfigError(f"engine.profile: {error}") from error
    if len(set(dialects)) < len(dialects):
        raise ConfigError(f"engine.profile: one name for each dialect is enough, these are of the same: {', '.join(names)}")
    return tuple(names)


def _exact(config: CacheConfig, clock: Clock, emit: Emit) -> AnswerLevel:
    from anaphora.levels.exact import ExactOptions

    stale_s = max(config.stale_if_error_s, config.stale_while_revalidate_s) if config.ttl_s else 0.0
    options = ExactOptions(sampled=config.sampled, stale_s=stale_s)
    ttl_s = config.ttl_s + stale_s or None
    store = Store(_tiers(config, "answers", clock, emit), clock=clock, options=StoreOptions(ttl_s=ttl_s), emit=emit)
    return cast(AnswerLevel, LEVELS.load("exact")(options, store=store, clock=clock))


def _embeddings(
    config: Config, catalogue: Catalogue, fleet: Fleet | None, allowance: Allowance | None, clock: Clock, emit: Emit
) -> Embeddings | None:
    """None where there is nothing to do: without NumPy, what upstreams answer passes through."""
    settings = config.embeddings
    hosting = fleet if settings.remember and importlib.util.find_spec("numpy") else None
    if not settings.models and hosting is None and config.semantic.mode == "off":
        return None
    if not importlib.util.find_spec("numpy"):
        raise ConfigError("embeddings.models: NumPy is not installed: install anaphora[embeddings]")
    from anaphora.backends.encoders.encoding import Encoders
    from anaphora.embeddings import Embeddings

    try:
        return Embeddings(
            embedding_level(config, clock, emit),
            Encoders(ENCODERS.load, threads=settings.threads),
            settings.models,
            catalogue=catalogue,
            hosting=hosting,
            allowance=allowance,
            remember=settings.remember,
            clock=clock,
            emit=emit,
        )
    except ConfigError as error:
        raise ConfigError(f"embeddings.models: {error}") from error


def embedding_level(config: Config, clock: Clock, emit: Emit = ignore) -> EmbeddingLevel:
    """Raises ConfigError."""
    from anaphora.levels.embedding import EmbeddingLevel, EmbeddingOptions

    settings = config.embeddings
    recent = settings.ram // 4  # of what is asked for lately there is a copy, of which the texts themselves are a part
    sizes = {"ram": settings.ram - recent, "disk": settings.disk, "shared_size": settings.shared_size}
    tiers = _tiers(msgspec.structs.replace(config.cache, **sizes), "embeddings", clock, emit)
    first = tiers[0]
    return EmbeddingLevel(
        EmbeddingOptions(settings.storage, settings.ttl_s or None, settings.disk_from_s, recent),
        store=Store(tiers, clock=clock, emit=emit),
        memory=first if isinstance(first, ImmediateTier) else None,
        clock=clock,
        emit=emit,
    )


_JUDGE_TOKENS = 8
UNRELATED = {"e5": 0.75}
"""Cosine that an encoder gives texts about different things, where it is far from 0."""


def _semantic(
    config: Config, exact: AnswerLevel, embeddings: Embeddings, gateway: Callable[[], Gateway], clock: Clock, emit: Emit
) -> SemanticLevel:
    """`gateway` is asked what the judge says, once there is one."""
    settings = config.semantic
    for package in ("numpy", "usearch"):
        if not importlib.util.find_spec(package):
            raise ConfigError(f"semantic.mode: {package} is not installed: install anaphora[semantic]")
    from anaphora.levels.semantic.entries import Entries
    from anaphora.levels.semantic.level import Route, SemanticOptions
    from anaphora.levels.semantic.verifier import shipped

    try:
        kind = embeddings.use(settings.encoder)
    except ConfigError as error:
        raise ConfigError(f"semantic.encoder: {error}") from error
    # Not its fingerprint: that is known only when it is loaded.
    encoder = " ".join([settings.encoder, *(f"{package} {importlib.metadata.version(package)}" for package in kind.needs)])

    async def embed(tenant: Tenant, model: str, texts: Sequence[str]) -> Vectors:
        return await embeddings.vectors(settings.encoder, texts, tenant=tenant, model=model)

    async def ask(tenant: Tenant, prompt: str) -> str:
        return await _judged(gateway(), settings.judge, tenant, prompt)

    folder = _folder(config.cache) / "semantic"
    options = SemanticOptions(
        mode=settings.mode,
        risk=settings.risk,
        confidence=settings.confidence,
        audit_share=settings.audit_share,
        max_chars=settings.max_chars,
        shared=settings.shared,
        routes=tuple(Route(**msgspec.structs.asdict(route)) for route in settings.routes),
        unrelated=UNRELATED.get(settings.encoder, 0.0),
    )
    level: type[SemanticLevel] = LEVELS.load("semantic")
    verifier = shipped()
    return level(
        options,
        answers=exact.lookup,
        embed=embed,
        entries=Entries(
            folder,
            dimensions=kind.dimensions,
            encoder=encoder,
            clock=clock,
            max_entries=settings.max_entries,
            emit=emit,
        ),
        verifier=verifier,
        version=f"anaphora {__version__}; {encoder}; verifier {verifier.fingerprint}; judge {settings.judge}",
        clock=clock,
        ask=ask if settings.judge else None,
        ready=lambda: embeddings.ready(settings.encoder),
        emit=emit,
    )


async def _judged(gateway: Gateway, model: str, tenant: Tenant, prompt: str) -> str:
    """What `model` says to `prompt`: a request of the tenant's, so it is in the ledger and within the tenant's limits."""
    messages = (Message("user", (TextPart(prompt),)),)
    request = Request(model, tenant, messages, sampling=Sampling(temperature=0.0), max_tokens=_JUDGE_TOKENS)
    asked = msgspec.structs.replace(NOBODY, model=model, tag="semantic-judge")
    answer = await gateway.complete(request, CacheControl(semantic_risk=0.0), asked)
    if isinstance(answer, Recalled):
        completion: Completion | None = answer.completion
    else:
        try:
            completion = await answer.whole()
        finally:
            answer.leave()
    parts = () if completion is None else completion.choices[0].content
    return "".join(part.text for part in parts if isinstance(part, TextPart))


def _tiers(config: CacheConfig, part: str, clock: Clock, emit: Emit) -> list[Tier]:
    """Memory, over this machine's disk, over the server that machines share; `part` is the place of what is kept there."""
    from anaphora.tiers.disk import DiskOptions
    from anaphora.tiers.following import following
    from anaphora.tiers.ram import RamOptions

    policy = cast(Policy[Key], POLICIES.load(config.policy)())
    leaving = eviction(config.policy, tenant_share=config.tenant_share)
    tiers = [cast(Tier, TIERS.load("ram")(RamOptions(config.ram, leaving), policy=policy, clock=clock, emit=emit))]
    shared = shared_tier(config, part, config.shared_size, leaving, clock=clock, emit=emit) if config.shared else None
    if config.disk:
        folder = _folder(config) / part
        disk = cast(Tier, TIERS.load("disk")(DiskOptions(str(folder), config.disk, eviction=leaving), clock=clock, emit=emit))
        if shared is not None:
            disk = following(disk, shared, folder, config.shared)
        tiers.append(disk)
    if shared is not None:
        tiers.append(shared)
    return tiers


def kv_eviction(engine: EngineConfig) -> Eviction:
    """What leaves first of the KV blocks that lie elsewhere than in the engine's pool."""
    return eviction(engine.policy, tenant_share=engine.kv_tenant_share, keep_share=engine.pin_quota)


def shared_tier(
    config: CacheConfig, part: str, capacity_bytes: int, leaving: Eviction, *, clock: Clock, emit: Emit
) -> ValkeyTier:
    """`part` of what is kept on the server at `config.shared`. Raises ConfigError."""
    kind = TIERS.load("valkey")
    from anaphora.tiers.valkey import ValkeyOptions

    options = ValkeyOptions(
        config.shared,
        capacity_bytes,
        prefix=f"{config.shared_prefix}{part}:",
        ca_file=config.shared_ca_file,
        eviction=leaving,
    )
    try:
        return cast("ValkeyTier", kind(options, clock=clock, emit=emit))
    except ConfigError as error:
        raise ConfigError(f"cache.shared: {error}") from error


def _folder(config: CacheConfig) -> Path:
    return Path(config.dir).expanduser()
