"""What the forms of one word have in common: endings cut off, the longest first. Crude, the same for equal words."""

from __future__ import annotations

import msgspec


class Endings(msgspec.Struct, frozen=True):
    endings: tuple[str, ...]
    """The longest first."""
    shortest: int
    """Letters that remain at least."""


def stem_of(word: str, endings: Endings) -> str:
    for ending in endings.endings:
        if (
            word.endswith(ending)
            and len(word) - len(ending) >= endings.shortest
            and not (ending == "s" and word.endswith("ss"))
        ):
            stem = word[: -len(ending)]
            # stopped, stop
            doubled = len(stem) > endings.shortest and stem[-1] == stem[-2] and stem[-1] not in "slz" and stem[-1].isalpha()
            return stem[:-1] if doubled else stem
    return word
