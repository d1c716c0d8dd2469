"""One request as the ledger keeps it: tokens, times, and money in whole units. Pure.

What a request was charged is `paid`. What it saved is never said twice: an answer that was remembered, or shared, saves what
computing it would have been charged, reads of prompt caches included; a computed answer saves what its reads of prompt caches
cost less than plain input, less what writing them cost more. What was only computed to be remembered (`refresh`) would not
have been paid without remembering: that its savings take back.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from typing import Literal, Protocol

import msgspec

from anaphora.events import Answered
from anaphora.types import Usage

PER_USD = 10**12
"""Units of money in one US dollar. A token at a price of six decimals per million tokens is a whole number of them."""

LIFETIMES = ("5m", "30m", "1h", "12h")
REFRESH = "refresh"
NO_USAGE = Usage()
_MOST_TOKENS = 10**9
_MOST_UNITS = 2**62
"""Of one request: what the book has a place for."""


class Pricing(Protocol):
    def cost(self, model: str, upstream: str, usage: Usage) -> Decimal | None:
        """US dollars; None where nobody knows the price."""
        ...


class Entry(msgspec.Struct, array_like=True):
    """One row of the book. Tokens are those that were charged: none of an answer that was not computed for this request."""

    at_us: int
    """When it was over: Unix time in microseconds."""
    request_id: str
    tenant: str
    workspace: str
    tag: str
    asked: str
    """The model, as the client named it."""
    model: str
    """The model, as whoever answered names it."""
    upstream: str
    level: str
    """Who answered: a level of memory (`exact`, `embedding`), `collapsed` (another request's computation), `computed`,
    `bypass`, `passed` (not understood here, only passed on); `audit`: computed to see whether a remembered answer to the same
    question in other words would have been right. `refresh`: nobody was answered, but an answer past its lifetime, which
    somebody was given, was computed anew. It is no request."""
    outcome: Literal["finished", "failed", "left"]
    input: int = 0
    """Tokens of the prompt at the plain price; those read and written are counted apart."""
    cache_read: int = 0
    write_5m: int = 0
    write_30m: int = 0
    write_1h: int = 0
    write_12h: int = 0
    write_other: int = 0
    output: int = 0
    reasoning: int = 0
    """Among `output`."""
    audio_input: int = 0
    audio_output: int = 0
    image_input: int = 0
    saved_input: int = 0
    """Tokens of the prompt of an answer that was not computed, whatever they would have been read from."""
    saved_output: int = 0
    estimated: int = 0
    """1: cut before its tokens were counted, so some of them are a guess."""
    off: int = 0
    """Prompt tokens by our own rules, less those by the upstream's own count, which is the one that holds."""
    first_us: int | None = None
    whole_us: int = 0
    priced: int = 1
    """0: nobody knows the price, or how many tokens there were, and the amounts below are zero."""
    paid: int = 0
    saved_answers: int = 0
    saved_prompts: int = 0

    @property
    def prompt(self) -> int:
        """All prompt tokens that were charged."""
        written = self.write_5m + self.write_30m + self.write_1h + self.write_12h + self.write_other
        return self.input + self.cache_read + written

    @property
    def tokens(self) -> int:
        return self.prompt + self.output


def entry(event: Answered, at_s: float, pricing: Pricing, computed: Usage | None = None) -> Entry:
    """`computed` is what the backend said in the end of a computation whose first client had left by then."""
    made = Entry(
        at_us=round(at_s * 1e6),
        request_id=event.request_id,
        tenant=event.tenant,
        workspace=event.workspace,
        tag=event.tag,
        asked=event.asked or event.model,
        model=event.answered or event.model,
        upstream=event.upstream,
        level=_level(event),
        outcome=event.outcome,
        first_us=None if event.first_s is None else round(event.first_s * 1e6),
        whole_us=round(event.elapsed_s * 1e6),
    )
    if event.refresh:
        made.first_us, made.whole_us = None, 0
    if event.source in ("hit", "collapsed"):
        if event.outcome == "finished" and not event.refresh:
            _save(made, event.usage if event.upstream or event.billed is None else event.billed, pricing)
        return made
    if event.outcome == "finished":
        usage = event.usage
        if event.billed is not None and not event.upstream:
            usage = msgspec.structs.replace(event.billed, details=usage.details)
        elif event.billed is not None:
            made.off = event.billed.prompt_tokens - usage.prompt_tokens
    else:
        usage = computed or event.begun or NO_USAGE
        made.estimated = int(computed is None and usage != NO_USAGE)
    charge(made, usage, pricing)
    if event.known is not None and event.outcome == "finished":
        _save(made, event.known, pricing)
    unsaid = event.source == "passed" and event.begun is not None  # broken off before its end
    if unsaid or (event.upstream and event.outcome == "finished" and not usage.prompt_tokens):
        made.priced = 0  # the upstream did not say what it took: not that it took nothing
    return made


def charge(made: Entry, usage: Usage, pricing: Pricing) -> None:
    """Write down that `usage` was computed for this request."""
    if not _credible(usage):
        made.priced = 0
        return
    details = usage.details
    lifetimes = [usage.written.get(lifetime, 0) for lifetime in LIFETIMES]
    made.input, made.cache_read, made.output = usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens
    made.write_5m, made.write_30m, made.write_1h, made.write_12h = lifetimes
    made.write_other = usage.cache_creation_input_tokens - sum(lifetimes)
    made.reasoning = details.get("reasoning", 0)
    made.audio_input, made.audio_output = details.get("audio_input", 0), details.get("audio_output", 0)
    made.image_input = details.get("image_input", 0)
    if usage == NO_USAGE:
        return
    cost, plain = _units(made, usage, pricing), _units(made, uncached(usage), pricing)
    if cost is None or plain is None:
        made.priced, made.paid, made.saved_prompts, made.saved_answers = 0, 0, 0, 0
    elif made.level == REFRESH:
        made.paid, made.saved_answers = cost, -cost  # without an answer cache nobody would have computed it
    else:
        made.paid, made.saved_prompts = cost, plain - cost


def _save(made: Entry, usage: Usage, pricing: Pricing) -> None:
    if not _credible(usage):
        made.priced = 0
        return
    made.saved_input, made.saved_output = usage.prompt_tokens, usage.output_tokens
    cost = _units(made, usage, pricing)
    if cost is None:
        made.priced = 0
    else:
        made.saved_answers = cost


def _credible(usage: Usage) -> bool:
    """Whether an upstream may have meant what it says. One that tells nonsense must not spoil the sums."""
    counts = (usage.input_tokens, usage.output_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens)
    return all(0 <= count <= _MOST_TOKENS for count in (*counts, *usage.written.values(), *usage.details.values()))


def _units(made: Entry, usage: Usage, pricing: Pricing) -> int | None:
    cost = pricing.cost(made.model, made.upstream, usage)
    amount = None if cost is None else units(cost)
    return None if amount is None or abs(amount) > _MOST_UNITS else amount


def _level(event: Answered) -> str:
    if event.refresh:
        return REFRESH
    if event.source == "hit":
        return event.level or "exact"
    if event.source == "miss":
        return "audit" if event.audit else "computed"
    return event.source


def uncached(usage: Usage) -> Usage:
    """The same with nothing read and nothing written."""
    return Usage(input_tokens=usage.prompt_tokens, output_tokens=usage.output_tokens, details=usage.details)


def units(usd: Decimal) -> int:
    return int((usd * PER_USD).to_integral_value(ROUND_HALF_EVEN))


def usd(amount: int) -> Decimal:
    """US dollars, exactly."""
    return Decimal(amount).scaleb(-12)


def usd_text(amount: int) -> str:
    """US dollars as plain digits: "0.0001125"."""
    text = f"{usd(amount):f}"
    return text.rstrip("0").rstrip(".") or "0"
