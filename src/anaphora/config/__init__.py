"""The settings: their shape (`sections`), where each value came from (`loading`), and what they demand of each other
(`checking`).

A setting has a path (`server.port`), a default, a long variable (`ANAPHORA_SERVER_PORT`), perhaps a short one
(`ANAPHORA_PORT`), and perhaps a flag of `anaphora serve`. Precedence: flag, environment, file, default. Whatever cannot be
understood is a `ConfigError` that names the setting, where it was set, and, for a misspelling, the nearest right spelling.

Names of plug-ins (`engine.kind`, `engine.policy`) are plain strings here: `build` looks them up in the registry.
Every setting is described in `docs/configuration.md` (a test checks that none is missing there).
"""

from __future__ import annotations

from anaphora.config.checking import api_keys, check_upstream, is_loopback, ledger_path, upstream_key
from anaphora.config.loading import FILE_NAME, OTHER_VARIABLES, SHORT_VARIABLES, Loaded, Setting, load, settings, shown
from anaphora.config.sections import (
    Api,
    ApiKey,
    Buckets,
    CacheConfig,
    Config,
    EmbeddingsConfig,
    EngineConfig,
    GatewayConfig,
    LedgerConfig,
    LimitConfig,
    OptimiserConfig,
    PriceConfig,
    RouteConfig,
    SemanticConfig,
    SemanticRouteConfig,
    ServerConfig,
    Size,
    UpstreamConfig,
    default_cache_dir,
)
from anaphora.config.sizes import format_size, parse_size

__all__ = [
    "FILE_NAME",
    "OTHER_VARIABLES",
    "SHORT_VARIABLES",
    "Api",
    "ApiKey",
    "Buckets",
    "CacheConfig",
    "Config",
    "EmbeddingsConfig",
    "EngineConfig",
    "GatewayConfig",
    "LedgerConfig",
    "LimitConfig",
    "Loaded",
    "OptimiserConfig",
    "PriceConfig",
    "RouteConfig",
    "SemanticConfig",
    "SemanticRouteConfig",
    "ServerConfig",
    "Setting",
    "Size",
    "UpstreamConfig",
    "api_keys",
    "check_upstream",
    "default_cache_dir",
    "format_size",
    "is_loopback",
    "ledger_path",
    "load",
    "parse_size",
    "settings",
    "shown",
    "upstream_key",
]
