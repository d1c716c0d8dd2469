"""What a request costs, in exact decimals. Our own table knows what no public one does (12h writes, rates per lifetime);
models it does not list are looked up in the `genai-prices` package where that is installed (extra `prices`).

Nothing here asks the network. A model nobody has a price for costs None, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

import msgspec

from anaphora.profiles import Profile, match
from anaphora.prompt import CacheUsage

PER_MTOK = Decimal(1_000_000)


class Cost(msgspec.Struct, frozen=True):
    """US dollars."""

    input: Decimal
    output: Decimal

    @property
    def total(self) -> Decimal:
        return self.input + self.output


def cost(profile: Profile, usage: CacheUsage, output_tokens: int, *, model: str, factor: Decimal = Decimal(1)) -> Cost | None:
    """What the provider would charge for `usage` and the answer; None if nobody knows the price.

    `factor` is for what multiplies everything: 0.5 for batches, 1.1 for a chosen region. `model`, as the client named it,
    is looked up in `genai-prices` where the profile has no price of its own.
    """
    if profile.price is None:
        return _public_cost(profile, usage, output_tokens, model, factor)
    price, rates = profile.price, profile.rates
    dear = price.above is not None and total(usage) > price.above
    per_input = price.input * (price.above_input if dear else 1) * factor / PER_MTOK
    per_output = price.output * (price.above_output if dear else 1) * factor / PER_MTOK
    weighted = Decimal(usage.plain) + rates.read * usage.read
    for ttl, tokens in usage.written.items():
        weighted += rates.write.get(ttl, Decimal(1)) * tokens
    return Cost(input=weighted * per_input, output=output_tokens * per_output)


def uncached(usage: CacheUsage) -> CacheUsage:
    """The same prompt with nothing read and nothing written: what caching is to be compared with."""
    return CacheUsage(plain=total(usage))


def total(usage: CacheUsage) -> int:
    return usage.plain + usage.read + sum(usage.written.values())


def _public_cost(profile: Profile, usage: CacheUsage, output_tokens: int, model: str, factor: Decimal) -> Cost | None:
    if match(model) is None:
        return None  # a model of one's own, whatever others charge for running it
    found = listed_cost(model, usage, output_tokens, provider=profile.provider)
    return None if found is None else Cost(found.input * factor, found.output * factor)


def listed_cost(
    model: str,
    usage: CacheUsage,
    output_tokens: int,
    *,
    provider: str | None = None,
    address: str | None = None,
    details: Mapping[str, int] | None = None,
) -> Cost | None:
    """By the list of `genai-prices`, for the provider called `provider`, or the one whose API is at `address`. `details` are
    kinds of tokens among those of `usage` and of the output, as in `types.Usage`."""
    # Half a second to import, so only when asked for a model that our own table lacks.
    try:
        import genai_prices
    except ImportError:
        return None
    kinds = details or {}
    counts = {
        "input_tokens": total(usage),
        "output_tokens": output_tokens,
        "cache_read_tokens": usage.read,
        "cache_write_tokens": sum(usage.written.values()),
        "cache_write_1h_tokens": usage.written.get("1h", 0),
        "input_audio_tokens": kinds.get("audio_input", 0),
        "output_audio_tokens": kinds.get("audio_output", 0),
        "input_image_tokens": kinds.get("image_input", 0),
    }
    told = genai_prices.Usage(**{name: count for name, count in counts.items() if count})
    try:
        if address is not None:
            found = genai_prices.calc_price(told, model_ref=model, provider_api_url=address)
        else:
            found = genai_prices.calc_price(told, model_ref=model, provider_id=provider)
    except (LookupError, ValueError):  # not listed, or counts that contradict each other
        return None
    return Cost(input=found.input_price, output=found.output_price)
