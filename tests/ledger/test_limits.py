"""The rules of limits, over random histories."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.config import LimitConfig
from anaphora.ledger.limits import NOTHING, Counts, Kind, Span, Standing, Used, began, spent, standings, start_s

NOW_S = datetime(2026, 11, 22, 15, 30, tzinfo=UTC).timestamp()
ALL = LimitConfig(
    tenant="*",
    requests_per_minute=7,
    tokens_per_minute=1000,
    requests_per_hour=50,
    tokens_per_day=10_000,
    usd_per_month=Decimal("2.5"),
)


def find(counts: Counts, kind: Kind, span: Span, now_s: float = NOW_S, limits: LimitConfig = ALL) -> Standing:
    return next(at for at in standings(limits, counts, now_s) if (at.kind, at.span) == (kind, span))


used = st.builds(Used, st.integers(0, 20), st.integers(0, 5000), st.integers(0, 10**13))
delays = st.floats(0, 100_000)


@given(st.lists(st.tuples(delays, used)), used, used)
def test_settling_what_was_reserved_leaves_what_was_used_and_no_residue(
    before: list[tuple[float, Used]], reserved: Used, actual: Used
) -> None:
    counts, now_s = NOTHING, NOW_S
    for delay, amounts in before:
        now_s += delay
        counts = spent(ALL, counts, amounts, now_s, now_s)
    more = Used(
        actual.requests - reserved.requests,
        actual.tokens - reserved.tokens,
        actual.usd - reserved.usd,
    )
    settled = spent(ALL, spent(ALL, counts, reserved, now_s, now_s), more, now_s, now_s)
    direct = spent(ALL, counts, actual, now_s, now_s)
    # Budgets to the last unit; a bucket to the rounding of a nanosecond's share.
    assert settled[2:] == direct[2:]
    for one, other in zip(standings(ALL, settled, now_s), standings(ALL, direct, now_s), strict=True):
        assert one.reset_s == pytest.approx(other.reset_s, abs=1e-6)
    nothing_used = Used(-reserved.requests, -reserved.tokens, -reserved.usd)
    undone = spent(ALL, spent(ALL, counts, reserved, now_s, now_s), nothing_used, now_s, now_s)
    assert standings(ALL, undone, now_s) == standings(ALL, counts, now_s)


@given(st.integers(1, 10_000), st.floats(0, 60))
def test_a_bucket_lets_exactly_its_limit_through_at_once_and_more_as_it_fills(limit: int, pause_s: float) -> None:
    limits = LimitConfig(tenant="t", requests_per_minute=limit)

    def admitted(counts: Counts, now_s: float) -> tuple[int, Counts]:
        num = 0
        while find(counts, "requests", "minute", now_s, limits).remaining:
            counts = spent(limits, counts, Used(requests=1), now_s, now_s)
            num += 1
        return num, counts

    if limit > 200:
        counts = spent(limits, NOTHING, Used(requests=limit), NOW_S, NOW_S)
    else:
        num, counts = admitted(NOTHING, NOW_S)
        assert num == limit
    assert find(counts, "requests", "minute", NOW_S, limits).remaining == 0
    again, _ = admitted(counts, NOW_S + pause_s)
    assert again == pytest.approx(limit * pause_s / 60, abs=1.001)


def test_after_the_told_wait_there_is_one_again() -> None:
    counts = spent(ALL, NOTHING, Used(requests=7), NOW_S, NOW_S)
    standing = find(counts, "requests", "minute")
    assert standing.remaining == 0
    assert standing.retry_s == pytest.approx(60 / 7, abs=1e-6)
    assert find(counts, "requests", "minute", NOW_S + standing.retry_s + 1e-6).remaining == 1
    assert find(counts, "requests", "minute", NOW_S + standing.reset_s).remaining == 7


def test_an_hour_a_day_and_a_month_begin_anew() -> None:
    counts = spent(ALL, NOTHING, Used(50, 10_000, 25 * 10**11), NOW_S, NOW_S)
    keys: tuple[tuple[Kind, Span], ...] = (("requests", "hour"), ("tokens", "day"), ("usd", "month"))
    reached = {key: find(counts, *key) for key in keys}
    assert [at.remaining for at in reached.values()] == [0, 0, 0]
    assert [at.retry_s for at in reached.values()] == [1800, 8.5 * 3600, (8 * 24 + 8.5) * 3600]
    for key, at in reached.items():
        assert find(counts, *key, NOW_S + at.retry_s - 1).remaining == 0
        assert find(counts, *key, NOW_S + at.retry_s).remaining == at.limit


def test_a_correction_of_an_earlier_hour_is_no_matter_of_this_one() -> None:
    reserved = spent(ALL, NOTHING, Used(tokens=9000), NOW_S, NOW_S)
    tomorrow = NOW_S + 86_400
    fresh = spent(ALL, reserved, Used(tokens=100), tomorrow, tomorrow)
    settled = spent(ALL, fresh, Used(tokens=-8000), NOW_S, tomorrow)
    assert find(settled, "tokens", "day", tomorrow).remaining == 9900


def test_december_ends_with_the_year() -> None:
    december = datetime(2026, 12, 31, 23, tzinfo=UTC).timestamp()
    assert find(NOTHING, "usd", "month", december).reset_s == 3600
    assert start_s("month", december) == datetime(2026, 12, 1, tzinfo=UTC).timestamp()


@given(used)
def test_what_was_used_before_a_restart_counts_on(amounts: Used) -> None:
    counts = began({"hour": amounts, "day": amounts, "month": amounts}, NOW_S)
    assert counts[2:] == spent(ALL, NOTHING, amounts, NOW_S, NOW_S)[2:]


def test_only_what_is_set_is_a_limit_and_it_says_what_it_is() -> None:
    words = [str(at) for at in standings(ALL, NOTHING, NOW_S)]
    assert words == [
        "7 requests per minute",
        "1,000 tokens per minute",
        "50 requests per hour",
        "10,000 tokens per day",
        "$2.5 per month",
    ]
