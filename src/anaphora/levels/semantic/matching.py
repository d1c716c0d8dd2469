"""Which words of two questions are the same, and how far apart two words are. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

from anaphora.levels.semantic.reading import Reading
from anaphora.levels.semantic.slips import is_typo
from anaphora.levels.semantic.words import UNKNOWN, Relation, words

PREFIXES: Final = ("un", "in", "im", "dis", "non", "de", "ir", "il", "mis", "over", "under", "pre", "post", "re", "anti")


class Match(NamedTuple):
    """The words of one question that the other one has not, as places in its content."""

    left: list[int]
    right: list[int]
    shared: list[tuple[int, int]]
    """Places of the same word."""


def same_words(a: Reading, b: Reading) -> Match:
    """Same words paired, each once; a word that is written as two (`log in`, `login`) as well."""
    free: dict[int | str, list[int]] = {}
    for place, word in enumerate(b.sequence):
        free.setdefault(word, []).append(place)
    shared, left = [], []
    for place, word in enumerate(a.sequence):
        if places := free.get(word):
            shared.append((place, places.pop(0)))
        else:
            left.append(place)
    taken = {place for _, place in shared}
    right = [place for place in range(len(b.sequence)) if place not in taken]
    if left and right:
        left, right = _without_joined(a, left, b, right)
        right, left = _without_joined(b, right, a, left)
    return Match(left, right, shared)


def _without_joined(a: Reading, left: list[int], b: Reading, right: list[int]) -> tuple[list[int], list[int]]:
    """Without the words of `a` that stand in `b` as two."""
    for place in left:
        word = a.low[place].replace("-", "")
        for first, second in b.bigrams:
            if len(first) + len(second) == len(word) and first + second == word:
                kept = [other for other in right if b.low[other] not in (first, second)]
                return [other for other in left if other != place], kept
    return left, right


class Likeness(NamedTuple):
    """What two different words have to do with each other."""

    held: tuple[str, ...]
    """Of `RELATIONS`, those that hold."""
    credit: float | None
    """How far one may stand for the other. None: as far as their vectors are alike."""
    conflict: int
    """Whether they exclude each other: 1 where they are alternatives, 2 opposites, 4 things of one kind."""


RELATIONS: Final = (*Relation._fields, "prefixed", "typo")


@lru_cache(maxsize=65536)
def likeness(one: str, other: str) -> Likeness:
    lexicon = words()
    mine, theirs = lexicon.lemma(lexicon.find(one)), lexicon.lemma(lexicon.find(other))
    relation = lexicon.relation(mine, theirs) if UNKNOWN not in (mine, theirs) else NONE
    prefixed = is_prefixed(one, other)
    typo = not (prefixed or relation.opposite or relation.exclusive) and UNKNOWN in (mine, theirs) and is_typo(one, other)
    held = tuple(name for name, holds in zip(RELATIONS, (*relation, prefixed, typo), strict=True) if holds)
    if relation.opposite or prefixed:
        return Likeness(held, None, 2)
    if relation.interchangeable:
        return Likeness(held, 1.0, 0)
    if typo:
        return Likeness(held, 0.95, 0)
    if relation.synonym or relation.derived:
        return Likeness(held, 0.9, 0)
    if relation.exclusive:
        return Likeness(held, None, 1)
    return Likeness(held, None, 4 if relation.sibling else 0)


NONE: Final = Relation(False, False, False, False, False, False, False)


def is_prefixed(one: str, other: str) -> bool:
    """`suitable` and `unsuitable`; `include` and `exclude`."""
    short, long = (one, other) if len(one) < len(other) else (other, one)
    if len(short) > 3 and long.endswith(short) and long[: len(long) - len(short)] in PREFIXES:
        return True
    return any(
        one.startswith(x) and other.startswith(y) and one[len(x) :] == other[len(y) :] and len(one) > len(x) + 2
        for x, y in _SWAPPED
    )


_SWAPPED: Final = tuple(
    pair
    for x, y in (("in", "ex"), ("in", "out"), ("up", "down"), ("over", "under"), ("pre", "post"), ("im", "ex"), ("en", "dis"),
                 ("in", "de"),
                 ("up", "off"), ("on", "off"), ("en", "de"), ("max", "min"), ("inter", "intra"), ("ad", "dis"), ("as", "des"))
    for pair in ((x, y), (y, x))
)  # fmt: skip
