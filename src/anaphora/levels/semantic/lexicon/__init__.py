"""Words that change what a question asks, as data: one file per language, read once."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from anaphora.levels.semantic.lexicon.stems import Endings, stem_of

Language = Literal["en", "es", "ru"]
LANGUAGES: tuple[Language, ...] = ("en", "es", "ru")


class Cases(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the case of letters carries meaning."""

    meaningful: frozenset[str]
    """Written with a capital these are something else: Polish, polish."""
    folded: frozenset[str]
    """Of letters that mean the same in any case: API, iPhone. In lower case."""


class Lexicon(msgspec.Struct, frozen=True):
    """What is known of one language. Groups of words are by the name of their group."""

    language: Language
    function: frozenset[str]
    """Words without content of their own."""
    asking: frozenset[str]
    """First words of what is a question in any punctuation."""
    contractions: dict[str, tuple[str, ...]]
    irregular: dict[str, str]
    cases: Cases
    endings: Endings

    def stem(self, word: str) -> str:
        """What the forms of a word in lower case have in common."""
        return self.irregular.get(word) or stem_of(word, self.endings)


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """How a lexicon is written: lists as text, words apart by spaces."""

    function: str
    asking: str
    contractions: dict[str, str] = {}
    irregular: dict[str, str] = {}
    meaningful: str
    folded: str
    endings: str
    shortest: int


@cache
def lexicon(language: Language) -> Lexicon:
    """Raises OSError or ValueError where the data of the package is damaged."""
    text = (Path(__file__).parent / f"{language}.toml").read_text(encoding="utf-8")
    file = msgspec.convert(tomllib.loads(text), _File)
    return Lexicon(
        language=language,
        function=frozenset(file.function.split()),
        asking=frozenset(file.asking.split()),
        contractions={short: tuple(long.split()) for short, long in file.contractions.items()},
        irregular={form: base for base, forms in file.irregular.items() for form in forms.split()},
        cases=Cases(frozenset(file.meaningful.split()), frozenset(file.folded.split())),
        endings=Endings(tuple(sorted(file.endings.split(), key=len, reverse=True)), file.shortest),
    )


def _foreign() -> frozenset[str]:
    text = (Path(__file__).parent / "foreign.toml").read_text(encoding="utf-8")
    return frozenset(word for words in tomllib.loads(text).values() for word in words.split())


FOREIGN = _foreign()
"""Small words of languages that have no lexicon."""
