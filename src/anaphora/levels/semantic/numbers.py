"""The numbers of a text, in digits or words, with the units they are of. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from anaphora.levels.semantic.lexicon import Lexicon, units
from anaphora.levels.semantic.tokens import Token


class Number(msgspec.Struct, frozen=True, gc=False, array_like=True):
    value: str
    """In one way of writing."""
    unit: str
    """As in lexicon/units.toml; empty without one."""
    amount: tuple[str, float] | None
    """Of what and how much, in the base of its dimension, where that can be said."""
    soft: bool
    """Of a word that is often no number: one, second."""
    beside: str
    """Stem of the word after it."""


_SIGNS = {"$": "dollar", "€": "euro", "£": "gbp", "¥": "yen", "₽": "rouble", "%": "percent"}
_PARTS = re.compile(r"(?P<sign>[+-]?)(?P<before>[$€£¥₽]?)(?P<digits>\d[\d.,:/ \u202f-]*)(?P<after>.*)", re.DOTALL)
_THOUSANDS = {
    "en": re.compile(r"\d{1,3}(?:[, \u202f]\d{3})+(?:\.\d+)?"),
    "es": re.compile(r"\d{1,3}(?:[. \u202f]\d{3})+(?:,\d+)?"),
    "ru": re.compile(r"\d{1,3}(?:[ \u202f.]\d{3})+(?:,\d+)?"),
}
_SCALES = {"100", "1000", "1000000", "1000000000", "1000000000000"}


def numbers_of(tokens: Sequence[Token], words: Lexicon) -> tuple[Number, ...]:
    numbers: list[Number] = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        if token.kind == "word" and not token.marks and "-" not in token.low:
            place += 1
            continue
        if token.kind == "number":
            values, unit = _digits(token.text, words)
            after = place + 1
            if len(values) == 1 and after < len(tokens) and (scale := _value(tokens, after, words)) in _SCALES:
                values, after = [_scaled(values[0], scale)], after + 1
            soft = False
        elif (value := _value(tokens, place, words)) is not None:
            value, after, soft = _spelled(tokens, place, value, words)
            values, unit = [value], ""
        else:
            place += 1
            continue
        if not unit:
            unit = _unit(tokens, after, words)
        beside = tokens[after].stem if after < len(tokens) and not tokens[after - 1].after else ""
        numbers += [Number(value, unit, _amount(value, unit), soft, beside) for value in values]
        place = after
    return tuple(numbers)


def _value(tokens: Sequence[Token], place: int, words: Lexicon) -> str | None:
    token = tokens[place]
    if token.kind != "word" or (token.low in words.attached and (place == 0 or tokens[place - 1].kind != "number")):
        return None
    if "-" not in token.low:
        for group, value in token.marks:
            if group == "number":
                return value
        return None
    # twenty-one
    values = [value for part in token.low.split("-") for group, value in words.marks(part) if group == "number"]
    return _written(float(values[0]) + float(values[1])) if len(values) == 2 else None


def _spelled(tokens: Sequence[Token], place: int, value: str, words: Lexicon) -> tuple[str, int, bool]:
    """Twenty five, two hundred, three million five hundred."""
    soft = tokens[place].low in words.soft
    whole, part = 0.0, 0.0
    after = place
    following: str | None = value
    while following is not None:
        number = float(following)
        if number >= 1000 and following in _SCALES:
            whole, part = whole + max(part, 1) * number, 0.0
        elif following == "100" and part < 10:
            part = max(part, 1) * number
        elif (
            after == place
            or part == 0
            or (part % 100 == 0 and 1 <= number < 100)
            or (part % 10 == 0 and part % 100 >= 20 and 1 <= number < 10)
        ):
            part += number
        else:
            break
        after += 1
        following = _value(tokens, after, words) if after < len(tokens) and not tokens[after - 1].after else None
    return _written(whole + part), after, soft and after == place + 1


def _digits(text: str, words: Lexicon) -> tuple[list[str], str]:
    """Values and the unit of a token: several of a range."""
    parts = _PARTS.fullmatch(text)
    if parts is None:
        return [text], ""
    digits = parts["digits"].strip()
    unit = _SIGNS.get(parts["before"]) or _SIGNS.get(parts["after"].strip(), "")
    if _THOUSANDS[words.language].fullmatch(digits):
        comma = "." if words.language == "en" else ","
        whole, _, rest = digits.partition(comma)
        digits = re.sub(r"[., \u202f]", "", whole) + (f".{rest}" if rest else "")
    elif words.language != "en" and re.fullmatch(r"\d+,\d+", digits):
        digits = digits.replace(",", ".")
    if re.fullmatch(r"[\d.,]+-[\d.,]+", digits):
        return [piece for piece in digits.split("-") if piece], unit
    digits = re.sub(r"^0+(?=\d)", "", digits) if re.fullmatch(r"0\d(?::\d\d)?", digits) else digits
    if ":" in digits:
        digits = digits.removesuffix(":00")
    sign = "-" if parts["sign"] == "-" else ""
    return [sign + digits], unit


def _scaled(value: str, scale: str) -> str:
    try:
        return _written(float(value) * float(scale))
    except ValueError:
        return f"{value}*{scale}"


def _written(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _unit(tokens: Sequence[Token], place: int, words: Lexicon) -> str:
    if place >= len(tokens) or tokens[place - 1].after.strip("-"):
        return ""
    low = tokens[place].low
    if tokens[place - 1].text.endswith("°"):
        return {"c": "celsius", "f": "fahrenheit"}.get(low, "")
    return next((value for group, value in tokens[place].marks if group == "unit"), "")


def _amount(value: str, unit: str) -> tuple[str, float] | None:
    known = units().get(unit)
    if known is None or known.factor == 0:
        return None
    try:
        return known.dimension, float(f"{float(value) * known.factor:.9g}")
    except ValueError:
        return None
