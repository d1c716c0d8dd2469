"""Slips of the pen: words that are meant to be one. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import Final


def is_typo(one: str, other: str) -> bool:
    """One slip apart: a letter missing, wrong or in the wrong place; in longer words two."""
    if abs(len(one) - len(other)) > 2 or min(len(one), len(other)) < 4 or one[0] != other[0]:
        return False
    allowed = 2 if min(len(one), len(other)) > 7 else 1
    return distance(one, other) <= allowed


@lru_cache(maxsize=16384)
def distance(one: str, other: str) -> int:
    """Edits, a swap of neighbours being one."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        older, before, row = before, row, [i]
        for j, target in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != target))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == target:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]


def is_slip(one: str, other: str) -> bool:
    """A typo, or an accent left out, in short words too."""
    return is_typo(one, other) or (len(one) == len(other) and one.translate(_UNACCENTED) == other.translate(_UNACCENTED))


_UNACCENTED: Final = str.maketrans("áéíóúüё", "aeiouuе")
