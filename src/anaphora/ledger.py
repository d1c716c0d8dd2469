"""What was spent and what was saved, per tenant, in tokens and seconds, since the process started. Fed with events."""

from __future__ import annotations

import msgspec

from anaphora.events import Answered, Computed, Event
from anaphora.types import Tenant


class Account(msgspec.Struct):
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


class Ledger:
    def __init__(self) -> None:
        self._accounts: dict[Tenant, Account] = {}

    def record(self, event: Event) -> None:
        """Takes every event; most do not concern it."""
        if isinstance(event, Answered):
            self._answered(self._of(event.tenant), event)
        elif isinstance(event, Computed):
            self._computed(self._of(event.tenant), event)

    def accounts(self) -> dict[Tenant, Account]:
        """The accounts as they are now; not to be changed."""
        return self._accounts

    def account(self, tenant: Tenant) -> Account:
        return self._accounts.get(tenant, Account())

    def total(self) -> Account:
        """All tenants together."""
        total = Account()
        for account in self._accounts.values():
            for field in Account.__struct_fields__:
                setattr(total, field, getattr(total, field) + getattr(account, field))
        return total

    def _of(self, tenant: Tenant) -> Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account()
        return account

    def _answered(self, account: Account, event: Answered) -> None:
        account.num_requests += 1
        account.num_failed += event.outcome == "failed"
        account.num_left += event.outcome == "left"
        if event.outcome != "finished" or event.source not in ("hit", "collapsed"):
            return
        account.num_hits += event.source == "hit"
        account.num_collapsed += event.source == "collapsed"
        account.saved_input_tokens += event.usage.prompt_tokens
        account.saved_output_tokens += event.usage.output_tokens
        account.saved_s += event.saved_s

    def _computed(self, account: Account, event: Computed) -> None:
        account.num_computed += 1
        account.computed_input_tokens += event.usage.prompt_tokens - event.usage.kv_reused_tokens
        account.computed_output_tokens += event.usage.output_tokens
        account.computed_s += event.compute_s
        account.kv_reused_tokens += event.usage.kv_reused_tokens
