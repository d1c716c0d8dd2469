"""What servers use together, over random histories: whoever changes it when, whatever was lost in between."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from anaphora.config import LimitConfig
from anaphora.ledger.joint import (
    LEASE_S,
    ByHour,
    Joint,
    Party,
    added,
    charged,
    entered,
    left,
    negative,
    of_hour,
    packed,
    total,
    unpacked,
)
from anaphora.ledger.limits import NOTHING, Used, joined, spent, standings

NOW_S = datetime(2026, 11, 22, 15, 30, tzinfo=UTC).timestamp()
LIMITS = LimitConfig(tenant="t", requests_per_hour=100, tokens_per_month=10_000, usd_per_day=Decimal(1))
RATED = LimitConfig(tenant="t", tokens_per_minute=1000)

used = st.builds(Used, st.integers(-20, 20), st.integers(-5000, 5000), st.integers(-(10**13), 10**13))
by_hour = st.dictionaries(st.integers(400_000, 600_000), used.filter(lambda one: one != Used()), max_size=3)


def party(server: int = 1, process: int = 10, own: tuple[int, ...] = NOTHING, told: ByHour | None = None) -> Party:
    return Party(server, process, own, told or {})


def counted(tokens: int, at_s: float = NOW_S) -> tuple[int, ...]:
    return spent(LIMITS, NOTHING, Used(tokens=tokens), at_s, at_s)


def tokens_left(joint: Joint) -> int:
    return next(at.remaining for at in standings(LIMITS, joint.counts, joint.now_s) if at.kind == "tokens")


@given(by_hour, by_hour)
def test_what_is_added_and_taken_back_is_as_it_was(amounts: ByHour, more: ByHour) -> None:
    assert added(added(amounts, more), negative(more)) == amounts
    assert total(added(amounts, more).values()) == total([*amounts.values(), *more.values()])


@given(
    st.floats(0, 2e9),
    st.lists(st.integers(-(2**62), 2**62), min_size=14, max_size=14),
    st.lists(st.integers(0, 2**63 - 1)),
    by_hour,
)
def test_it_comes_back_from_its_bytes_as_it_was(now_s: float, counts: list[int], servers: list[int], held: ByHour) -> None:
    joint = left(Joint(now_s, NOTHING, tuple(servers)), party(), tuple(counts), held)
    assert unpacked(packed(joint)) == joint


@given(st.binary())
def test_what_somebody_else_wrote_counts_as_lost(data: bytes) -> None:
    assert unpacked(data + b"\xc1") == Joint()
    assert unpacked(packed(Joint(1.0, (1, 2)))) == Joint()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 500)), max_size=30), st.sets(st.integers(0, 29)))
def test_whatever_is_lost_in_between_all_that_was_used_is_in_it_once_every_server_has_spoken(
    history: list[tuple[int, int]], losses: set[int]
) -> None:
    """Each server keeps its own counts beside it, which survive."""
    joint, own = Joint(), dict.fromkeys(range(4), NOTHING)
    for number, (server, tokens) in enumerate(history):
        if number in losses:
            joint = Joint()
        found = entered(joint, party(server, server, own[server]), NOW_S)
        amount = Used(tokens=tokens)
        joint = left(found, party(server, server), spent(LIMITS, found.counts, amount, NOW_S, NOW_S), {})
        own[server] = spent(LIMITS, own[server], amount, NOW_S, NOW_S)
    for server in range(4):
        joint = entered(joint, party(server, server, own[server]), NOW_S)
    assert tokens_left(joint) == max(0, 10_000 - sum(tokens for _, tokens in history))


def test_what_a_server_used_before_it_shared_counts_once() -> None:
    own = counted(700)
    joint = entered(Joint(), party(own=own), NOW_S)
    again = entered(joint, party(process=11, own=own), NOW_S + 1)
    both = entered(again, party(server=2, process=20, own=counted(50)), NOW_S + 2)
    assert [tokens_left(one) for one in (joint, again, both)] == [9300, 9300, 9250]
    assert joined(NOTHING, counted(700, NOW_S - 40 * 86_400), NOW_S)[2:] == joined(NOTHING, NOTHING, NOW_S)[2:]


def test_time_does_not_go_back() -> None:
    joint = entered(Joint(), party(), NOW_S)
    assert entered(joint, party(server=2), NOW_S - 3600).now_s == NOW_S
    assert entered(joint, party(server=2), NOW_S + 5).now_s == NOW_S + 5


def test_what_a_process_held_when_it_fell_silent_is_taken_back() -> None:
    dying, living = party(1, 10), party(2, 20)
    joint = entered(Joint(), dying, NOW_S)
    held = of_hour(NOW_S, Used(tokens=4000))
    joint = left(joint, dying, charged(LIMITS, joint.counts, held, NOW_S), held)
    soon = entered(joint, living, NOW_S + LEASE_S - 1)
    assert (tokens_left(soon), soon.held(but=20)) == (6000, Used(tokens=4000))
    late = entered(soon, living, NOW_S + LEASE_S)
    assert (tokens_left(late), late.held(but=20)) == (10_000, Used())


def test_who_was_taken_for_dead_and_is_not_holds_again_what_he_held() -> None:
    slow, other = party(1, 10), party(2, 20)
    joint = entered(Joint(), slow, NOW_S)
    held = of_hour(NOW_S, Used(tokens=4000))
    joint = left(joint, slow, charged(LIMITS, joint.counts, held, NOW_S), held)
    joint = entered(joint, other, NOW_S + LEASE_S)
    back = entered(joint, party(1, 10, told=held), NOW_S + LEASE_S + 1)
    assert tokens_left(back) == 6000
    settled = charged(LIMITS, back.counts, of_hour(NOW_S, Used(tokens=-3000)), back.now_s)
    assert tokens_left(left(back, slow, settled, {})) == 9000


def test_what_a_process_does_not_know_that_it_holds_is_taken_back() -> None:
    """The reply to its last change was lost."""
    one = party(1, 10)
    joint = entered(Joint(), one, NOW_S)
    held = of_hour(NOW_S, Used(tokens=4000))
    joint = left(joint, one, charged(LIMITS, joint.counts, held, NOW_S), held)
    assert tokens_left(entered(joint, party(1, 10, told={}), NOW_S)) == 10_000
    assert tokens_left(entered(joint, party(1, 10, told=of_hour(NOW_S, Used(tokens=1))), NOW_S)) == 9999


def test_who_is_late_himself_has_nothing_taken_from_him() -> None:
    slow = party(1, 10)
    joint = entered(Joint(), slow, NOW_S)
    held = of_hour(NOW_S, Used(tokens=4000))
    joint = left(joint, slow, charged(LIMITS, joint.counts, held, NOW_S), held)
    assert tokens_left(entered(joint, party(1, 10, told=held), NOW_S + 2 * LEASE_S)) == 6000


def test_what_is_taken_back_of_an_earlier_hour_is_no_matter_of_a_rate() -> None:
    dying, living = party(1, 10), party(2, 20)
    joint = entered(Joint(), dying, NOW_S)
    held = of_hour(NOW_S, Used(tokens=900))
    joint = left(joint, dying, charged(RATED, joint.counts, held, NOW_S), held)
    late_s = NOW_S + LEASE_S - 1
    busy = entered(joint, living, late_s)
    busy = left(busy, living, charged(RATED, busy.counts, of_hour(late_s, Used(tokens=1000)), late_s), {})
    after = entered(busy, living, late_s + 1)
    [minute] = standings(RATED, after.counts, after.now_s)
    assert minute.remaining <= 17


def test_only_so_many_servers_are_remembered() -> None:
    joint = Joint()
    for server in range(300):
        joint = entered(joint, party(server, server), NOW_S)
    assert joint.servers == tuple(range(44, 300))
