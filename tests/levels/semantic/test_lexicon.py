"""The lexicons hang together: what one file names, the others know."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from anaphora.levels.semantic.lexicon import FOREIGN, LANGUAGES, Language, Mark, lexicon, units


def marks(language: Language) -> list[Mark]:
    words = lexicon(language)
    tables = chain(words.words.values(), words.stems.values(), words.starts.values())
    phrases = (phrase.marks for known in words.phrases.values() for phrase in known)
    return [mark for found in (*tables, *phrases) for mark in found]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_unit_is_one_that_can_be_compared(language: Language) -> None:
    assert {value for group, value in marks(language) if group == "unit"} <= units().keys()


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_pair_of_opposites_has_two_sides(language: Language) -> None:
    sides = Counter(value[1:] for value in {value for group, value in marks(language) if group == "opposite"})
    assert set(sides.values()) == {2}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_the_same_groups(language: Language) -> None:
    # Only English has a form that is another word in the passive.
    assert {group for group, _ in marks(language)} | {"passive"} == {group for group, _ in marks("en")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_small_words_of_a_language_are_not_taken_for_those_of_another(language: Language) -> None:
    assert not FOREIGN & lexicon(language).function


@pytest.mark.parametrize(
    ("language", "forms"),
    [
        ("en", ["cancel", "cancels"]),
        ("en", ["stop", "stopped", "stopping"]),
        ("en", ["buy", "bought", "buying"]),
        ("es", ["factura", "facturas"]),
        ("es", ["cancelar", "cancelado", "cancelando"]),
        ("ru", ["москва", "москве", "москву", "москвой"]),
        ("ru", ["пароль", "пароля", "паролю", "паролем"]),
    ],
)
def test_forms_of_a_word_have_one_stem(language: Language, forms: list[str]) -> None:
    assert len({lexicon(language).stem(form) for form in forms}) == 1
