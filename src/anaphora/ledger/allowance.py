"""Holds tenants to their limits: a place is reserved before anything is computed, and settled when it is known what it took.

So however many requests come at once, they cannot pass a limit by more than what the last one of them needs, and what the
others turn out to need beyond their estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Protocol

import msgspec

from anaphora.clock import Clock
from anaphora.config import LimitConfig
from anaphora.errors import LimitReached
from anaphora.ledger.book import Book
from anaphora.ledger.entry import units
from anaphora.ledger.joint import total
from anaphora.ledger.limits import (
    SPANS,
    Counts,
    Kind,
    Span,
    Standing,
    Used,
    began,
    spent,
    standings,
    start_s,
)
from anaphora.ledger.query import Query
from anaphora.ledger.shared import Away, Shared
from anaphora.ledger.tallies import Tallies
from anaphora.types import MediaPart, Request, TextPart, ThinkingPart, ToolResultPart, ToolUsePart, Usage

EVERYBODY = "*"
_CHARS_PER_TOKEN = 4
_OUTPUT_TOKENS = 1024
"""Reserved for an answer whose request sets no limit."""
_MOST_TOKENS = 10_000_000
"""Reserved for an answer, whatever limit its request sets."""
_MEDIA_TOKENS = 1024
_SOON_S = 1.0
"""When to come back where answers under way hold what is left."""
_REQUESTS: tuple[Kind, ...] = ("requests",)
_AMOUNTS: tuple[Kind, ...] = ("tokens", "usd")


class Estimating(Protocol):
    def estimate(self, model: str, usage: Usage) -> Decimal: ...


class Reservation(msgspec.Struct, frozen=True):
    tenant: str
    at_s: float
    shared_s: float
    """When that was by the clock of what servers share."""
    used: Used


class Allowance:
    """`limits` by tenant; that of `*` holds for each tenant without limits of its own. What is used of this server is in
    `tallies`; with `shared` the limits hold for what is used of all servers together, as long as that can be reached.

    `settle`, `spend` and `standings` may be called from any thread. For a tenant without limits nothing here suspends, nor
    without `shared` for any."""

    def __init__(
        self,
        limits: Sequence[LimitConfig],
        tallies: Tallies,
        prices: Estimating,
        clock: Clock,
        *,
        shared: Shared | None = None,
    ) -> None:
        self._limits = {limit.tenant: limit for limit in limits}
        self._tallies = tallies
        self._prices = prices
        self._clock = clock
        self._shared = shared
        self._reserved: dict[str, Reservation] = {}

    async def admit(self, tenant: str, *, costs: bool = False) -> None:
        """Count one request. Raises LimitReached instead where none is left; of one that `costs` what nobody can estimate, also
        where nothing is left of tokens or money."""
        limits = self._of(tenant)
        if limits is not None:
            await self._take(tenant, limits, Used(requests=1), _REQUESTS + _AMOUNTS if costs else _REQUESTS)

    async def reserve(self, request: Request, request_id: str) -> None:
        """What computing an answer may take. Raises LimitReached, and takes the request itself back, where nothing is left."""
        limits = self._of(request.tenant)
        if limits is None or not request_id:
            return
        used = self._estimate(request)
        try:
            at_s, shared_s = await self._take(request.tenant, limits, used, _AMOUNTS, holds=True)
        except LimitReached:
            self._spend(request.tenant, limits, Used(requests=-1))
            raise
        self._reserved[request_id] = Reservation(request.tenant, at_s, shared_s, used)

    def settle(self, request_id: str, tokens: int, paid: int) -> None:
        """It took so many tokens, and so much money in the ledger's units, in place of what was reserved."""
        reservation = self._reserved.pop(request_id, None)
        limits = None if reservation is None else self._of(reservation.tenant)
        if reservation is not None and limits is not None:
            tenant, reserved = reservation.tenant, reservation.used
            more = Used(0, tokens - reserved.tokens, paid - reserved.usd)
            self._charge(tenant, limits, more, reservation.at_s)
            if self._shared is not None:
                self._shared.tell(tenant, limits, reservation.shared_s, more, Used(0, -reserved.tokens, -reserved.usd))

    def spend(self, tenant: str, tokens: int, paid: int) -> None:
        limits = self._of(tenant)
        if limits is not None:
            self._spend(tenant, limits, Used(0, tokens, paid))

    def standings(self, tenant: str) -> tuple[Standing, ...]:
        """How it stands with each of its limits, as last heard; empty where it has none."""
        limits = self._of(tenant)
        if limits is None:
            return ()
        heard = None if self._shared is None else self._shared.counts(tenant)
        return standings(limits, *(heard or (self._tallies.read(tenant), self._clock.now_s())))

    async def aclose(self) -> None:
        if self._shared is not None:
            await self._shared.aclose()
        self._tallies.close()

    def _of(self, tenant: str) -> LimitConfig | None:
        return self._limits.get(tenant) or self._limits.get(EVERYBODY)

    async def _take(
        self, tenant: str, limits: LimitConfig, used: Used, kinds: tuple[Kind, ...], *, holds: bool = False
    ) -> tuple[float, float]:
        """Charge `used` if anything is left of each of `kinds`; when that was, by our clock and by that of what is shared."""

        def taken(counts: Counts, held: Used, now_s: float) -> Counts:
            reached = [at for at in standings(limits, counts, now_s) if at.kind in kinds and not at.remaining]
            if reached:
                raise _refusal(reached, held)
            return spent(limits, counts, used, now_s, now_s)

        if self._shared is not None:
            try:
                shared_s = await self._shared.take(tenant, limits, used, taken, holds=holds)
            except Away:
                pass
            else:
                now_s = self._clock.now_s()
                self._charge(tenant, limits, used, now_s)
                return now_s, shared_s
        now_s = self._clock.now_s()
        self._tallies.change(tenant, lambda counts: taken(counts, self._held(tenant), now_s))
        if self._shared is None:
            return now_s, now_s
        shared_s = self._shared.now_s()
        self._shared.tell(tenant, limits, shared_s, used, used if holds else Used())
        return now_s, shared_s

    def _spend(self, tenant: str, limits: LimitConfig, used: Used) -> None:
        """Just now."""
        self._charge(tenant, limits, used, self._clock.now_s())
        if self._shared is not None:
            self._shared.tell(tenant, limits, self._shared.now_s(), used)

    def _charge(self, tenant: str, limits: LimitConfig, used: Used, at_s: float) -> None:
        """What this server alone knows."""
        now_s = self._clock.now_s()
        self._tallies.change(tenant, lambda counts: spent(limits, counts, used, at_s, now_s))

    def _held(self, tenant: str) -> Used:
        """What is reserved for answers of this process under way."""
        under_way = list(self._reserved.values())  # which another thread may change
        return total(reservation.used for reservation in under_way if reservation.tenant == tenant)

    def _estimate(self, request: Request) -> Used:
        prompt = _num_tokens(request)
        output = min(_MOST_TOKENS, (_OUTPUT_TOKENS if request.max_tokens is None else request.max_tokens) * request.sampling.n)
        cost = self._prices.estimate(request.model, Usage(input_tokens=prompt, output_tokens=output))
        return Used(0, prompt + output, units(cost))


def _refusal(reached: Sequence[Standing], held: Used) -> LimitReached:
    longest = max(reached, key=lambda standing: standing.retry_s)
    if all(getattr(held, at.kind) > at.over for at in reached):
        text = f"What is left of the limit of {longest} is reserved for requests that are being answered."
        return LimitReached(text, retry_after_s=_SOON_S)
    return LimitReached(f"The limit of {longest} is reached.", retry_after_s=longest.retry_s)


def used_before(book: Book, now_s: float) -> Mapping[str, Counts]:
    """What each tenant used of the running hour, day and month, by the book."""
    used: dict[str, dict[Span, Used]] = {}
    for span in SPANS:
        for group in book.groups(("tenant",), Query(from_us=round(start_s(span, now_s) * 1e6))):
            sums = group.sums
            tokens = sums.input + sums.cache_read + sums.cache_write + sums.output
            used.setdefault(group.by["tenant"], {})[span] = Used(sums.num_requests, tokens, sums.paid)
    return {tenant: began(amounts, now_s) for tenant, amounts in used.items()}


def _num_tokens(request: Request) -> int:
    """About so many has the prompt."""
    if request.native is not None:
        return -(-len(request.native.body) // _CHARS_PER_TOKEN)
    num_chars = sum(len(prompt) * (1 if isinstance(prompt, str) else _CHARS_PER_TOKEN) for prompt in request.prompts)
    parts = [part for message in request.messages for part in message.content]
    parts += [inner for part in parts if isinstance(part, ToolResultPart) for inner in part.content]
    for part in parts:
        if isinstance(part, TextPart | ThinkingPart):
            num_chars += len(part.text)
        elif isinstance(part, ToolUsePart):
            num_chars += len(part.arguments)
        elif isinstance(part, MediaPart):
            num_chars += _MEDIA_TOKENS * _CHARS_PER_TOKEN
    num_chars += sum(len(tool.description) + len(str(tool.parameters)) for tool in request.tools)
    return -(-num_chars // _CHARS_PER_TOKEN)
