"""What tokens cost: the user's own file of prices first, then our profiles' prices, then the list of `genai-prices`.

A file of prices is TOML, in US dollars per million tokens; of several entries that fit a model the most specific holds:

    [[price]]
    model = "my-model-*"          # pattern
    upstream = "groq"             # pattern; default: any, the engine of this server included
    input = 0.50
    output = 1.50
    cache_read = 0.05             # default: as input
    cache_write = 0.625           # default: as input; also by lifetime: cache_write_5m, _30m, _1h, _12h
    above = [{ tokens = 200000, input = 1.00, output = 3.00 }]     # of the whole request, where its prompt is longer

What the engine of this server computes costs nothing unless that file says so. The emulator's models cost what they would.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import cast

import msgspec

from anaphora.errors import ConfigError
from anaphora.profiles import Profile, match
from anaphora.profiles.prices import PER_MTOK, Cost, cost, listed_cost
from anaphora.prompt import TTL, CacheUsage
from anaphora.types import Usage

_DECIMALS = 6
"""Of a price per million tokens: so that every token costs a whole number of the ledger's units."""
_FREE = Decimal(0)
_SPECIAL = ("audio_input", "audio_output", "image_input")
"""Kinds of tokens that our profiles have no prices for."""
_NUM_KNOWN = 4096


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """US dollars per million tokens. None: not said."""

    input: Decimal | None = None
    output: Decimal | None = None
    cache_read: Decimal | None = None
    cache_write: Decimal | None = None
    cache_write_5m: Decimal | None = None
    cache_write_30m: Decimal | None = None
    cache_write_1h: Decimal | None = None
    cache_write_12h: Decimal | None = None
    reasoning: Decimal | None = None
    audio_input: Decimal | None = None
    audio_output: Decimal | None = None
    image_input: Decimal | None = None


class Above(Rates, frozen=True, forbid_unknown_fields=True, kw_only=True):
    tokens: int


class Price(Rates, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: str
    upstream: str = "*"
    above: tuple[Above, ...] = ()

    def rates(self, prompt_tokens: int) -> Rates:
        """Those that hold for a prompt of this length."""
        base = {name: getattr(self, name) for name in Rates.__struct_fields__}
        for step in sorted(self.above, key=lambda step: step.tokens):
            if prompt_tokens > step.tokens:
                base |= {name: rate for name in Rates.__struct_fields__ if (rate := getattr(step, name)) is not None}
        return Rates(**base)


class Prices:
    """Of every model, from any thread. `addresses` are those of the upstreams by name; `emulates`: the engine of this server
    stands for the providers' models."""

    def __init__(
        self, own: tuple[Price, ...] = (), *, addresses: Mapping[str, str] | None = None, emulates: bool = False
    ) -> None:
        self._own = own
        self._addresses = dict(addresses or {})
        self._emulates = emulates
        self._find = lru_cache(maxsize=4096)(self._most_specific)
        self._known: dict[tuple[object, ...], Decimal | None] = {}

    def cost(self, model: str, upstream: str, usage: Usage) -> Decimal | None:
        """US dollars. None: nobody knows the price."""
        key = (
            model,
            upstream,
            usage.input_tokens,
            usage.output_tokens,
            usage.cache_read_input_tokens,
            usage.cache_creation_input_tokens,
            *usage.written.items(),
            *usage.details.items(),
        )
        if key in self._known:  # remembered answers come again and again
            return self._known[key]
        found, lasts = self._found(model, upstream, usage)
        if lasts:
            if len(self._known) >= _NUM_KNOWN:
                self._known.clear()
            self._known[key] = found
        return found

    def estimate(self, model: str, usage: Usage) -> Decimal:
        """What a request will cost about, before it is known who computes it. Immediate: no list has to be loaded."""
        own = self._find(model, "")
        if own is not None:
            return _by_rates(own.rates(usage.prompt_tokens), usage)
        profile = match(model) if self._emulates or self._addresses else None
        if profile is None or profile.price is None:
            return _FREE
        found = cost(profile, _by_lifetime(usage, profile), usage.output_tokens, model=model)
        return _FREE if found is None else found.total

    def _found(self, model: str, upstream: str, usage: Usage) -> tuple[Decimal | None, bool]:
        """And whether it is the same at every time of the day."""
        own = self._find(model, upstream)
        if own is not None:
            return _by_rates(own.rates(usage.prompt_tokens), usage), True
        profile = match(model)
        if not upstream and (not self._emulates or profile is None):
            return _FREE, True
        cached = _by_lifetime(usage, profile)
        special = {kind: usage.details[kind] for kind in _SPECIAL if usage.details.get(kind)}
        found: Cost | None = None
        if profile is not None and profile.price is not None and not special:
            charged = cost(profile, cached, usage.output_tokens, model=model)
            return None if charged is None else charged.total, True
        if profile is not None:
            found = listed_cost(model, cached, usage.output_tokens, provider=profile.provider, details=special)
        if found is None and (address := self._addresses.get(upstream)):
            found = listed_cost(model, cached, usage.output_tokens, address=address, details=special)
        return None if found is None else found.total, False

    def _most_specific(self, model: str, upstream: str) -> Price | None:
        fitting = [price for price in self._own if fnmatchcase(model, price.model) and fnmatchcase(upstream, price.upstream)]
        return max(fitting, key=lambda price: (_literal(price.model), _literal(price.upstream)), default=None)


def load(path: Path) -> tuple[Price, ...]:
    """The entries of a file of prices. Raises ConfigError, which names the entry."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except OSError as error:
        raise ConfigError(f"ledger.prices: {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"ledger.prices: {path} is not valid TOML: {error}") from error
    if unknown := raw.keys() - {"price"}:
        raise ConfigError(f"ledger.prices: {path}: unknown key {min(unknown)}; prices are [[price]] entries")
    prices = []
    for index, entry in enumerate(raw.get("price", [])):
        where = f"ledger.prices: {path}: price[{index}]"
        try:
            price = msgspec.convert(entry, Price)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}: {error}") from error
        if price.input is None or price.output is None:
            raise ConfigError(f"{where}: input and output are needed")
        _check(where, price, *price.above)
        prices.append(price)
    return tuple(prices)


def _check(where: str, *all_rates: Rates) -> None:
    for rates in all_rates:
        for name in Rates.__struct_fields__:
            rate = getattr(rates, name)
            if rate is not None and (not rate.is_finite() or rate < 0):
                raise ConfigError(f"{where}.{name}: a price is a number from 0 on, not {rate}")
            if rate is not None and rate != round(rate, _DECIMALS):
                raise ConfigError(f"{where}.{name}: {rate} has more than {_DECIMALS} decimals")


def _by_rates(rates: Rates, usage: Usage) -> Decimal:
    plain, out = rates.input or _FREE, rates.output or _FREE
    write = plain if rates.cache_write is None else rates.cache_write
    total = plain * usage.input_tokens + out * usage.output_tokens
    total += usage.cache_read_input_tokens * (plain if rates.cache_read is None else rates.cache_read)
    for lifetime, tokens in _written(usage).items():
        rate = getattr(rates, f"cache_write_{lifetime}", None)
        total += tokens * (write if rate is None else rate)
    for kind, whole in (("audio_input", plain), ("image_input", plain), ("audio_output", out), ("reasoning", out)):
        rate = getattr(rates, kind)
        if rate is not None:
            total += usage.details.get(kind, 0) * (rate - whole)
    return total / PER_MTOK


def _written(usage: Usage) -> dict[str, int]:
    """By lifetime; what no lifetime is known of is `other`."""
    other = usage.cache_creation_input_tokens - sum(usage.written.values())
    return {**usage.written, "other": other} if other else dict(usage.written)


def _by_lifetime(usage: Usage, profile: Profile | None) -> CacheUsage:
    """Writes whose lifetime was not said are of the one that a client gets without asking."""
    written = _written(usage)
    if other := written.pop("other", 0):
        default = profile.ttls[0] if profile is not None and profile.ttls else "5m"
        written[default] = written.get(default, 0) + other
    return CacheUsage(usage.input_tokens, usage.cache_read_input_tokens, cast("dict[TTL, int]", written))


def _literal(pattern: str) -> int:
    return len(re.sub(r"[*?]", "", re.sub(r"\[[^]]*\]", "x", pattern)))
