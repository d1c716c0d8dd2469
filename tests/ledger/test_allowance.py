"""Limits held: by many requests at once, by several processes, and over a restart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.ledger.entries import AT_US, made

from anaphora.clock import ManualClock
from anaphora.config import LimitConfig
from anaphora.errors import LimitReached
from anaphora.ledger.allowance import Allowance, used_before
from anaphora.ledger.book import Book
from anaphora.ledger.limits import NOTHING, Used, spent
from anaphora.ledger.prices import Price, Prices
from anaphora.ledger.tallies import Tallies
from anaphora.types import Message, Request, Tenant, TextPart

NOW_S = AT_US / 1e6
PRICES = Prices((Price(model="m", input=Decimal(10), output=Decimal(10)),))


def request(tenant: str = "t", max_tokens: int = 96, text: str = "sixteen letters!") -> Request:
    """Of about 100 tokens, or a thousandth of a dollar."""
    return Request("m", Tenant(tenant), (Message("user", (TextPart(text),)),), max_tokens=max_tokens)


def allowance(
    limit: LimitConfig, *more: LimitConfig, tallies: Tallies | None = None, clock: ManualClock | None = None
) -> Allowance:
    return Allowance((limit, *more), tallies or Tallies(), PRICES, clock or ManualClock(NOW_S))


def at_once(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run what does not suspend."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


def remaining(held: Allowance, tenant: str = "t") -> list[int]:
    return [at.remaining for at in held.standings(tenant)]


def test_a_tenant_has_its_own_limits_or_those_of_everybody_each_by_itself() -> None:
    held = allowance(LimitConfig(tenant="*", requests_per_day=1), LimitConfig(tenant="big", requests_per_day=2))
    for tenant in ("small", "other", "big", "big"):
        at_once(held.admit(tenant))
    for tenant in ("small", "other", "big"):
        with pytest.raises(LimitReached, match=r"request.* per day"):
            at_once(held.admit(tenant))
    only = allowance(LimitConfig(tenant="big", requests_per_day=1))
    at_once(only.admit("free"))
    at_once(only.admit("free"))
    assert only.standings("free") == ()


def test_a_wait_of_seconds_is_worth_repeating_and_one_of_hours_is_not() -> None:
    held = allowance(LimitConfig(tenant="t", requests_per_minute=1), LimitConfig(tenant="u", requests_per_day=1))
    for tenant, soon, code in (("t", True, "rate_limit_exceeded"), ("u", False, "budget_exceeded")):
        at_once(held.admit(tenant))
        with pytest.raises(LimitReached) as caught:
            at_once(held.admit(tenant))
        assert (caught.value.status, caught.value.soon, caught.value.code) == (429, soon, code)


def test_many_at_once_cannot_pass_a_budget_by_more_than_the_last_one_of_them() -> None:
    held = allowance(LimitConfig(tenant="t", usd_per_day=Decimal("0.0055")))

    def ask(number: int) -> bool:
        try:
            at_once(held.reserve(request(), str(number)))
        except LimitReached:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(ask, range(100))) == 6


def test_a_reservation_that_is_settled_leaves_what_was_used() -> None:
    held = allowance(LimitConfig(tenant="t", requests_per_day=9, tokens_per_day=1000, usd_per_day=Decimal(1)))
    at_once(held.admit("t"))
    at_once(held.reserve(request(), "r"))
    assert remaining(held) == [8, 900, 999 * 10**9]
    held.settle("r", 30, 3 * 10**8)
    assert remaining(held) == [8, 970, 10**12 - 3 * 10**8]
    held.settle("r", 30, 3 * 10**8)
    held.settle("never reserved", 30, 3 * 10**8)
    assert remaining(held) == [8, 970, 10**12 - 3 * 10**8]
    held.spend("t", -10, 0)
    assert remaining(held)[1] == 980


def test_a_limit_of_tokens_beyond_all_reason_reserves_no_more_than_is_possible() -> None:
    held = allowance(LimitConfig(tenant="t", tokens_per_minute=1, tokens_per_day=10**9))
    at_once(held.reserve(request(max_tokens=2**62), "r"))
    assert remaining(held) == [0, 10**9 - 10_000_004]
    held.settle("r", 0, 2**63)
    held.spend("t", 0, 2**63)
    assert remaining(held) == [1, 10**9]


def test_a_request_that_may_not_be_computed_has_cost_nothing() -> None:
    held = allowance(LimitConfig(tenant="t", requests_per_day=9, tokens_per_day=50))
    at_once(held.admit("t"))
    at_once(held.reserve(request(), "r"))
    held.settle("r", 60, 0)
    at_once(held.admit("t"))
    with pytest.raises(LimitReached, match="50 tokens per day is reached"):
        at_once(held.reserve(request(), "s"))
    assert remaining(held) == [8, 0]


def test_where_answers_under_way_hold_what_is_left_coming_back_soon_is_worth_it() -> None:
    held = allowance(LimitConfig(tenant="t", tokens_per_day=50))
    at_once(held.reserve(request(), "r"))
    with pytest.raises(LimitReached, match="reserved") as caught:
        at_once(held.reserve(request(), "s"))
    assert caught.value.retry_after_s == 1
    held.settle("r", 20, 0)
    at_once(held.reserve(request(), "s"))


def test_what_the_book_says_was_used_counts_on(tmp_path: Path) -> None:
    book = Book(tmp_path / "ledger.db", writes=True)
    hour = 3600 * 10**6
    book.append(
        [
            made(input=100, output=20, write_1h=7, cache_read=3, paid=5),
            made(at_us=AT_US - 2 * hour, input=1000, paid=2),
            made(at_us=AT_US - 48 * hour, input=10_000, paid=1),
            made(at_us=AT_US - 24 * 40 * hour, input=10**6),
            made(tenant="u", level="exact"),
        ]
    )
    tallies = Tallies(first=lambda: used_before(book, NOW_S))
    book.close()
    limits = LimitConfig(
        tenant="*",
        requests_per_hour=10,
        tokens_per_hour=1000,
        tokens_per_day=10_000,
        tokens_per_month=10**6,
        usd_per_month=Decimal(1),
    )
    held = allowance(limits, tallies=tallies)
    assert remaining(held) == [9, 870, 10_000 - 1130, 10**6 - 11_130, 10**12 - 8]
    assert remaining(held, "u") == [9, 1000, 10_000, 10**6, 10**12]


def test_processes_share_one_count(tmp_path: Path) -> None:
    """Each of three processes asks 100 times; together they get what the limit says."""
    code = """
import asyncio
import sys
from pathlib import Path
from anaphora.clock import ManualClock
from anaphora.config import LimitConfig
from anaphora.errors import LimitReached
from anaphora.ledger.allowance import Allowance
from anaphora.ledger.prices import Prices
from anaphora.ledger.tallies import Tallies
limits = (LimitConfig(tenant="*", requests_per_day=50),)
held = Allowance(limits, Tallies(Path(sys.argv[1])), Prices(), ManualClock(1_800_000_000.0))
admitted = 0
for number in range(100):
    for tenant in ("t", f"of-nobody-else-{sys.argv[2]}-{number}" + 40 * "x"):
        try:
            asyncio.run(held.admit(tenant))
            admitted += tenant == "t"
        except LimitReached:
            pass
print(admitted)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "tallies")]
    processes = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "abc"]
    assert sum(int(process.communicate(timeout=120)[0]) for process in processes) == 50


def test_only_the_first_process_asks_what_was_used_before(tmp_path: Path) -> None:
    counts = spent(LimitConfig(tenant="t"), NOTHING, Used(requests=3), NOW_S, NOW_S)
    one = Tallies(tmp_path / "tallies", first=lambda: {"t": counts})
    other = Tallies(tmp_path / "tallies", first=lambda: pytest.fail("asked again"))
    assert one.read("t") == other.read("t") == counts
    other.change("u", lambda _: counts)
    assert one.read("u") == counts


def test_a_change_that_fails_changes_nothing() -> None:
    tallies = Tallies()
    with pytest.raises(ZeroDivisionError):
        tallies.change("t", lambda counts: (1 // 0, *counts[1:]))
    assert tallies.read("t") == NOTHING


def test_memory_grows_with_the_tenants() -> None:
    tallies = Tallies()
    counts = [tuple(number + place for place in range(len(NOTHING))) for number in range(2000)]
    for number, amounts in enumerate(counts):
        tallies.change(f"tenant {number}", lambda _, amounts=amounts: amounts)  # type: ignore[misc]
    assert [tallies.read(f"tenant {number}") for number in range(2000)] == counts
