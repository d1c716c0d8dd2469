"""The table of `anaphora ledger show`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from rich.table import Table

_NUMBERS = {
    "requests": "num_requests",
    "input": "input_tokens",
    "read": "cache_read_tokens",
    "written": "cache_write_tokens",
    "output": "output_tokens",
}
_MONEY = {
    "paid": "paid_usd",
    "saved: answers": "saved_by_answer_cache_usd",
    "saved: prompts": "saved_by_prompt_caching_usd",
    "without caches": "without_either_usd",
}


def table(groups: Sequence[dict[str, Any]], by: Sequence[str]) -> Table:
    """A row for each group, and their sum."""
    made = Table(*by, *_NUMBERS, *_MONEY, box=None, pad_edge=False, show_footer=len(groups) > 1)
    for column in made.columns[len(by) :]:
        column.justify = "right"
    rows = []
    for group in groups:
        numbers = [f"{group[name]:,}" for name in _NUMBERS.values()]
        rows.append([*(group[name] or "-" for name in by), *numbers, *(_dollars(group, name) for name in _MONEY.values())])
    totals = [sum((Decimal(group[name]) for group in groups), Decimal(0)) for name in [*_NUMBERS.values(), *_MONEY.values()]]
    sums = [*("" for _ in by), *(f"{total:,}" for total in totals[: len(_NUMBERS)]), *map(money, totals[len(_NUMBERS) :])]
    if by:
        sums[0] = "all"
    for place, column in enumerate(made.columns):
        column.footer = sums[place]
        # Figures are never cut: whoever has a narrow terminal scrolls.
        column.min_width = max(len(text) for text in (str(column.header), sums[place], *(row[place] for row in rows)))
    for row in rows:
        made.add_row(*row)
    return made


def notes(groups: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What the sums do not hold."""
    unpriced, estimated = (sum(group[name] for group in groups) for name in ("num_unpriced", "num_estimated"))
    if unpriced:
        yield f"{unpriced:,} requests whose price is not known are not in the money (ledger.prices)."
    if estimated:
        yield f"{estimated:,} requests were cut before their tokens were counted; theirs are estimates."


def money(amount: Decimal) -> str:
    """Six decimals: a thousandth of a cent is still seen."""
    return f"${amount:,.6f}" if amount >= 0 else f"-${-amount:,.6f}"


def _dollars(group: dict[str, Any], name: str) -> str:
    if group["num_unpriced"] == group["num_requests"]:
        return "?"
    return money(Decimal(group[name]))
