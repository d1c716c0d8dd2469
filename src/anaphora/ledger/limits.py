"""What tenants may use, and how much of it is left. Pure: a tenant's counts are a tuple of whole numbers.

Rates per minute are buckets that fill up all the time, as the providers' are: after a pause a whole minute's worth may come at
once. Budgets are of the hour, day and month in UTC. A request is let in while anything is left of everything; the last one may
end beyond. The counts hold what is reserved for requests under way as well as what was used.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Literal

import msgspec

from anaphora.config import LimitConfig
from anaphora.ledger.entry import units, usd_text

Kind = Literal["requests", "tokens", "usd"]
Span = Literal["minute", "hour", "day", "month"]
Counts = tuple[int, ...]

SPANS: tuple[Span, ...] = ("hour", "day", "month")
KINDS: tuple[Kind, ...] = ("requests", "tokens", "usd")
_RATED: tuple[Kind, ...] = ("requests", "tokens")
NOTHING: Counts = (0,) * (len(_RATED) + len(SPANS) * (1 + len(KINDS)))
"""For each rate the moment (in ns) at which its bucket is full again; for each budget which hour, day or month it is, and what
was used in it: requests, tokens, money in the ledger's units."""
_MINUTE_NS = 60 * 10**9
_MOST = 2**62
"""A count that gets there stays there: it has a place of 64 bits."""


class Used(msgspec.Struct, frozen=True):
    """May be negative: less than was said before. `usd` is money in the ledger's units."""

    requests: int = 0
    tokens: int = 0
    usd: int = 0


class Standing(msgspec.Struct, frozen=True):
    """How one tenant stands with one limit."""

    kind: Kind
    span: Span
    limit: int
    remaining: int
    """Never below zero."""
    reset_s: float
    """From now until everything is there again."""
    retry_s: float
    """From now until something is."""
    over: int = 0
    """How much beyond the limit."""

    def __str__(self) -> str:
        amount = f"${usd_text(self.limit)}" if self.kind == "usd" else f"{self.limit:,} {self.kind}"
        return f"{amount} per {self.span}"


def standings(limits: LimitConfig, counts: Counts, now_s: float) -> tuple[Standing, ...]:
    """One for each limit that is set."""
    found: list[Standing] = []
    now_ns = round(now_s * 1e9)
    for place, kind in enumerate(_RATED):
        limit = _limit(limits, kind, "minute")
        if limit is not None:
            debt_ns = max(0, counts[place] - now_ns)
            left = (_MINUTE_NS - debt_ns) * limit // _MINUTE_NS
            retry_s = 0.0 if left > 0 else (debt_ns + _span_ns(1, limit) - _MINUTE_NS) / 1e9
            found.append(Standing(kind, "minute", limit, max(0, left), debt_ns / 1e9, retry_s, max(0, -left)))
    for span, same, used in _windows(counts, now_s):
        left_s = _end_s(span, now_s) - now_s
        for kind in KINDS:
            limit = _limit(limits, kind, span)
            if limit is not None:
                left = limit - (getattr(used, kind) if same else 0)
                retry_s = 0.0 if left > 0 else left_s
                found.append(Standing(kind, span, limit, max(0, left), left_s, retry_s, max(0, -left)))
    return tuple(found)


def spent(limits: LimitConfig, counts: Counts, used: Used, at_s: float, now_s: float) -> Counts:
    """`counts` with what was `used` by a request of the moment `at_s`: a correction of what an earlier hour, day or month was
    charged is no matter of this one."""
    now_ns = round(now_s * 1e9)
    changed = []
    for place, kind in enumerate(_RATED):
        limit, full_ns = _limit(limits, kind, "minute"), counts[place]
        amount = getattr(used, kind)
        if limit is not None and amount:
            full_ns = min(_MOST, (max(full_ns, now_ns) if amount > 0 else full_ns) + _span_ns(amount, limit))
        changed.append(full_ns)
    for span, same, before in _windows(counts, now_s):
        window = _window(span, now_s)
        base = before if same else Used()
        adds = used if _window(span, at_s) == window else Used()
        changed.append(window)
        changed += [max(-_MOST, min(_MOST, getattr(base, kind) + getattr(adds, kind))) for kind in KINDS]
    return tuple(changed)


def began(used: dict[Span, Used], now_s: float) -> Counts:
    """The counts of a tenant who used so much of the running hour, day and month."""
    counts = list(NOTHING[: len(_RATED)])
    for span in SPANS:
        amounts = used.get(span, Used())
        counts += [_window(span, now_s), amounts.requests, amounts.tokens, amounts.usd]
    return tuple(counts)


def joined(counts: Counts, more: Counts, now_s: float) -> Counts:
    """`counts` with what `more` says was used of the running hour, day and month as well; rates are those of `counts`."""
    changed = list(counts[: len(_RATED)])
    for (span, same, before), (_, running, adds) in zip(_windows(counts, now_s), _windows(more, now_s), strict=True):
        changed.append(_window(span, now_s))
        for kind in KINDS:
            amount = (getattr(before, kind) if same else 0) + (getattr(adds, kind) if running else 0)
            changed.append(max(-_MOST, min(_MOST, amount)))
    return tuple(changed)


def start_s(span: Span, now_s: float) -> float:
    """When the running hour, day or month began."""
    moment = datetime.fromtimestamp(now_s, UTC).replace(minute=0, second=0, microsecond=0)
    if span != "hour":
        moment = moment.replace(hour=0)
    return (moment.replace(day=1) if span == "month" else moment).timestamp()


def _limit(limits: LimitConfig, kind: Kind, span: Span) -> int | None:
    limit = getattr(limits, f"{kind}_per_{span}")
    return None if limit is None else units(limit) if kind == "usd" else int(limit)


def _span_ns(amount: int, per_minute: int) -> int:
    """How long a bucket takes to get `amount` back. The same for a charge and for taking it back."""
    span_ns = abs(amount) * _MINUTE_NS // per_minute
    return span_ns if amount > 0 else -span_ns


def _windows(counts: Counts, now_s: float) -> Iterator[tuple[Span, bool, Used]]:
    """(span, whether `counts` are about the running one, what they say)."""
    place = len(_RATED)
    for span in SPANS:
        window, *amounts = counts[place : place + 1 + len(KINDS)]
        yield span, window == _window(span, now_s), Used(*amounts)
        place += 1 + len(KINDS)


def _window(span: Span, at_s: float) -> int:
    """A number of its own for every hour, day and month."""
    if span == "hour":
        return int(at_s // 3600)
    if span == "day":
        return int(at_s // 86_400)
    moment = datetime.fromtimestamp(at_s, UTC)
    return moment.year * 12 + moment.month


def _end_s(span: Span, now_s: float) -> float:
    if span == "hour":
        return (now_s // 3600 + 1) * 3600
    if span == "day":
        return (now_s // 86_400 + 1) * 86_400
    moment = datetime.fromtimestamp(now_s, UTC)
    years, month = divmod(moment.month, 12)
    return datetime(moment.year + years, month + 1, 1, tzinfo=UTC).timestamp()
