"""What recorded requests cost by their providers' rules: each is charged in order of time, with estimated lengths."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

import msgspec

from anaphora import breakpoints, profiles
from anaphora.clock import ManualClock
from anaphora.lint.layout import Count, Layout, estimate, lay_out
from anaphora.lint.requests import Recorded
from anaphora.lint.sessions import in_time
from anaphora.profiles import prices
from anaphora.promises import Books
from anaphora.prompt import Lengths
from anaphora.types import Tenant

FIRST_TOKEN_S = 1.0
"""From a request to the moment at which others can read what it wrote (R22), where times were recorded."""


class Account(msgspec.Struct, frozen=True):
    """Prompt tokens of all requests by how they are billed."""

    read: int
    written: int
    plain: int
    usd: float | None
    """Of the prompts alone; None: some model's price is not known."""

    @property
    def total(self) -> int:
        return self.read + self.written + self.plain


def replay(recorded: Iterable[Recorded], like: str | None = None, count: Count = estimate) -> Account:
    books = Books(ManualClock())
    read = written = plain = 0
    usd: Decimal | None = Decimal(0)
    layouts = in_time([lay_out(one, count) for one in recorded])
    for number, layout in enumerate(layouts):
        dated = layout.recorded.time_s is not None
        started_s = layout.recorded.time_s if layout.recorded.time_s is not None else float(number)
        profile = profiles.find(layout.model, "anthropic" if layout.anthropic else "openai", like)
        tenant = Tenant(layout.recorded.tenant)
        charge = books.charge(tenant, layout.prompt(), profile, _lengths(layout), started_s)
        books.visible(charge, started_s + FIRST_TOKEN_S if dated else started_s)
        usage = charge.usage
        read, written, plain = read + usage.read, written + sum(usage.written.values()), plain + usage.plain
        cost = prices.cost(profile, usage, 0, model=layout.model)
        usd = usd + cost.input if usd is not None and cost is not None else None
    return Account(read, written, plain, float(usd) if usd is not None else None)


def _lengths(layout: Layout) -> Lengths:
    """With digests of every 128 tokens for the classic profiles: four bytes of a piece are a token, as in the estimate."""
    if layout.anthropic:
        return layout.lengths()
    tokens: list[int] = []
    for piece in layout.pieces:
        content = (piece.text or "").encode("utf-8", "surrogatepass") or piece.content
        whole = [int.from_bytes(content[start : start + 4], "little") for start in range(0, len(content), 4)]
        tokens += (whole + [0] * piece.tokens)[: piece.tokens]
    return Lengths(ends=layout.ends, total=layout.total, steps=breakpoints.steps(tokens))
