"""Words that change what a question asks, as data: one file per language, read once."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final, Literal

import msgspec

from anaphora.levels.semantic.lexicon.stems import Endings, stem_of

Language = Literal["en", "es", "ru"]
LANGUAGES: Final[tuple[Language, ...]] = ("en", "es", "ru")
FOLDER = Path(__file__).parent

Mark = tuple[str, str]
"""A group of words and the one of its values that a word stands for: ("date", "monday")."""


class Cases(msgspec.Struct, frozen=True):
    """Where the case of letters carries meaning."""

    meaningful: frozenset[str]
    """Written with a capital these are something else: Polish, polish."""
    folded: frozenset[str]
    """Of letters that mean the same in any case: API, iPhone. In lower case."""


class Phrase(msgspec.Struct, frozen=True):
    """Words that have a mark together, and none of their own."""

    words: tuple[str, ...]
    stems: tuple[str, ...]
    """Empty where only the word itself will do."""
    marks: tuple[Mark, ...]
    apart: bool
    """Others may stand before the last one: turn it off."""


class Lexicon(msgspec.Struct, frozen=True):
    """What is known of one language."""

    language: Language
    function: frozenset[str]
    """Words without content of their own."""
    asking: frozenset[str]
    """First words of what is a question in any punctuation."""
    contractions: dict[str, tuple[str, ...]]
    irregular: dict[str, str]
    cases: Cases
    endings: Endings
    words: dict[str, tuple[Mark, ...]]
    stems: dict[str, tuple[Mark, ...]]
    starts: dict[str, tuple[Mark, ...]]
    phrases: dict[str, tuple[Phrase, ...]]
    """By the stem of the first word, the longest first."""
    ends: dict[str, frozenset[str]]
    """Of those that begin so, the last words and their stems."""
    prefixes: frozenset[tuple[str, str]]
    """Pairs that turn a word around, without what they have in common at their ends: (im, ex) for import and export."""
    filler: frozenset[str]
    """Stems of words with content that add nothing to a question."""
    soft: frozenset[str]
    """Number words that often are none: one, second."""
    doubtful: frozenset[str]
    """Count as what they are marked only with a capital letter or beside a number: may, march, US."""
    attached: frozenset[str]
    """Count as what they are marked only after a number: am, m."""
    prepositions: frozenset[str]
    """What gives the words after it their role."""
    conditions: frozenset[str]
    """Those of them that narrow what is asked: during, without."""
    passive: frozenset[str]
    """With one of these the words after `agent` are who does it."""
    agent: str
    courtesy: frozenset[str]
    """Words that greet, ask nicely or thank."""
    interrogatives: dict[str, str]
    """Words that ask for something, in all their forms, and what they ask for: a person, a time."""
    named: dict[str, frozenset[str]]
    """Stems of the words that may stand for those instead: a place, for where."""

    def stem(self, word: str) -> str:
        """What the forms of a word in lower case have in common."""
        return self.irregular.get(word) or stem_of(word, self.endings)

    def marks(self, word: str) -> tuple[Mark, ...]:
        """Of a single word in lower case."""
        found = [*self.words.get(word, ())]
        if len(word) > 3:
            found += self.stems.get(self.stem(word), ())
        for length in range(3, len(word) + 1):
            found += self.starts.get(word[:length], ())
        return tuple(dict.fromkeys(found))


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a lexicon is written. Plain lists have their words apart by spaces; where phrases may stand, by commas.

    An entry stands for all forms of its word, `=word` for this form alone, `word*` for all words that start so, `a ~ b` for
    both with others between them.
    """

    function: str
    asking: str
    meaningful: str
    folded: str
    endings: str
    shortest: int
    filler: str
    soft: str
    doubtful: str
    attached: str
    prepositions: str
    conditions: str
    passive: str
    agent: str
    courtesy: str
    prefixes: list[tuple[str, str]]
    interrogatives: dict[str, str]
    named: dict[str, str]
    """Of what is asked for, the words for it."""
    contractions: dict[str, str]
    irregular: dict[str, str]
    opposites: list[str]
    """`a, b | c, d`."""
    kinds: dict[str, str]
    """Things of one kind, of which a question means one; `a/b` are one."""
    marks: dict[str, dict[str, str]]


@cache
def lexicon(language: Language) -> Lexicon:
    """Raises OSError or ValueError where the data of the package is damaged."""
    file = msgspec.convert(tomllib.loads((FOLDER / f"{language}.toml").read_text(encoding="utf-8")), _File)
    endings = Endings(tuple(sorted(file.endings.split(), key=len, reverse=True)), file.shortest)
    words: dict[str, tuple[Mark, ...]] = {}
    stems: dict[str, tuple[Mark, ...]] = {}
    starts: dict[str, tuple[Mark, ...]] = {}
    phrases: dict[str, tuple[Phrase, ...]] = {}
    function = frozenset(file.function.split())
    irregular = {form: base for base, forms in file.irregular.items() for form in [base, *forms.split()]}

    def add(table: dict[str, tuple[Mark, ...]], entry: str, mark: Mark) -> None:
        if mark not in (known := table.get(entry, ())):
            table[entry] = (*known, mark)

    for entry, mark in _entries(file):
        if " " in entry:
            parts = [part for part in entry.split() if part != "~"]
            bare = tuple(part.removeprefix("=") for part in parts)
            cut = [part if part in function else irregular.get(part) or stem_of(part, endings) for part in bare]
            phrase = Phrase(
                words=bare,
                stems=tuple("" if part.startswith("=") else stem for part, stem in zip(parts, cut, strict=True)),
                marks=(mark,),
                apart="~" in entry,
            )
            known = phrases.get(cut[0], ())
            phrases[cut[0]] = tuple(sorted((*known, phrase), key=lambda other: -len(other.words)))
        elif entry.endswith("*"):
            add(starts, entry[:-1], mark)
        elif entry.startswith("="):
            add(words, entry[1:], mark)
        else:
            add(words, entry, mark)
            add(stems, irregular.get(entry) or stem_of(entry, endings), mark)
    return Lexicon(
        language=language,
        function=function,
        asking=frozenset(file.asking.split()),
        contractions={short: tuple(long.split()) for short, long in file.contractions.items()},
        irregular=irregular,
        cases=Cases(frozenset(file.meaningful.split()), frozenset(file.folded.split())),
        endings=endings,
        words=words,
        stems=stems,
        starts=starts,
        phrases=phrases,
        ends={
            start: frozenset(end for phrase in known for end in (phrase.words[-1], phrase.stems[-1]))
            for start, known in phrases.items()
        },
        prefixes=frozenset(_shortest(*pair) for pair in file.prefixes),
        filler=frozenset(irregular.get(word) or stem_of(word, endings) for word in file.filler.split()),
        soft=frozenset(file.soft.split()),
        doubtful=frozenset(file.doubtful.split()),
        attached=frozenset(file.attached.split()),
        prepositions=frozenset(file.prepositions.split()),
        conditions=frozenset(file.conditions.split()),
        passive=frozenset(file.passive.split()),
        agent=file.agent,
        courtesy=frozenset(file.courtesy.split()),
        interrogatives={word: asked for asked, forms in file.interrogatives.items() for word in forms.split()},
        named={
            asked: frozenset(irregular.get(word) or stem_of(word, endings) for word in entries.split())
            for asked, entries in file.named.items()
        },
    )


def _entries(file: _File) -> Iterator[tuple[str, Mark]]:
    for group, values in file.marks.items():
        for value, entries in values.items():
            yield from ((entry, (group, value)) for entry in _split(entries, ","))
    for number, pair in enumerate(file.opposites):
        for sign, side in zip("+-", pair.split("|"), strict=True):
            yield from ((entry, ("opposite", f"{sign}{number}")) for entry in _split(side, ","))
    for kind, things in file.kinds.items():
        for thing in _split(things, ","):
            names = _split(thing, "/")
            yield from ((name, ("kind", f"{kind}:{names[0]}")) for name in names)


def _split(text: str, mark: str) -> list[str]:
    return [" ".join(entry.split()) for entry in text.split(mark) if entry.strip()]


def _shortest(one: str, other: str) -> tuple[str, str]:
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return (one, other) if one < other else (other, one)


class Unit(msgspec.Struct, frozen=True):
    dimension: str
    factor: float
    """How many of the dimension's base."""


@cache
def units() -> dict[str, Unit]:
    """By the name that lexicons use."""
    tables = tomllib.loads((FOLDER / "units.toml").read_text(encoding="utf-8"))
    return {name: Unit(dimension, factor) for dimension, table in tables.items() for name, factor in table.items()}


def _foreign() -> frozenset[str]:
    tables = tomllib.loads((FOLDER / "foreign.toml").read_text(encoding="utf-8"))
    return frozenset(word for words in tables.values() for word in words.split())


FOREIGN: Final = _foreign()
"""Small words of languages that have no lexicon."""
FOLDED: Final = frozenset().union(*(lexicon(language).cases.folded for language in LANGUAGES))
MEANINGFUL: Final = frozenset().union(*(lexicon(language).cases.meaningful for language in LANGUAGES))
"""Both of all languages: names travel."""
