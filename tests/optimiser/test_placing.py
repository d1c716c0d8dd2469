"""The break-evens, by the numbers of the specification."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.optimiser.chances import EDGES_S, STEPS, Chance, expected, shrunk, within
from anaphora.optimiser.placing import Candidate, Choice, choose, rates_of
from anaphora.profiles import find
from anaphora.prompt import TTL_S

OPUS = rates_of(find("claude-opus-5", "anthropic"))
SOL = rates_of(find("gpt-5.6-sol", "openai"))


def at(end: int, soon: float, later: float | None = None, *, stands: bool = False, paid: bool = False) -> Candidate:
    return Candidate(end, end, soon, soon if later is None else later, stands, paid)


def test_a_write_for_five_minutes_pays_from_a_chance_of_28_percent_on() -> None:
    """S7 (i): not when P x 0.9 < 0.25."""
    assert choose([at(1000, 0.27)], OPUS, read=0, safe=0, may_be_long=1) == Choice()
    assert choose([at(1000, 0.29)], OPUS, read=0, safe=0, may_be_long=1).short == 0


def test_one_read_pays_for_five_minutes_and_for_an_hour_only_what_comes_again_and_again() -> None:
    """S7 (h): 5m pays from one read on, 1h from two."""
    certain = choose([at(1000, 1.0)], OPUS, read=0, safe=0, may_be_long=1)
    assert (certain.short, certain.long) == (0, None)
    assert certain.gain == pytest.approx(650.0)
    assert choose([at(1000, 0.0, 0.5)], OPUS, read=0, safe=0, may_be_long=1) == Choice()
    assert choose([at(1000, 0.0, 0.9)], OPUS, read=0, safe=0, may_be_long=1).long == 0


def test_a_small_addition_for_an_hour_protects_a_long_prompt_from_an_unlikely_pause() -> None:
    """R14: only the addition is paid for, and its entry covers everything."""
    candidate = at(101_000, 0.95, 0.96)
    assert choose([candidate], OPUS, read=100_000, safe=0, may_be_long=1).long == 0
    assert choose([candidate], OPUS, read=100_000, safe=100_000, may_be_long=1).long is None
    assert choose([candidate], OPUS, read=100_000, safe=0, may_be_long=0).long is None


def test_what_stands_at_the_head_of_many_prompts_is_kept_for_longer_than_what_follows() -> None:
    found = choose([at(2000, 0.6, 0.95, stands=True), at(3000, 0.6, 0.6)], OPUS, read=0, safe=0, may_be_long=2)
    assert (found.long, found.short) == (0, 1)


def test_what_the_client_has_paid_for_costs_nothing_more() -> None:
    assert choose([at(1000, 0.1, paid=True)], OPUS, read=0, safe=0, may_be_long=0).short == 0


def test_twelve_hours_of_openais_are_weighed_like_an_hour() -> None:
    assert (SOL.short, SOL.long) == ("30m", "12h")
    assert choose([at(11_000, 0.5, 0.9)], SOL, read=10_000, safe=0, may_be_long=1).long == 0


chances = st.floats(0, 1, allow_nan=False)


@given(st.lists(st.tuples(st.integers(1, 5000), chances, chances), max_size=8), st.integers(0, 5000), st.booleans())
def test_nothing_is_ever_written_at_an_expected_loss(parts: list[tuple[int, float, float]], read: int, stands: bool) -> None:
    end, candidates = read, []
    for length, one, other in parts:
        end += length
        candidates.append(at(end, min(one, other), max(one, other), stands=stands))
    found = choose(candidates, OPUS, read=read, safe=0, may_be_long=len(candidates))
    assert found.gain >= 0
    assert (found.long if found.long is not None else -1) <= (found.short if found.short is not None else -1)


# -- chances -------------------------------------------------------------------------------------------------------------


def test_every_lifetime_is_the_end_of_a_step() -> None:
    assert set(TTL_S.values()) <= set(EDGES_S)


@given(st.floats(0, 1), st.floats(0, 1))
def test_what_is_expected_is_the_chance_within_five_minutes(soon: float, later: float) -> None:
    assert within(expected(soon, later), 300.0) == pytest.approx(soon)


@given(st.lists(st.tuples(st.integers(0, STEPS - 1), st.booleans()), max_size=50), st.floats(0, 50_000), st.floats(0, 50_000))
def test_chances_grow_with_time_and_stay_chances(counted: list[tuple[int, bool]], one: float, other: float) -> None:
    chance = Chance()
    for step, came in counted:
        chance.count(step, came=came)
    hazards = shrunk(expected(0.5), [chance], 2.0)
    assert 0.0 <= within(hazards, min(one, other)) <= within(hazards, max(one, other)) <= 1.0


def test_what_did_not_come_for_long_is_not_expected_soon() -> None:
    chance = Chance()
    for _ in range(100):
        chance.count(0, came=False)
        chance.count(1, came=True)
    hazards = shrunk(expected(0.5), [chance], 2.0)
    assert within(hazards, 60.0) > 0.95
    assert within(hazards, 300.0, since_s=60.0) < 0.3


def test_a_tenant_may_change_its_ways() -> None:
    chance = Chance()
    for _ in range(10_000):
        chance.count(0, came=True)
    for _ in range(1_000):
        chance.count(0, came=False)
    assert shrunk(expected(0.5), [chance], 2.0)[0] < 0.1
