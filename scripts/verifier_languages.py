"""Rows in Spanish and Russian, for the model that looks at nothing but words that agree: questions written for this purpose,
changed by rule."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Final

from verifier_edits import Edit, edited, exchanged_for, lessened, mistyped, recased, vocabulary
from verifier_rows import OWN, Row, own_groups

from anaphora.levels.semantic.lexicon import Language, lexicon
from anaphora.levels.semantic.texts import prepare

LANGUAGES: Final[tuple[Language, ...]] = ("es", "ru")
BEFORE: Final = {
    "es": ["Por favor, ", "Hola, ", "Buenas, ", "Perdona, ", "Una pregunta: "],
    "ru": ["Пожалуйста, ", "Здравствуйте, ", "Привет, ", "Извините, ", "Вопрос: "],
}
AFTER: Final = {
    "es": [", gracias", " por favor", ", por favor?", ". Gracias", " gracias de antemano"],
    "ru": [", спасибо", " пожалуйста", ", пожалуйста?", ". Спасибо", " заранее спасибо"],
}
ROUNDS: Final = 4


def unaccented(text: str, dice: random.Random) -> str | None:
    return text.translate(str.maketrans("áéíóúüёÁÉÍÓÚÜЁ", "aeiouuеAEIOUUЕ"))


def replaced_by(text: str, words: list[str], language: Language, dice: random.Random) -> str | None:
    """Any word for any other. One small word for another may say the same, but for those that ask."""
    known = lexicon(language)
    fits = [token for token in prepare(text).tokens if token.text.isalpha() and token.low not in known.courtesy]
    if not fits:
        return None
    token, other = dice.choice(fits), dice.choice(words)
    small = not token.content and token.low not in known.interrogatives
    if (small and other in known.function) or other in (token.low, token.stem):
        return None
    return _put(text, token.text, other)


def unasked(text: str, language: Language, dice: random.Random) -> str | None:
    """Without the word that says what is asked for; how to do something may be asked without it."""
    asked = lexicon(language).interrogatives
    fits = [token for token in prepare(text).tokens if asked.get(token.low, "how") != "how"]
    return _put(text, dice.choice(fits).text, "") if fits else None


def _put(text: str, old: str, new: str) -> str | None:
    changed, times = re.subn(rf"\b{re.escape(old)}\b" + ("" if new else " ?"), new, text, count=1)
    return changed if times and changed != text else None


def other_rows(dice_of: Callable[[str], random.Random]) -> list[Row]:
    """Those whose label is known, as in English."""
    return [
        row._replace(source=language)
        for language in LANGUAGES
        for row in dict.fromkeys(_rows(language, dice_of))
        if row.a != row.b
    ]


def _rows(language: Language, dice_of: Callable[[str], random.Random]) -> Iterator[Row]:
    words = vocabulary(OWN / language)
    every = sorted(
        {token.low for _, lines in own_groups(OWN / language) for _, text in lines for token in prepare(text).tokens}
    )

    def polite(text: str, dice: random.Random) -> str | None:
        if dice.random() < 0.5:
            bare = text.lstrip("¿")
            return dice.choice(BEFORE[language]) + "¿" * (bare != text) + bare[:1].lower() + bare[1:]
        return text.rstrip("?") + dice.choice(AFTER[language])

    def exchanged(text: str, dice: random.Random) -> str | None:
        return exchanged_for(text, words, dice)

    same: list[tuple[Edit, float]] = [(recased, 1.0), (mistyped, 2.0), (polite, 2.0), (unaccented, 0.5)]

    def replaced(text: str, dice: random.Random) -> str | None:
        return replaced_by(text, every, language, dice)

    def without_asking(text: str, dice: random.Random) -> str | None:
        return unasked(text, language, dice)

    other: list[tuple[Edit, float]] = [(lessened, 1.0), (exchanged, 1.0), (replaced, 2.0), (without_asking, 0.5)]
    for file, lines in own_groups(OWN / language):
        name = f"own/{language}/{file}/{lines[0][1]}"
        dice = dice_of(name)
        alike = [text for kind, text in lines if not kind.startswith("trap")]
        traps = [text for kind, text in lines if kind.startswith("trap")]
        for place, one in enumerate(alike):
            yield from (Row(one, text, True, name, f"{language} written", 2.0) for text in alike[place + 1 :])
            yield from (Row(one, text, False, name, f"{language} trap", 2.0) for text in traps)
        for _, text in lines:
            for _ in range(ROUNDS):
                near, change = edited(text, same, dice), edited(text, other, dice)
                if near is not None:
                    yield Row(text, near[0], True, name, f"{language} {near[1]}", 2.0)
                    if (again := edited(near[0], same, dice)) is not None:
                        yield Row(text, again[0], True, name, f"{language} twice", 2.0)
                if change is not None:
                    yield Row(text, change[0], False, name, f"{language} {change[1]}", 2.0)
                    if near is not None:
                        yield Row(near[0], change[0], False, name, f"{language} {change[1]} edited", 2.0)
