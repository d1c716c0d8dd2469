"""Numbers are read in digits and in words, as each language writes them."""

from __future__ import annotations

import pytest

from anaphora.levels.semantic.texts import prepare

CASES = [
    ("What is 1,500.50 plus 3?", ["1500.50", "3"]),
    ("¿Cuánto es 1.500,50 más 3?", ["1500.50", "3"]),
    ("Сколько будет 1 500,50 и 3?", ["1500.50", "3"]),
    ("How do I split twenty-one by twenty two?", ["21", "22"]),
    ("Is three million five hundred a lot?", ["3000500"]),
    ("Is 5 million a lot?", ["5000000"]),
    ("Pages 10-20 of the book", ["10", "20"]),
    ("How cold is -5 degrees?", ["-5"]),
    ("Meet at 05:30 or 7:00", ["5:30", "7"]),
    ("The 3rd and the 21st", ["3", "21"]),
    ("Python 3.10 or 3.1?", ["3.10", "3.1"]),
    ("¿Cuánto son veinticinco y cien?", ["25", "100"]),
    ("Сколько будет двадцать пять и сорок?", ["25", "40"]),
]


@pytest.mark.parametrize(("text", "values"), CASES)
def test_a_number_has_one_way_of_writing(text: str, values: list[str]) -> None:
    assert [number.value for number in prepare(text).facts.numbers] == values


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Wait 90 minutes", "Wait 1.5 hours"),
        ("A 2 kg parcel", "A 2000 g parcel"),
        ("Within 14 days", "Within 2 weeks"),
        ("En 90 minutos", "En 1,5 horas"),
        ("За 60 минут", "За 1 час"),
    ],
)
def test_amounts_are_equal_in_any_unit(one: str, other: str) -> None:
    amounts = [[number.amount for number in prepare(text).facts.numbers] for text in (one, other)]
    assert amounts[0] == amounts[1] != [None]


def test_a_currency_or_percent_sign_is_a_unit() -> None:
    assert [number.unit for number in prepare("Is $5, 5 €, 5% or 5 dollars more?").facts.numbers] == [
        "dollar",
        "euro",
        "percent",
        "dollar",
    ]


def test_words_that_are_often_no_numbers_are_soft() -> None:
    assert [number.soft for number in prepare("Which one of the two comes first?").facts.numbers] == [True, False, True]
