"""The shape of `anaphora.toml`: its sections, and the defaults of every setting."""

from __future__ import annotations

import os
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import msgspec

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

Size = Annotated[int, msgspec.Meta(ge=0, description="bytes; in text also as '512MiB', '2GiB', '500MB'")]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Name = Annotated[str, msgspec.Meta(min_length=1)]


def default_cache_dir() -> str:
    """`$XDG_CACHE_HOME/anaphora`, else `~/.cache/anaphora`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return str((Path(base) if base else Path("~/.cache").expanduser()) / "anaphora")


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One API key and whom it stands for. Exactly one of `key` and `key_env` (the variable that holds it) is set."""

    tenant: Name
    workspace: str = ""
    """Of the tenant: what prompt caching promises there holds in no other workspace."""
    admin: bool = False
    """It may change who answers (`POST /anaphora/replicas`)."""
    key: str = ""
    key_env: str = ""


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: Name = "127.0.0.1"
    port: Port = 8080
    workers: Positive = 1
    """Gateway processes. They share one engine process and one cache directory."""
    max_body: Size = 32 * MIB
    keys: tuple[ApiKey, ...] = ()
    """None: everybody is the one local tenant (with the echo engine: every key a tenant of its own), and only loopback
    addresses may be listened on."""
    virtual_clock: bool = False
    """Lifetimes follow a clock that stands still until `POST /anaphora/clock` moves it. For tests."""
    explanations: Natural = 128
    """Requests of each tenant, the latest ones, that can be explained."""


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Name = "transformers"
    model: Name = "smollm2"
    """`smollm2`, a local folder, a GGUF file, or a Hugging Face id."""
    served_name: str = ""
    """The id clients see and send. Empty: taken from `model`."""
    aliases: tuple[Name, ...] = ()
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    quantization: Literal["none", "int8"] = "none"
    """Of the weights of the model's linear layers, while they are loaded."""
    device: Name = "auto"
    threads: Natural = 0
    """0: as many as the machine has physical cores."""
    kv_memory: Size = 2 * GIB
    block_size: Positive = 16
    """Tokens per KV block."""
    policy: Name = "lru"
    max_num_seqs: Positive = 16
    """Requests that compute at the same time; more wait."""
    max_queue: Natural = 256
    """Requests that may wait; more are refused with 429."""
    prefill_chunk: Positive = 512
    """Prompt tokens per step while nobody is decoding."""
    mixed_chunk: Positive = 128
    """Prompt tokens per step while others are decoding: how long a new prompt may hold up their streams."""
    prefix_caching: bool = True
    """False: nothing computed for one request is used for another."""
    kv_ram: Size = 0
    """Memory for KV blocks beside `kv_memory`, encoded by `kv_codec`: with a codec that takes fewer bits it holds more."""
    kv_disk: Size = 8 * GIB
    """KV blocks that outlive the process, in `cache.dir`/kv. 0: none."""
    kv_tenant_share: Share = 1.0
    """Of each of the places for KV blocks outside `kv_memory`, at most so much is one tenant's."""
    kv_codec: Name = "raw"
    """How KV blocks are encoded outside `kv_memory`: raw, zstd, or with loss int8, int4, int3."""
    kv_codec_bound: Annotated[float, msgspec.Meta(ge=0)] = 0.005
    """What a codec may change, in nats of mean divergence of next-token distributions as measured."""
    pin_quota: Share = 0.25
    """Share of the KV blocks that prompt caching may keep from being evicted for one tenant."""
    profile: str | tuple[Name, ...] = ()
    """Account for prompt caching like this model of a provider, or one for each dialect. Empty: by the model's own name."""
    tokenizer: str = ""
    """With the echo engine: whose tokens are counted, a model as in `model`, or a `tokenizer.json`. Empty: an estimate."""
    niceness: Annotated[int, msgspec.Meta(ge=0, le=19)] = 5
    """Scheduling priority the engine process gives up, so that the gateway answers while tokens are computed."""


class Buckets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keep up to `buckets` different sampled answers per question."""

    buckets: Positive


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    enabled: bool = True
    dir: Name = msgspec.field(default_factory=default_cache_dir)
    ram: Size = 256 * MIB
    disk: Size = 4 * GIB
    """0: answers are kept in memory only."""
    shared: str = ""
    """The address of a Valkey or Redis server that keeps answers for several machines. Empty: none."""
    shared_size: Size = 4 * GIB
    """Memory of that server for the answers of all machines."""
    shared_ca_file: str = ""
    """Of the authority that signed its certificate. Empty: those the system trusts."""
    shared_prefix: Name = "anaphora:"
    """What every key on it begins with."""
    policy: Name = "lru"
    tenant_share: Share = 1.0
    """Of memory, disk and shared server each, at most so much is one tenant's answers."""
    ttl_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Seconds an answer stays valid. 0: until it is evicted."""
    stale_if_error_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Seconds past `ttl_s` for which an answer is given all the same where no new one can be computed."""
    stale_while_revalidate_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Seconds past `ttl_s` for which an answer is given while a new one is computed for those who come later."""
    sampled: Literal["reuse", "never"] | Buckets = "reuse"
    """What becomes of answers drawn at random (temperature above 0, no seed)."""


Seconds = Annotated[float, msgspec.Meta(gt=0)]
Api = Literal["messages", "chat", "responses", "completions"]


class PriceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Money per million tokens, in any one currency: for the router, not for the ledger."""

    input: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    cached: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    output: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class UpstreamConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A hosted API, or any other server that speaks one of its dialects."""

    name: Name
    base_url: Name
    """With or without `/v1` at its end."""
    dialect: Literal["anthropic", "openai"] = "openai"
    apis: tuple[Api, ...] = ()
    """What it has of its dialect's endpoints. Empty: `messages`, or all of OpenAI's."""
    key_env: str = ""
    """The variable that holds its API key."""
    key_file: str = ""
    """Or the file that does. Neither: each client's own key is passed on."""
    models: tuple[Name, ...] = ("*",)
    """Patterns (`claude-*`) of the models that it is asked for, by the names that clients use."""
    rename: dict[str, str] = {}
    """The client's name of a model → this upstream's."""
    headers: dict[str, str] = {}
    """Sent with every request."""
    other_paths: tuple[Name, ...] = (
        "/v1/models",
        "/v1/embeddings",
        "/v1/moderations",
        "/v1/rerank",
        "/v1/audio/*",
        "/v1/images/*",
    )
    """Patterns of what else clients may ask of it with a key of ours. With keys of their own they may ask anything."""
    ca_file: str = ""
    """Of the authority that signed its certificate. Empty: those the system trusts."""
    limit: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """How Chat Completions limit an answer there: OpenAI's reasoning models know the newer field alone, others the older."""
    extensions: bool = False
    """It takes what Anaphora, vLLM, SGLang and llama.cpp take beyond the provider's API: `top_k`, `min_p`, `cache_salt`."""
    max_tokens: Positive = 4096
    """Of an answer, where the upstream's dialect demands a limit and the client's has none."""
    connect_s: Seconds = 5.0
    first_s: Seconds = 120.0
    """From the request to the first token of a stream."""
    between_s: Seconds = 60.0
    """From one piece of a stream to the next."""
    total_s: Seconds = 1800.0
    retries: Natural = 2
    """Of a request that certainly was not answered, before another upstream is asked or the client told."""
    max_concurrency: Natural = 0
    """Requests at the same time; more wait. 0: any number."""
    affinity: Literal["", "azure", "deepseek", "mistral", "openai", "openrouter", "xai"] = ""
    """Whose way of sending what belongs together to one place it knows. Empty: that of the model's own provider."""
    profile: str = ""
    """The model whose rules of prompt caching hold for models that none are known of, such as `gpt-5.5`."""
    pool: str = ""
    """Upstreams of one pool are alike, the same model on the same hardware: what is learned of their speed is shared."""
    price: PriceConfig = PriceConfig()
    """What the router weighs against time, where `gateway.cost_weight` says so."""
    metrics: str = ""
    """Path of its figures in Prometheus' format, such as `/metrics`: how long its queue is. Empty: it is not asked."""
    kv_tokens: Natural = 0
    """Of a server of one's own: how many tokens of prefixes its cache holds. 0: not known."""
    kv_events: str = ""
    """Where it publishes what its cache stores and drops, as vLLM does: `tcp://host:port`. Empty: nobody listens."""
    kv_events_replay: str = ""
    """Where it gives out once more what it published and somebody missed."""


class OptimiserConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is added to prompts so that their provider's cache hits."""

    mode: Literal["off", "advise", "on"] = "off"
    """`advise`: only headers and explanations say what would be done."""
    rewrites: tuple[Literal["tools", "schemas", "volatile"], ...] = ()
    """Sort tools, sort keys of their schemas, move lines of the system prompt that change with every request to the end."""
    retain: bool = False
    """Ask classic models of OpenAI to keep prompts for a day. A decision about data, so never by itself."""
    ping_tokens_per_hour: Natural = 0
    """What may be spent on keeping entries alive that are likely to be asked for again, in tokens at the plain price. Of
    `gateway.optimiser` only."""


class RouteConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who answers for some models, where it is not simply every upstream that has them."""

    models: tuple[Name, ...]
    upstreams: tuple[Name, ...]
    """One of them is asked. Patterns may stand for several, also for such as are added later."""
    fallbacks: tuple[Name, ...] = ()
    """Asked one after the other when none of those can answer: `NAME`, or `NAME:MODEL` for another model there."""
    optimiser: OptimiserConfig | None = None
    """Of these models' prompts. None: as everywhere."""


class GatewayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    upstreams: tuple[UpstreamConfig, ...] = ()
    routes: tuple[RouteConfig, ...] = ()
    optimiser: OptimiserConfig = OptimiserConfig()
    """Of all prompts that go to upstreams."""
    strategy: Name = "expected"
    """Which of several upstreams is asked."""
    cost_weight: Share = 0.0
    """Of money against time: 0 is time alone, 1 money alone."""
    breaker_failures: Positive = 5
    """In a row, after which an upstream is left alone for a while."""
    breaker_rest_s: Seconds = 10.0
    """For how long, the first time; longer each time it still fails."""


Dollars = Annotated[Decimal, msgspec.Meta(description="US dollars")]


class LimitConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one tenant may use. None: any amount."""

    tenant: Name
    """`*`: every tenant without limits of its own, each by itself."""
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    requests_per_hour: Positive | None = None
    requests_per_day: Positive | None = None
    requests_per_month: Positive | None = None
    tokens_per_hour: Positive | None = None
    tokens_per_day: Positive | None = None
    tokens_per_month: Positive | None = None
    usd_per_hour: Dollars | None = None
    usd_per_day: Dollars | None = None
    usd_per_month: Dollars | None = None


class LedgerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    enabled: bool = True
    path: str = ""
    """The SQLite file. Empty: `ledger.db` in `cache.dir`."""
    keep_days: Natural = 0
    """Days that a request stays in it. 0: for ever."""
    prices: str = ""
    """A TOML file with prices of one's own."""
    limits: tuple[LimitConfig, ...] = ()
    share_limits: bool = False
    """Hold them for all servers together that have the same `cache.shared`. False: each server lets the whole limit in."""
    otel: bool = False
    """Export OpenTelemetry spans and metrics, as the OTEL_* variables say."""


class EmbeddingsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Texts to vectors, each text once."""

    models: tuple[Name, ...] = ()
    """Encoders that are served: `minilm`, `e5`, `static`. Upstreams' models need not be named."""
    threads: Positive = 1
    """Of each encoder."""
    remember: bool = True
    """False: every text is computed, also those that are sent to upstreams."""
    storage: Literal["float16", "int8", "float32"] = "float16"
    """How vectors are kept, and given."""
    ram: Size = 64 * MIB
    disk: Size = 1 * GIB
    """In `cache.dir`/embeddings. 0: vectors are kept in memory only."""
    disk_from_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0005
    """Vectors of an encoder that takes less for a text are kept in memory only: to write and read them would cost as much. 0:
    they all go to disk. Upstreams' always do."""
    shared_size: Size = 1 * GIB
    """On the server at `cache.shared`, if there is one."""
    ttl_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Seconds a vector stays valid. 0: until it is evicted."""


Risk = Annotated[float, msgspec.Meta(gt=0, le=0.5)]
SemanticMode = Literal["off", "shadow", "on"]


class SemanticRouteConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another mode or risk for some tenants' questions to some models. The first that matches holds."""

    models: tuple[Name, ...] = ("*",)
    tenants: tuple[Name, ...] = ("*",)
    mode: SemanticMode | None = None
    risk: Risk | None = None


class SemanticConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answers to questions that were asked before in other words."""

    mode: SemanticMode = "off"
    """`shadow`: nothing is answered so, but it is found out how often that would have been wrong."""
    risk: Risk = 0.01
    """Of the answers that are given so, at most this share may be wrong. Until there is evidence for that none is given."""
    confidence: Annotated[float, msgspec.Meta(ge=0.5, lt=1)] = 0.95
    """How sure it must be."""
    audit_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.05
    """Of the answers that might be given, those that are computed all the same, to be compared."""
    encoder: Name = "minilm"
    """Whose vectors find the questions that are near."""
    max_entries: Positive = 200_000
    """Questions that are remembered."""
    max_chars: Positive = 600
    """Of a question. A longer one says more than an encoder reads."""
    judge: str = ""
    """A model that is asked whether two answers say the same, and whether an answer fits where the verifier is in doubt."""
    shared: bool = False
    """Tenants are given each other's answers where these were audited."""
    routes: tuple[SemanticRouteConfig, ...] = ()


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings of one process. `Config()` is the default configuration; it survives `msgspec.json` round trips."""

    server: ServerConfig = msgspec.field(default_factory=ServerConfig)
    engine: EngineConfig = msgspec.field(default_factory=EngineConfig)
    cache: CacheConfig = msgspec.field(default_factory=CacheConfig)
    gateway: GatewayConfig = msgspec.field(default_factory=GatewayConfig)
    ledger: LedgerConfig = msgspec.field(default_factory=LedgerConfig)
    embeddings: EmbeddingsConfig = msgspec.field(default_factory=EmbeddingsConfig)
    semantic: SemanticConfig = msgspec.field(default_factory=SemanticConfig)
