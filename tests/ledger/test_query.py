"""Periods and dimensions as people write them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from anaphora.errors import ConfigError
from anaphora.ledger.query import Group, Sums, dimensions, period, plain

NOW_S = datetime(2026, 11, 22, 15, tzinfo=UTC).timestamp()


def us(*moment: int) -> int:
    return round(datetime(*moment, tzinfo=UTC).timestamp() * 1e6)  # type: ignore[misc, arg-type]


def test_a_span_counts_back_from_now() -> None:
    assert period("90m", None, None, NOW_S) == (us(2026, 11, 22, 13, 30), None)
    assert period("1w", None, "2026-11-20", NOW_S) == (us(2026, 11, 15, 15), us(2026, 11, 21))


def test_a_last_day_is_meant_as_a_whole_and_a_time_to_the_second() -> None:
    assert period(None, "2026-11-01", "2026-11-30", NOW_S) == (us(2026, 11, 1), us(2026, 12, 1))
    assert period(None, "2026-11-01T02:03", "2026-11-30T00:00:00+01:00", NOW_S) == (
        us(2026, 11, 1, 2, 3),
        us(2026, 11, 29, 23),
    )
    assert period(None, None, None, NOW_S) == (None, None)


@pytest.mark.parametrize("given", [("7", None, None), ("7y", None, None), (None, "soon", None), (None, None, "2026-13-01")])
def test_what_cannot_be_understood_is_said(given: tuple[str | None, str | None, str | None]) -> None:
    with pytest.raises(ConfigError):
        period(*given, NOW_S)
    with pytest.raises(ConfigError, match="exclude"):
        period("7d", "2026-11-01", None, NOW_S)


def test_dimensions_are_named_once_each() -> None:
    assert dimensions("tenant, day,tenant") == ("tenant", "day")
    assert dimensions("") == ()
    with pytest.raises(ConfigError, match="no dimension 'tenants'"):
        dimensions("tenants")


def test_money_is_written_as_exact_decimals() -> None:
    told = plain(
        Group({"tenant": "t"}, Sums(num_requests=2, whole_us=3_000_000, paid=1, saved_answers=10**12, saved_prompts=-1))
    )
    assert told["paid_usd"] == "0.000000000001"
    assert told["saved_by_prompt_caching_usd"] == "-0.000000000001"
    assert told["without_either_usd"] == "1"
    assert told["mean_whole_s"] == 1.5
    assert told["mean_first_s"] is None
