"""What one setting demands of another, and of the world: keys that are there, addresses that are some."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

from anaphora.config.sections import Config, GatewayConfig, LedgerConfig, LimitConfig, UpstreamConfig
from anaphora.errors import ConfigError
from anaphora.types import Owner, Tenant


def check(config: Config, environ: Mapping[str, str]) -> None:
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
    if config.ledger.share_limits and not config.cache.shared:
        raise ConfigError("ledger.share_limits: servers share limits on a Valkey or Redis server; set cache.shared")
    if config.ledger.share_limits and config.server.virtual_clock:
        raise ConfigError("ledger.share_limits: limits that servers share go by the time of day, not by a virtual clock")
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


def is_loopback(host: str) -> bool:
    """True where only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
