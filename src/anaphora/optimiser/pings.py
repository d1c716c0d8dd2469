"""Whether to keep an entry alive that nobody asks for just now: a read in time costs little and is paid each time. Pure.

A ping is the last request once more, with no answer wanted (`max_tokens: 0`, `prewarm`). It pays where the chance that somebody
asks within the next lifetime, times what a write costs more than a read, is above the price of the read: 9 % at Anthropic's.
"""

from __future__ import annotations

from decimal import Decimal

import msgspec

from anaphora.optimiser.chances import within
from anaphora.optimiser.history import History
from anaphora.optimiser.placing import rates_of
from anaphora.profiles import Profile
from anaphora.prompt import TTL_S, Lengths, Prompt

MARGIN_S = 20.0
"""Before an entry's end: early enough for the ping to arrive, late enough not to be in vain."""


class Ping(msgspec.Struct, frozen=True):
    due: bool
    reason: str
    again_s: float | None = None
    """When to look again; None: never, the entry is given up."""
    tokens: int = 0
    """What the ping costs, in tokens at the plain price,"""
    gain: int = 0
    """and what it is expected to save beyond that."""
    usd: Decimal | None = None
    """What it costs in money; None: the price is not known."""


def ping_due(
    prompt: Prompt,
    lengths: Lengths,
    profile: Profile,
    history: History,
    *,
    asked_s: float,
    now_s: float,
    budget_tokens: float,
) -> Ping:
    """For a prompt that was last asked at `asked_s`. `budget_tokens`: what may still be spent, at the plain price."""
    if profile.accounting == "openai-classic":
        return Ping(False, "nothing is promised here, and nothing is paid for a write")
    known = history.know(prompt, profile, now_s)
    if not known.alive:
        return Ping(False, "the entry is gone")
    block = known.alive[-1]
    entry, tokens = history.entry(known.names[block]), lengths.ends[block]
    if now_s < entry.expires_s - MARGIN_S:
        return Ping(False, "not yet", entry.expires_s - MARGIN_S)
    rates, since_s = rates_of(profile), now_s - asked_s
    chance = within(history.hazards(prompt, known)[block], since_s + TTL_S[entry.ttl], since_s)
    cost = rates.read * tokens
    gain = chance * (rates.write - rates.read) * tokens - cost
    price = profile.price
    usd = None if price is None else price.input * Decimal(round(cost)) / 1_000_000
    words = f"a chance of {chance:.1%} to be asked for in the next {entry.ttl}"
    if gain <= 0:
        return Ping(False, f"{words} is not worth a read", None, round(cost), round(gain), usd)
    if cost > budget_tokens:
        return Ping(False, f"{words} would pay, but the budget is spent", None, round(cost), round(gain), usd)
    return Ping(True, words, now_s + TTL_S[entry.ttl] - MARGIN_S, round(cost), round(gain), usd)
