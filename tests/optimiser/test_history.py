"""What is remembered of a tenant: enough to predict its provider's books, never a text, never without bound."""

from __future__ import annotations

import gc
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.optimiser.traffic import Site, body, chat_turns, says, user

from anaphora.optimiser import Histories, History
from anaphora.types import Scope, Tenant


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.sampled_from([3.0, 100.0, 1000.0, 5000.0])), max_size=20))
def test_what_it_counts_on_is_what_the_provider_reads(requests: list[tuple[int, int, float]]) -> None:
    """The books agree about every request that comes later than the answer before it."""
    site = Site()
    for talk, turns, gap in requests:
        request = body(*chat_turns(f"Talk {talk}.", turns))
        prompt, lengths = site.read(request)
        alive = site.history.know(prompt, site.profile, site.now_s + gap).alive
        _, usage = site.ask(request, gap)
        assert usage.read == (lengths.ends[alive[-1]] if alive else 0)


def test_it_stays_small_however_many_requests_there_are() -> None:
    site = Site()
    site.history = History(max_names=50, max_kinds=20)
    for number in range(300):
        site.ask(body(*chat_turns(f"Talk {number}.", 3)), after_s=1.0)
    held = site.history
    assert len(held) == 50
    kinds = (held._standing, held._entries, held._chances, held._watches, held._lanes, held._arrivals)
    assert max(len(kind) for kind in kinds) <= 20
    assert max(len(due) for due in held._due) <= 50


def test_no_text_is_kept() -> None:
    site = Site()
    site.ask(body(user("Zanzibar"), says("Timbuktu"), user("Samarkand")))
    seen, todo = set[int](), [site.history.__dict__]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen.add(id(one))
        if isinstance(one, (str, bytes)):
            plain = one if isinstance(one, bytes) else one.encode()
            assert not any(word in plain for word in (b"Zanzibar", b"Timbuktu", b"Samarkand", b"Rules"))
        todo += gc.get_referents(one) if gc.is_tracked(one) or isinstance(one, tuple) else []


def test_tenants_and_routes_are_apart_and_a_tenant_is_forgotten() -> None:
    histories = Histories()
    alice, bob = Tenant("alice"), Tenant("bob")
    one, other = histories.of(alice, "main"), histories.of(bob, "main")
    assert one is histories.of(alice, "main")
    assert len({id(one), id(other), id(histories.of(alice, "side"))}) == 3
    assert histories.forget(Scope(tenant=alice)) == 2
    assert histories.of(alice, "main") is not one
    assert histories.of(bob, "main") is other


def test_the_tenant_that_was_away_longest_is_given_up_first() -> None:
    histories = Histories(max_histories=2)
    first, second = histories.of(Tenant("a"), ""), histories.of(Tenant("b"), "")
    histories.of(Tenant("a"), "")
    histories.of(Tenant("c"), "")
    assert histories.of(Tenant("a"), "") is first
    assert histories.of(Tenant("b"), "") is not second


def test_knowing_a_prompt_changes_nothing() -> None:
    site = Site()
    site.ask(body(*chat_turns("Talk.", 2)))
    prompt, _ = site.read(body(*chat_turns("Talk.", 3)))
    first = site.history.know(prompt, site.profile, site.now_s + 10)
    hazards = site.history.hazards(prompt, first)
    assert first == site.history.know(prompt, site.profile, site.now_s + 10)
    assert hazards == site.history.hazards(prompt, first)


@given(st.integers(1, 6))
def test_nobody_is_expected_to_ask_for_a_prefix_without_what_is_before_it(turns: int) -> None:
    site = Site()
    for number in range(4):
        site.ask(body(*chat_turns(f"Talk {number % 2}.", turns)), after_s=40.0)
    prompt, _ = site.read(body(*chat_turns("Talk 0.", turns + 1)))
    hazards = site.history.hazards(prompt, site.history.know(prompt, site.profile, site.now_s + 10))
    assert all(a >= b for one, other in pairwise(hazards) for a, b in zip(one, other, strict=True))
