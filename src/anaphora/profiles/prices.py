"""What a request costs, in exact decimals. Our own table knows what no public one does (12h writes, rates per lifetime);
models it does not list are looked up in the `genai-prices` package where that is installed (extra `prices`).

Nothing here asks the network. A model nobody has a price for costs None, never 0.
"""

from __future__ import annotations

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
    # Half a second to import, so only when asked for a model that our own table lacks.
    try:
        import genai_prices
    except ImportError:
        return None
    hour, written = usage.written.get("1h", 0), sum(usage.written.values())
    counts = genai_prices.Usage(
        input_tokens=total(usage),
        output_tokens=output_tokens,
        cache_read_tokens=usage.read,
        cache_write_tokens=written,
        cache_write_1h_tokens=hour,
    )
    try:
        found = genai_prices.calc_price(counts, model_ref=model, provider_id=profile.provider)
    except LookupError:
        return None
    return Cost(input=found.input_price * factor, output=found.output_price * factor)
