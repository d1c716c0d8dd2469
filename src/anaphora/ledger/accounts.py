"""What was spent and what was saved, per tenant, in tokens and seconds, since the server started. Fed with events."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from anaphora.events import Answered, Billed, Computed, Event
from anaphora.sums import Sums
from anaphora.types import Tenant


class Account(msgspec.Struct, frozen=True):
    """Sums of one tenant. `saved_*` is what hits and collapsed requests would have cost; `computed_*` what was paid for."""

    num_requests: int = 0
    num_hits: int = 0
    num_collapsed: int = 0
    num_failed: int = 0
    num_left: int = 0
    num_computed: int = 0
    computed_input_tokens: int = 0
    computed_output_tokens: int = 0
    computed_s: float = 0.0
    kv_reused_tokens: int = 0
    saved_input_tokens: int = 0
    saved_output_tokens: int = 0
    saved_s: float = 0.0


class PromptCaching(msgspec.Struct, frozen=True):
    """Prompt tokens of one tenant, by the rules of the models' providers, and how many prompts missed for which reason."""

    read_tokens: int = 0
    written_tokens: int = 0
    plain_tokens: int = 0
    misses: dict[str, int] = {}


_PLACES = {name: place for place, name in enumerate(Account.__struct_fields__)}


class Ledger:
    """Adds to `sums`, which several gateway processes may share."""

    concerns = (Answered, Computed, Billed)

    def __init__(self, sums: Sums | None = None) -> None:
        self._sums = Sums() if sums is None else sums

    def record(self, event: Event) -> None:
        """Takes every event; most do not concern it."""
        if isinstance(event, Answered):
            self._answered(event)
        elif isinstance(event, Computed):
            self._computed(event)
        elif isinstance(event, Billed):
            self._billed(event)

    def accounts(self) -> dict[Tenant, Account]:
        """The accounts as they are now."""
        return {Tenant(tenant): _account(cells) for (tenant,), cells in self._totals().items()}

    def account(self, tenant: Tenant) -> Account:
        return self.accounts().get(tenant, Account())

    def total(self) -> Account:
        """All tenants together."""
        return _account([sum(cells) for cells in zip(*self._totals().values(), strict=True)])

    def prompt_caching(self, tenant: Tenant) -> PromptCaching:
        totals = self._sums.totals()
        read, written, plain = totals.get("billed", {}).get((tenant,), (0, 0, 0))
        misses = {reason: int(cells[0]) for (whose, reason), cells in totals.get("unread", {}).items() if whose == tenant}
        return PromptCaching(int(read), int(written), int(plain), misses)

    def _totals(self) -> dict[tuple[str, ...], list[float]]:
        return self._sums.totals().get("account", {})

    def _answered(self, event: Answered) -> None:
        outcome = event.outcome
        if outcome != "finished":
            self._add(event.tenant, num_requests=1, num_failed=outcome == "failed", num_left=outcome == "left")
            return
        source, usage = event.source, event.usage
        if source == "passed":
            tokens = {"computed_input_tokens": usage.prompt_tokens, "computed_output_tokens": usage.output_tokens}
            self._add(event.tenant, num_requests=1, num_computed=1, computed_s=event.elapsed_s, **tokens)
            return
        if source not in ("hit", "collapsed"):
            known = 0 if event.known is None else event.known.prompt_tokens
            self._add(event.tenant, num_requests=1, saved_input_tokens=known, saved_s=event.saved_s if known else 0.0)
            return
        self._add(
            event.tenant,
            num_requests=1,
            num_hits=source == "hit",
            num_collapsed=source == "collapsed",
            saved_input_tokens=usage.prompt_tokens,
            saved_output_tokens=usage.output_tokens,
            saved_s=event.saved_s,
        )

    def _computed(self, event: Computed) -> None:
        usage = event.usage
        self._add(
            event.tenant,
            num_computed=1,
            computed_input_tokens=usage.prompt_tokens - usage.kv_reused_tokens,
            computed_output_tokens=usage.output_tokens,
            computed_s=event.compute_s,
            kv_reused_tokens=usage.kv_reused_tokens,
        )

    def _billed(self, event: Billed) -> None:
        row = self._sums.row(("billed", event.tenant), 3)
        cells = self._sums.cells
        cells[row] += event.read_tokens
        cells[row + 1] += event.written_tokens
        cells[row + 2] += event.plain_tokens
        if event.miss:
            row = self._sums.row(("unread", event.tenant, event.miss))
            self._sums.cells[row] += 1

    def _add(self, tenant: Tenant, **amounts: float) -> None:
        row = self._sums.row(("account", tenant), len(_PLACES))
        cells = self._sums.cells
        for name, amount in amounts.items():
            cells[row + _PLACES[name]] += amount


def _account(cells: Sequence[float]) -> Account:
    """Counts are whole numbers, times are not: as the fields' defaults say. Without any cells: nothing."""
    return Account(*[type(zero)(cell) for zero, cell in zip(Account.__struct_defaults__, cells, strict=False)])
