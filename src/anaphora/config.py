"""The shape of `anaphora.toml`, and where each value came from.

A setting has a path (`server.port`), a default, a long variable (`ANAPHORA_SERVER_PORT`), perhaps a short one
(`ANAPHORA_PORT`), and perhaps a flag of `anaphora serve`. Precedence: flag, environment, file, default. Whatever cannot be
understood is a `ConfigError` that names the setting, where it was set, and, for a misspelling, the nearest right spelling.

Names of plug-ins (`engine.kind`, `engine.policy`) are plain strings here: `build` looks them up in the registry.
Every setting is described in `docs/configuration.md` (a test checks that none is missing there).
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from anaphora.errors import ConfigError
from anaphora.types import Owner, Tenant

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


class Setting(msgspec.Struct, frozen=True):
    """One leaf of `Config`."""

    path: str
    type: Any
    default: Any
    variables: tuple[str, ...]


class Loaded(msgspec.Struct, frozen=True):
    """A configuration with the source of each setting: "flag --port", "environment ANAPHORA_PORT", "file PATH", "default"."""

    config: Config
    sources: dict[str, str]
    warnings: tuple[str, ...] = ()


FILE_NAME = "anaphora.toml"
SHORT_VARIABLES = {
    "server.host": "ANAPHORA_HOST",
    "server.port": "ANAPHORA_PORT",
    "server.workers": "ANAPHORA_WORKERS",
    "engine.kind": "ANAPHORA_ENGINE",
    "engine.model": "ANAPHORA_MODEL",
    "engine.dtype": "ANAPHORA_DTYPE",
    "engine.quantization": "ANAPHORA_QUANTIZATION",
    "engine.kv_memory": "ANAPHORA_KV_MEMORY",
    "engine.kv_disk": "ANAPHORA_KV_DISK",
    "engine.kv_codec": "ANAPHORA_KV_CODEC",
    "engine.profile": "ANAPHORA_PROFILE",
    "cache.shared": "ANAPHORA_SHARED",
    "gateway.upstreams": "ANAPHORA_UPSTREAMS",
    "gateway.optimiser": "ANAPHORA_OPTIMISER",
    "embeddings.models": "ANAPHORA_EMBEDDINGS",
    "semantic.mode": "ANAPHORA_SEMANTIC",
}
OTHER_VARIABLES = ("ANAPHORA_CONFIG", "ANAPHORA_DATA", "ANAPHORA_URL", "ANAPHORA_API_KEY")
"""Read elsewhere (the file's path; test data; where `chat` and `stats` connect to), so not a misspelling."""


def settings() -> tuple[Setting, ...]:
    """Every setting, in the order of the file."""
    found = []
    defaults = Config()
    for section in Config.__struct_fields__:
        values = getattr(defaults, section)
        hints = get_type_hints(type(values), include_extras=True)
        for name in values.__struct_fields__:
            path = f"{section}.{name}"
            long = f"ANAPHORA_{section}_{name}".upper()
            variables = (SHORT_VARIABLES[path], long) if path in SHORT_VARIABLES else (long,)
            found.append(Setting(path, hints[name], getattr(values, name), variables))
    return tuple(found)


def load(
    file: str | os.PathLike[str] | None = None,
    flags: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Read flags (path → text), environment and file, and check the whole. Raises ConfigError.

    `file` None: `ANAPHORA_CONFIG`, else `anaphora.toml` in the working directory if there is one.
    """
    environ = os.environ if environ is None else environ
    chosen = {path: (raw, f"flag --{_flag_name(path)}") for path, raw in (flags or {}).items()}
    for path, entry in _from_environment(environ).items():
        chosen.setdefault(path, entry)
    source = _find_file(file, environ)
    if source is not None:
        for path, raw in _from_file(source).items():
            chosen.setdefault(path, (raw, f"file {source}"))

    values: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}
    for setting in settings():
        section, _, name = setting.path.partition(".")
        sources[setting.path] = "default"
        if setting.path in chosen:
            raw, sources[setting.path] = chosen[setting.path]
            values.setdefault(section, {})[name] = _value(setting, raw, sources[setting.path])
    if values.get("engine", {}).get("kind") == "echo" and "cache.enabled" not in chosen:
        # A remembered answer would hide what the emulator is asked for: the accounting of the next request.
        values.setdefault("cache", {})["enabled"] = False
        sources["cache.enabled"] = "default of the echo engine"
    if values.get("engine", {}).get("kind") == "echo" and not any(path.startswith("ledger.") for path in chosen):
        values.setdefault("ledger", {})["enabled"] = False  # nobody pays for an echo
        sources["ledger.enabled"] = "default of the echo engine"
    if values.get("gateway", {}).get("upstreams") and "engine.kind" not in chosen and "engine.model" not in chosen:
        values.setdefault("engine", {})["kind"] = "none"
        sources["engine.kind"] = "default with upstreams"
    config = Config(
        server=ServerConfig(**values.get("server", {})),
        engine=EngineConfig(**values.get("engine", {})),
        cache=CacheConfig(**values.get("cache", {})),
        gateway=GatewayConfig(**values.get("gateway", {})),
        ledger=LedgerConfig(**values.get("ledger", {})),
        embeddings=EmbeddingsConfig(**values.get("embeddings", {})),
        semantic=SemanticConfig(**values.get("semantic", {})),
    )
    _check(config, environ)
    return Loaded(config, sources, tuple(_unknown_variables(environ, config)))


def api_keys(config: Config, environ: Mapping[str, str] | None = None) -> dict[str, Owner]:
    """Secret → owner. Empty when no keys are configured. Raises ConfigError for a key that cannot be used."""
    environ = os.environ if environ is None else environ
    found: dict[str, Owner] = {}
    for index, entry in enumerate(config.server.keys):
        where = f"server.keys[{index}]"
        if bool(entry.key) == bool(entry.key_env):
            raise ConfigError(f"{where}: set exactly one of key and key_env")
        secret = entry.key or environ.get(entry.key_env, "")
        if not secret:
            raise ConfigError(f"{where}: the environment variable {entry.key_env} is not set")
        if secret in found:
            raise ConfigError(f"{where}: the same key is configured twice")
        found[secret] = Owner(Tenant(entry.tenant), entry.workspace, entry.admin)
    return found


def shown(loaded: Loaded) -> dict[str, dict[str, Any]]:
    """Path → {"value", "source"}, in plain values, with secrets replaced: for people and logs."""
    rows = {}
    for setting in settings():
        section, _, name = setting.path.partition(".")
        value = msgspec.to_builtins(getattr(getattr(loaded.config, section), name))
        if setting.path == "server.keys":
            value = [{**entry, "key": "(hidden)"} if entry["key"] else entry for entry in value]
        if setting.path == "gateway.upstreams":  # a header may hold a key
            value = [{**entry, "headers": dict.fromkeys(entry["headers"], "(hidden)")} for entry in value]
        if setting.path == "cache.shared":
            value = re.sub(r"(?<=://)([^:@/]*:).*(?=@)|(password=)[^&]*", r"\1\2(hidden)", value)
        rows[setting.path] = {"value": value, "source": loaded.sources[setting.path]}
    return rows


def is_loopback(host: str) -> bool:
    """True where only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def parse_size(text: str) -> int:
    """Bytes from "2GiB", "500 MB", "1.5g" or "1024". A bare K, M, G or T is binary. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(ib?|b)?|b)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"expected a size such as 512MiB or 2GiB, got {text!r}")
    number, prefix, suffix = match.groups()
    base = 1000 if (suffix or "").lower() == "b" else 1024
    return int(float(number) * base ** ("kmgt".index(prefix.lower()) + 1 if prefix else 0))


def format_size(size: int) -> str:
    """The shortest exact text that `parse_size` reads back: 2147483648 → "2GiB"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)


# -- sources -----------------------------------------------------------------------------------------------------------


def _flag_name(path: str) -> str:
    """`engine.kv_memory` → `kv-memory`: the flags of `serve` are the short variables' names, and `--cache-dir`."""
    short = SHORT_VARIABLES.get(path, f"ANAPHORA_{path.replace('.', '_')}")
    return short.removeprefix("ANAPHORA_").lower().replace("_", "-")


def _find_file(file: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> Path | None:
    named = file if file is not None else environ.get("ANAPHORA_CONFIG") or None
    if named is not None:
        return Path(named).expanduser()
    beside = Path(FILE_NAME)
    return beside if beside.is_file() else None


def _from_file(path: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    known = {setting.path for setting in settings()}
    flat: dict[str, Any] = {}
    for section, table in document.items():
        if section not in Config.__struct_fields__:
            raise _misspelt(f"{path}: unknown key {section}", section, {name: name for name in Config.__struct_fields__})
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} must be a table ([{section}])")
        for name, value in table.items():
            full = f"{section}.{name}"
            if full not in known:
                raise _misspelt(f"{path}: unknown key {full}", name)
            flat[full] = value
    return flat


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    found = {}
    for setting in settings():
        given = [(name, environ[name]) for name in setting.variables if name in environ]
        if len({text for _, text in given}) > 1:
            raise ConfigError(f"{' and '.join(name for name, _ in given)} are the same setting with different values")
        if given:
            found[setting.path] = (given[0][1], f"environment {given[0][0]}")
    return found


def _unknown_variables(environ: Mapping[str, str], config: Config) -> Iterable[str]:
    secrets = (key.key_env for key in config.server.keys)
    known = [*OTHER_VARIABLES, *secrets, *(name for setting in settings() for name in setting.variables)]
    for name in sorted(environ):
        if name.startswith("ANAPHORA_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            yield f"unknown environment variable {name}" + (f"; did you mean {near[0]}?" if near else "")


def _misspelt(problem: str, name: str, others: Mapping[str, str] | None = None) -> ConfigError:
    """`problem`, and the nearest of the settings' names (in any section: it may be in the wrong one) and of `others`."""
    meant = {setting.path.partition(".")[2]: setting.path for setting in settings()} | dict(others or {})
    return _unknown(problem, name, meant)


def _unknown(problem: str, name: str, meant: Mapping[str, str]) -> ConfigError:
    near = difflib.get_close_matches(name, meant, n=1)
    return ConfigError(f"{problem}; did you mean {meant[near[0]]}?" if near else problem)


# -- values ------------------------------------------------------------------------------------------------------------


def _value(setting: Setting, raw: Any, source: str) -> Any:
    """`raw` as the setting's type. Text from flags and variables is read leniently ("8080" is a number); a file's is not."""
    from_text = not source.startswith("file ")
    try:
        if setting.path in ("cache.dir", "ledger.path", "ledger.prices") and isinstance(raw, str):
            raw = os.path.expanduser(raw)
        elif setting.type == Size and isinstance(raw, str):
            raw = parse_size(raw)
        elif from_text:
            raw = _structured(setting, raw)
        return msgspec.convert(raw, setting.type, strict=not from_text)
    except msgspec.ValidationError as error:
        raise _wrong_value(setting, source, str(error)) from error
    except ValueError as error:
        raise ConfigError(f"{setting.path}: {error} (from {source})") from error


def _structured(setting: Setting, text: str) -> Any:
    """Lists are comma-separated in text; keys are `tenant=secret`; `cache.sampled` may be `buckets=4`."""
    if setting.path == "server.keys":
        pairs = [item.partition("=") for item in text.split(",") if item.strip()]
        return [{"tenant": tenant.strip(), "key": key.strip()} for tenant, _, key in pairs]
    if setting.path == "gateway.upstreams":
        pairs = [item.partition("=") for item in text.split(",") if item.strip()]
        return [_upstream(name.strip(), url.strip()) for name, _, url in pairs]
    if setting.path in ("ledger.limits", "semantic.routes"):
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ValueError(f"expected {setting.path.partition('.')[2]} as JSON: {error}") from error
    if setting.path == "gateway.optimiser":
        return {"mode": text}
    if setting.path in ("engine.aliases", "engine.profile", "embeddings.models"):
        return [item.strip() for item in text.split(",") if item.strip()]
    if setting.path == "cache.sampled" and text.startswith("buckets="):
        return {"buckets": text.removeprefix("buckets=")}
    return text


def _upstream(name: str, url: str) -> dict[str, Any]:
    """One that is given by a name and an address alone: a well-known name says which dialect and which models."""
    if name == "anthropic":
        return {"name": name, "base_url": url, "dialect": name, "models": ["claude-*"]}
    return {"name": name, "base_url": url}


def _wrong_value(setting: Setting, source: str, message: str) -> ConfigError:
    """msgspec's message, with the setting's own path in place of its `$`."""
    text, _, inner = message.partition(" - at `$")
    where = setting.path + inner.removesuffix("`")
    unknown = re.fullmatch(r"Object contains unknown field `(.+)`", text)
    if unknown:
        fields = _FIELDS.get(setting.path, Buckets).__struct_fields__
        return _unknown(f"unknown key {where}.{unknown[1]} (from {source})", unknown[1], dict(zip(fields, fields, strict=True)))
    choices = _choices(setting.type)
    if choices and text.startswith("Invalid enum value"):
        text = f"expected one of {', '.join(choices)}, got{text.removeprefix('Invalid enum value')}"
    return ConfigError(f"{where}: {text[:1].lower()}{text[1:].replace('`', '')} (from {source})")


_FIELDS: dict[str, type[msgspec.Struct]] = {
    "server.keys": ApiKey,
    "gateway.upstreams": UpstreamConfig,
    "gateway.routes": RouteConfig,
    "gateway.optimiser": OptimiserConfig,
    "ledger.limits": LimitConfig,
    "semantic.routes": SemanticRouteConfig,
}


def _choices(hint: Any) -> list[str]:
    """The words a setting takes: of `Literal[...]`, alone or in a union."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [word for part in get_args(hint) for word in _choices(part)]


def _check(config: Config, environ: Mapping[str, str]) -> None:
    """Rules that concern more than one setting."""
    if not api_keys(config, environ) and not is_loopback(config.server.host):
        raise ConfigError(
            f"server.host: without API keys only a loopback address may be listened on, not {config.server.host}; "
            "add [[server.keys]] or use 127.0.0.1"
        )
    if config.cache.shared and not re.match(r"(rediss?(\+cluster)?|unix)://.", config.cache.shared):
        raise ConfigError(
            "cache.shared: an address such as redis://host:6379/0, rediss://..., redis+cluster://... or unix://..."
        )
    _check_gateway(config.gateway, environ)
    _check_ledger(config.ledger)
    if config.semantic.mode != "off" and not config.cache.enabled:
        raise ConfigError("semantic.mode: answers in other words are those of the answer cache; set cache.enabled = true")
    if config.engine.kind == "none" and not config.gateway.upstreams:
        raise ConfigError("engine.kind: without an engine there must be upstreams; add [[gateway.upstreams]]")
    if config.server.virtual_clock and config.server.workers > 1:
        raise ConfigError("server.virtual_clock: a clock can only be moved in one process; set server.workers = 1")


def _check_gateway(gateway: GatewayConfig, environ: Mapping[str, str]) -> None:
    names: set[str] = set()
    for index, upstream in enumerate(gateway.upstreams):
        where = f"gateway.upstreams[{index}]"
        if upstream.name in names:
            raise ConfigError(f"{where}.name: {upstream.name} is there twice")
        names.add(upstream.name)
        check_upstream(upstream, where, environ)
    for index, route in enumerate(gateway.routes):
        named = [
            *(name for name in route.upstreams if not re.search(r"[*?\[]", name)),
            *(name.partition(":")[0] for name in route.fallbacks),
        ]
        for name in named:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"gateway.routes[{index}]: there is no upstream {name}{hint}")
        if not route.upstreams:
            raise ConfigError(f"gateway.routes[{index}].upstreams: name at least one")


def _check_ledger(ledger: LedgerConfig) -> None:
    tenants: set[str] = set()
    for index, limit in enumerate(ledger.limits):
        where = f"ledger.limits[{index}]"
        if limit.tenant in tenants:
            raise ConfigError(f"{where}: {limit.tenant} has limits already; an entry may have several")
        tenants.add(limit.tenant)
        amounts = {name: getattr(limit, name) for name in LimitConfig.__struct_fields__ if name != "tenant"}
        if all(amount is None for amount in amounts.values()):
            raise ConfigError(f"{where}: it limits nothing; set one of {', '.join(amounts)}")
        for name, amount in amounts.items():
            if isinstance(amount, Decimal) and not (amount.is_finite() and 0 < amount < 10**6):
                raise ConfigError(f"{where}.{name}: more than 0 and less than a million dollars, not {amount}")
    if ledger.limits and not ledger.enabled:
        raise ConfigError("ledger.limits: limits are held by the ledger; set ledger.enabled = true")


def ledger_path(config: Config) -> Path:
    return Path(config.ledger.path or Path(config.cache.dir, "ledger.db")).expanduser()


def check_upstream(upstream: UpstreamConfig, where: str, environ: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError, with `where` in front."""
    if not re.fullmatch(r"[\w.-]+", upstream.name):
        raise ConfigError(f"{where}.name: letters, digits, dots, dashes and underscores only, not {upstream.name!r}")
    if not re.match(r"https?://[^/]", upstream.base_url):
        raise ConfigError(f"{where}.base_url: an address such as https://api.example.com, not {upstream.base_url!r}")
    wrong = [api for api in upstream.apis if (api == "messages") != (upstream.dialect == "anthropic")]
    if wrong:
        raise ConfigError(f"{where}.apis: {wrong[0]} is not one of the dialect {upstream.dialect}")
    for name in ("kv_events", "kv_events_replay"):
        address = getattr(upstream, name)
        if address and not re.fullmatch(r"tcp://[^/]+:\d+|ipc://.+", address):
            raise ConfigError(f"{where}.{name}: an address such as tcp://10.0.0.7:5557, not {address!r}")
    if upstream.kv_events_replay and not upstream.kv_events:
        raise ConfigError(f"{where}.kv_events_replay: only beside kv_events")
    upstream_key(upstream, environ)


def upstream_key(upstream: UpstreamConfig, environ: Mapping[str, str] | None = None) -> str:
    """Its API key; empty where clients bring their own. Raises ConfigError for one that was promised and is not there."""
    environ = os.environ if environ is None else environ
    where = f"gateway.upstreams: {upstream.name}"
    if upstream.key_env and upstream.key_file:
        raise ConfigError(f"{where}: set at most one of key_env and key_file")
    if upstream.key_file:
        try:
            key = Path(upstream.key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: key_file cannot be read: {error}") from error
        if not key:
            raise ConfigError(f"{where}: {upstream.key_file} is empty")
        return key
    if upstream.key_env and not environ.get(upstream.key_env):
        raise ConfigError(f"{where}: the environment variable {upstream.key_env} is not set")
    return environ.get(upstream.key_env, "") if upstream.key_env else ""
