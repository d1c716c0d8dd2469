"""What each provider's prompt caching does, as data: one TOML file per provider, read once, on first use.

A profile is found by the model's name. The most specific pattern wins: the one with the most literal characters. A model that
no pattern matches (a local one) gets the generic profile of the dialect it is asked in, or one that was asked for by name
(`like`: "behave like claude-opus-5-5").

Rules go by family, money only by the very model: a price applies to the names a profile spells out and their dated
snapshots, so that no unlisted variant gets its sibling's price.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from importlib import resources
from typing import Literal

import msgspec

from anaphora.errors import ConfigError
from anaphora.prompt import TTL, Prompt
from anaphora.types import Sampling

Dialect = Literal["anthropic", "openai"]
Accounting = Literal["anthropic", "openai-classic", "openai-breakpoints"]

FILES = ("anthropic.toml", "openai.toml")
GENERIC: dict[Dialect, str] = {"anthropic": "anthropic", "openai": "openai-classic"}


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Multipliers on the input price."""

    read: Decimal = Decimal(1)
    write: dict[TTL, Decimal] = {}
    """Classes that are not named cost the plain input price."""


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """US dollars per million tokens. Beyond `above` prompt tokens the whole request costs more, not only the rest."""

    input: Decimal
    output: Decimal
    above: int | None = None
    above_input: Decimal = Decimal(1)
    above_output: Decimal = Decimal(1)


class Unsupported(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A field of the body that gets status 400, as `Prompt.options_given` names it."""

    field: str
    message: str
    code: str = "invalid_parameter"


class Refusal(msgspec.Struct, frozen=True):
    """What the answer with status 400 says."""

    message: str
    param: str
    code: str


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rules and prices of one model, or of one kind of model."""

    name: str
    provider: str
    dialect: Dialect
    accounting: Accounting
    minimum: int
    """Tokens: no shorter prefix is ever cached (R8, P1)."""
    match: tuple[str, ...] = ()
    """Patterns as in file names (`*`, `?`, `[6-9]`)."""
    generic: bool = False
    """Stands for a kind of model; no client asks for a model of this name."""
    ttls: tuple[TTL, ...] = ()
    """Lifetimes a client may ask for; the first is the default."""
    max_marks: int = 4
    lookback: int = 20
    """Positions one breakpoint looks at, itself included (R5); earlier message ends for `openai-breakpoints` (P3)."""
    collapse_tool_runs: bool = True
    """A run of tool calls, or of tool results, is one position (R6)."""
    keeps_thinking: bool = True
    """False: earlier thinking is stripped from the prompt once the user speaks again."""
    thinking_ahead: bool = False
    """Thinking and effort are rendered before the tools: changing them invalidates everything."""
    rejects_sampling: bool = False
    """temperature, top_p and top_k get 400 in every version of the API, from the provider's own model."""
    writes_dev_end: bool = False
    """Implicit mode also writes at the end of the initial developer messages (P8)."""
    explicit_first: int = 2
    explicit_latest: int = 50
    """Explicit marks that are looked up (P3): the first so many, and the latest."""
    step: int = 128
    """Classic: matches end at multiples of this, itself a multiple of 128."""
    retentions: tuple[str, ...] = ()
    """Accepted values of `prompt_cache_retention`."""
    idle_s: float = 600.0
    """Classic: seconds an entry lives without use."""
    longest_s: float = 3600.0
    """Classic: seconds an entry lives at most, however often it is used."""
    keys_per_minute: int | None = None
    """Requests a minute with one prefix and `prompt_cache_key` beyond which some go to another machine (P12). Advice only."""
    unsupported: tuple[Unsupported, ...] = ()
    rates: Rates = Rates()
    price: Price | None = None
    """None: not known here."""

    def refusal(self, prompt: Prompt) -> Refusal | None:
        """Why this model answers a prompt with 400: a caching field it does not have; None if it has them all."""
        for unsupported in self.unsupported:
            if unsupported.field in prompt.options_given:
                marked = (block.path for block in prompt.blocks if block.mark is not None)
                path = next(marked, None) if unsupported.field == "prompt_cache_breakpoint" else None
                param = unsupported.field if path is None else f"{path}.{unsupported.field}"
                return Refusal(unsupported.message, param, unsupported.code)
        if prompt.retention is not None and self.retentions and prompt.retention not in self.retentions:
            text = f"prompt_cache_retention '{prompt.retention}' is not supported on this model"
            return Refusal(text, "prompt_cache_retention", "invalid_parameter")
        return None

    def refused_sampling(self, sampling: Sampling) -> Refusal | None:
        """Why the provider's model answers with 400: a sampling parameter that it does not take, whatever its value."""
        for name in ("temperature", "top_p", "top_k") if self.rejects_sampling else ():
            if getattr(sampling, name) is not None:
                return Refusal(f"{name}: this parameter is not supported by {self.name}", name, "invalid_parameter")
        return None


def known() -> tuple[Profile, ...]:
    """Every profile that stands for a model clients can ask for, by name."""
    return tuple(sorted((p for p in _profiles().values() if not p.generic), key=lambda p: p.name))


@lru_cache(maxsize=1024)
def match(model: str) -> Profile | None:
    """The profile whose pattern fits `model` best, whatever the dialect; None if none fits."""
    name = _plain_name(model)
    found = [(_literal(p), profile) for profile in _profiles().values() for p in profile.match if fnmatchcase(name, p)]
    if not found:
        return None
    profile = max(found, key=lambda pair: pair[0])[1]
    return profile if _is_exactly(name, profile) else msgspec.structs.replace(profile, price=None)


def find(model: str, dialect: Dialect, like: str | Sequence[str] | None = None) -> Profile:
    """The profile of `model` when it is asked in `dialect`. Always one that speaks this dialect.

    `like` names models or profiles to behave like, at most one for each dialect; those of the other dialect are passed over.
    ConfigError: a name in `like` that nothing is known about.
    """
    for wanted in (like,) if isinstance(like, str) else like or ():
        profile = named(wanted)
        if profile.dialect == dialect:
            return profile
    found = match(model)
    return found if found is not None and found.dialect == dialect else _profiles()[GENERIC[dialect]]


def named(name: str) -> Profile:
    """The profile called `name`, or of the model `name`. ConfigError, with the nearest right spelling, if there is none."""
    found = _profiles().get(name) or match(name)
    if found is None:
        near = difflib.get_close_matches(name, _profiles(), n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"no caching profile for '{name}'.{hint} Known are: {', '.join(sorted(_profiles()))}")
    return found


@cache
def _profiles() -> dict[str, Profile]:
    folder = resources.files(__name__)
    return {name: profile for file in FILES for name, profile in load(folder.joinpath(file).read_text("utf-8")).items()}


def load(text: str) -> dict[str, Profile]:
    """The profiles of one file by name. Each starts from `base`, an earlier profile of the file, else from `[defaults]`.

    ConfigError: not TOML, a field that does not exist or has no such value, a base that does not come before.
    """
    try:
        raw = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"a file of caching profiles is not TOML: {error}") from error
    defaults: dict[str, object] = raw.get("defaults", {})
    bases: dict[str, dict[str, object]] = {}
    profiles: dict[str, Profile] = {}
    for entry in raw.get("profile", []):
        name, base = str(entry.get("name")), entry.pop("base", None)
        if base is not None and base not in bases:
            raise ConfigError(f"caching profile '{name}': base '{base}' does not come before it")
        inherited = {**bases[base], "generic": False} if base is not None else defaults
        bases[name] = merged = {**inherited, **entry}
        try:
            profile = msgspec.convert(merged, Profile)
        except msgspec.ValidationError as error:
            raise ConfigError(f"caching profile '{name}': {error}") from error
        if profile.step % 128:
            raise ConfigError(f"caching profile '{name}': step must be a multiple of 128")
        if profile.accounting != "openai-classic" and not profile.ttls:
            raise ConfigError(f"caching profile '{name}': it has breakpoints but no `ttls`")
        profiles[name] = profile
    return profiles


# "anthropic/claude-opus-4.5", "us.anthropic.claude-opus-4-5-v1:0", "claude-opus-4-5@20251101": one model on several platforms.
_PLATFORM = re.compile(r"^(?:[a-z]+\.)?anthropic\.|-v\d+(?::\d+)?$")


def _plain_name(model: str) -> str:
    name = _PLATFORM.sub("", model.lower().rpartition("/")[2]).replace("@", "-")
    return name.replace(".", "-") if name.startswith("claude-") else name


def _literal(pattern: str) -> tuple[int, bool]:
    """How specific a pattern is: its literal characters; of equals the one without a wildcard."""
    plain = re.sub(r"[*?]", "", re.sub(r"\[[^]]*\]", "x", pattern))
    return len(plain), plain == pattern


_SNAPSHOT = re.compile(r"-(?:\d{8}|\d{4}-\d{2}-\d{2}|latest)$")


def _is_exactly(name: str, profile: Profile) -> bool:
    plain = _SNAPSHOT.sub("", name)
    return plain == profile.name or name in profile.match or plain in profile.match
