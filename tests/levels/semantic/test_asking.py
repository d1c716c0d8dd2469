"""What is asked for may be worded freely, but not exchanged where all else stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.levels.semantic.asking import asks_otherwise
from anaphora.levels.semantic.lexicon import LANGUAGES, Language, lexicon
from anaphora.levels.semantic.texts import prepare

ASKED: dict[Language, str] = {
    "en": "In {} valley did the old railway end?",
    "es": "¿En {} valle terminaba el viejo ferrocarril?",
    "ru": "В {} долине кончалась старая железная дорога?",
}
THINGS: dict[Language, list[str]] = {
    "en": ["marble", "harvest", "window"],
    "es": ["mármol", "cosecha", "ventana"],
    "ru": ["мрамор", "жатва", "окно"],
}


@given(st.data())
def test_whatever_asks_for_something_a_thing_in_its_place_does_not(data: st.DataObject) -> None:
    language = data.draw(st.sampled_from(LANGUAGES))
    asking = data.draw(st.sampled_from(sorted(lexicon(language).interrogatives)))
    one = prepare(ASKED[language].format(asking))
    other = prepare(ASKED[language].format(data.draw(st.sampled_from(THINGS[language]))))
    assert asks_otherwise(one, other)
    assert asks_otherwise(other, one)
    assert not asks_otherwise(one, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who built the old mill?", "When was the old mill built?"),  # nothing stands in its place: the other guards' part
        ("Where is the mill?", "Tell me the location of the mill"),
        ("Why did the order fail?", "reason the order failed"),
        ("What is the deadline?", "When is the deadline?  What date?"),
        ("Which mill burnt?", "hwich mill burnt"),
        ("Сколько дней в году?", "число дней в году"),
        ("¿Cuántos días tiene el año?", "número de días que tiene el año"),
    ],
)
def test_what_is_worded_freely_is_left_to_the_verifier(one: str, other: str) -> None:
    assert not asks_otherwise(prepare(one), prepare(other))
    assert not asks_otherwise(prepare(other), prepare(one))


@pytest.mark.parametrize("language", LANGUAGES)
def test_words_for_what_is_asked_are_of_something_that_can_be_asked(language: Language) -> None:
    words = lexicon(language)
    assert words.named.keys() <= set(words.interrogatives.values())
    assert not words.courtesy & words.interrogatives.keys()
