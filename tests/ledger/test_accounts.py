"""What was spent and saved, per tenant, from events."""

from __future__ import annotations

from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from anaphora.events import Answered, Billed, Computed, Event
from anaphora.ledger.accounts import Account, Ledger, PromptCaching
from anaphora.types import Tenant, Usage

A, B = Tenant("a"), Tenant("b")
USAGE = Usage(input_tokens=4, output_tokens=3, cache_read_input_tokens=6, kv_reused_tokens=6)


def answered(
    tenant: Tenant,
    source: Literal["hit", "miss", "collapsed", "bypass"],
    outcome: Literal["finished", "failed", "left"] = "finished",
    saved_s: float = 0.0,
) -> Answered:
    return Answered(tenant, "m", source, outcome, USAGE, ("end_turn",), 1.0, 0.5, saved_s=saved_s)


def test_a_computation_is_spent_and_a_hit_is_saved() -> None:
    ledger = Ledger()
    for event in (Computed(A, "m", USAGE, 2.0), answered(A, "miss"), answered(A, "hit", saved_s=2.0)):
        ledger.record(event)
    assert ledger.account(A) == Account(
        num_requests=2,
        num_hits=1,
        num_computed=1,
        computed_input_tokens=4,
        computed_output_tokens=3,
        computed_s=2.0,
        kv_reused_tokens=6,
        saved_input_tokens=10,
        saved_output_tokens=3,
        saved_s=2.0,
    )


def test_what_failed_or_was_left_saved_nothing() -> None:
    ledger = Ledger()
    ledger.record(answered(A, "collapsed", "failed", 2.0))
    ledger.record(answered(A, "collapsed", "left", 2.0))
    assert ledger.account(A) == Account(num_requests=2, num_failed=1, num_left=1)


sources = st.sampled_from(["hit", "miss", "collapsed", "bypass"])
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(answered, st.sampled_from([A, B]), sources, st.sampled_from(["finished", "failed", "left"])),
    st.builds(Computed, st.sampled_from([A, B]), st.just("m"), st.just(USAGE), st.just(1.0)),
)


@given(st.lists(events))
def test_tenants_are_kept_apart_and_add_up(happened: list[Event]) -> None:
    both, separate = Ledger(), {A: Ledger(), B: Ledger()}
    for event in happened:
        both.record(event)
        assert isinstance(event, Answered | Computed)
        separate[event.tenant].record(event)
    assert both.account(A) == separate[A].total()
    assert both.account(B) == separate[B].total()
    assert both.total().num_requests == sum(isinstance(event, Answered) for event in happened)


def test_prompt_tokens_and_misses_are_kept_per_tenant() -> None:
    ledger = Ledger()
    for event in (
        Billed(A, "m", 0, 100, 5, "first"),
        Billed(A, "m", 100, 0, 6, ""),
        Billed(A, "n", 0, 100, 7, "model"),
        Billed(A, "n", 0, 90, 7, "model"),
        Billed(B, "m", 0, 1, 1, "first"),
    ):
        ledger.record(event)
    assert ledger.prompt_caching(A) == PromptCaching(100, 290, 25, {"first": 1, "model": 2})
    assert ledger.prompt_caching(Tenant("nobody")) == PromptCaching()
