"""Where each value comes from: flag, environment, file, default, in this order."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from anaphora.config.checking import check
from anaphora.config.sections import (
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
    RouteConfig,
    SemanticConfig,
    SemanticRouteConfig,
    ServerConfig,
    Size,
    UpstreamConfig,
)
from anaphora.config.sizes import parse_size
from anaphora.errors import ConfigError


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
    check(config, environ)
    return Loaded(config, sources, tuple(_unknown_variables(environ, config)))


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
