"""Which entries of the book are meant, and what they are summed up by. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

import msgspec

from anaphora.errors import ConfigError
from anaphora.ledger.entry import usd_text

_SPAN = re.compile(r"(\d{1,6})([mhdw])")
_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}

DIMENSIONS = {
    "tenant": "tenant",
    "workspace": "workspace",
    "tag": "tag",
    "asked": "asked",
    "model": "model",
    "upstream": "upstream",
    "level": "level",
    "outcome": "outcome",
    "priced": "priced",
    "month": "strftime('%Y-%m', at_us / 1000000, 'unixepoch')",
    "day": "strftime('%Y-%m-%d', at_us / 1000000, 'unixepoch')",
    "hour": "strftime('%Y-%m-%dT%H:00Z', at_us / 1000000, 'unixepoch')",
}
"""Name → SQL."""


class Query(msgspec.Struct, frozen=True):
    """Which entries. Times are Unix times in microseconds; None: no bound."""

    from_us: int | None = None
    to_us: int | None = None
    """The first moment that is not meant any more."""
    tenant: str | None = None


class Sums(msgspec.Struct):
    """What entries add up to. Amounts of money are in the ledger's units."""

    num_requests: int = 0
    num_failed: int = 0
    num_left: int = 0
    num_unpriced: int = 0
    num_estimated: int = 0
    input: int = 0
    cache_read: int = 0
    write_5m: int = 0
    write_30m: int = 0
    write_1h: int = 0
    write_12h: int = 0
    write_other: int = 0
    output: int = 0
    reasoning: int = 0
    audio_input: int = 0
    audio_output: int = 0
    image_input: int = 0
    saved_input: int = 0
    saved_output: int = 0
    num_off: int = 0
    """Entries whose prompt we had counted otherwise than the upstream."""
    off: int = 0
    """By how many tokens, in either direction."""
    num_first: int = 0
    first_us: int = 0
    whole_us: int = 0
    paid: int = 0
    saved_answers: int = 0
    saved_prompts: int = 0

    @property
    def cache_write(self) -> int:
        return self.write_5m + self.write_30m + self.write_1h + self.write_12h + self.write_other

    @property
    def saved(self) -> int:
        return self.saved_answers + self.saved_prompts


class Group(msgspec.Struct, frozen=True):
    """The sums of all entries that are alike in what was asked for."""

    by: dict[str, str]
    sums: Sums


def dimensions(text: str) -> tuple[str, ...]:
    """Of "tenant,day". Raises ConfigError for one that there is not."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in DIMENSIONS:
            raise ConfigError(f"there is no dimension '{name}'; known are {', '.join(DIMENSIONS)}")
    return names


def period(since: str | None, start: str | None, end: str | None, now_s: float) -> tuple[int | None, int | None]:
    """(`from_us`, `to_us`) of "7d" before now, or of dates and times in UTC. The day of an end that is a date is meant as a
    whole. Raises ConfigError."""
    if since is not None:
        if start is not None:
            raise ConfigError("since and from exclude each other")
        span = _SPAN.fullmatch(since)
        if span is None:
            raise ConfigError(f"since: a span such as 90m, 24h, 7d or 4w, not '{since}'")
        return round((now_s - int(span[1]) * _SECONDS[span[2]]) * 1e6), _moment("to", end, whole_day=True)
    return _moment("from", start), _moment("to", end, whole_day=True)


def _moment(name: str, text: str | None, *, whole_day: bool = False) -> int | None:
    if text is None:
        return None
    try:
        if len(text) == 10:
            day = date.fromisoformat(text) + timedelta(days=int(whole_day))
            moment = datetime(day.year, day.month, day.day, tzinfo=UTC)
        else:
            moment = datetime.fromisoformat(text)
            moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{name}: a date such as 2026-11-22, or a time such as 2026-11-22T15:00, not '{text}'") from error
    return round(moment.timestamp() * 1e6)


def total(groups: Sequence[Group]) -> Sums:
    """All of them together."""
    return Sums(*[sum(getattr(group.sums, name) for group in groups) for name in Sums.__struct_fields__])


def plain(group: Group) -> dict[str, str | int | float | None]:
    """As it is written down: dollars as exact decimals in text, times in seconds."""
    sums = group.sums
    return {
        **group.by,
        "num_requests": sums.num_requests,
        "num_failed": sums.num_failed,
        "num_left": sums.num_left,
        "num_unpriced": sums.num_unpriced,
        "num_estimated": sums.num_estimated,
        "input_tokens": sums.input,
        "cache_read_tokens": sums.cache_read,
        "cache_write_tokens": sums.cache_write,
        **{f"cache_{name}_tokens": getattr(sums, name) for name in Sums.__struct_fields__ if name.startswith("write_")},
        "output_tokens": sums.output,
        "reasoning_tokens": sums.reasoning,
        "audio_input_tokens": sums.audio_input,
        "audio_output_tokens": sums.audio_output,
        "image_input_tokens": sums.image_input,
        "saved_input_tokens": sums.saved_input,
        "saved_output_tokens": sums.saved_output,
        "num_counted_otherwise": sums.num_off,
        "tokens_counted_otherwise": sums.off,
        "mean_first_s": round(sums.first_us / sums.num_first / 1e6, 6) if sums.num_first else None,
        "mean_whole_s": round(sums.whole_us / sums.num_requests / 1e6, 6) if sums.num_requests else None,
        "paid_usd": usd_text(sums.paid),
        "saved_by_answer_cache_usd": usd_text(sums.saved_answers),
        "saved_by_prompt_caching_usd": usd_text(sums.saved_prompts),
        "without_answer_cache_usd": usd_text(sums.paid + sums.saved_answers),
        "without_prompt_caching_usd": usd_text(sums.paid + sums.saved_prompts),
        "without_either_usd": usd_text(sums.paid + sums.saved),
    }
