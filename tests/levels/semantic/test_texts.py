"""Texts are the same where they differ in looks alone, and stay different where a reader would see a difference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.levels.semantic.texts import LONGEST, language_of, normal_form, prepare

SAME = [
    ("How do I reset my password?", "how do i reset my password"),
    ("how do I reset my password ?!", "How do I  reset my password?"),
    ("What’s the capital of France?", "what's the capital of france"),
    ("¿Cómo cambio mi contraseña?", "cómo cambio mi contraseña"),
    ("Как сменить пароль?", "КАК СМЕНИТЬ ПАРОЛЬ"),
    ("Which API do you mean", "which api do you mean"),
    ("Is my iPhone «new»?", 'is my iphone "new"'),
    ("Temperature of −5\u00a0degrees", "temperature of -5 degrees."),
]
OTHER = [
    ("Who leads US troops?", "Who leads us troops?"),
    ("Where can I buy Polish remover?", "Where can I buy polish remover?"),
    ("Is C++ hard?", "Is C hard?"),
    ("Convert -5 to hex", "Convert 5 to hex"),
    ("What is 3.5 + 1", "What is 35 + 1"),
    ("Let's eat, grandma", "Let's eat grandma"),
    ("This works.", "This works?"),
    ("What is 5!", "What is 5"),
    ("Is x = getValue ok", "Is x = getvalue ok"),
    ("What is 4²", "What is 42"),
    ("Mi papa come", "Mi papá come"),
    ("Это всё?", "Это все?"),
    ("if x:\n    a()\nb()", "if x:\n    a()\n    b()"),
    ("Run `A`", "Run `a`"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_looks_make_no_difference(one: str, other: str) -> None:
    assert normal_form(one) == normal_form(other)


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_what_may_change_the_meaning_stays(one: str, other: str) -> None:
    assert normal_form(one) != normal_form(other)


@given(st.text())
def test_a_normal_form_is_its_own_normal_form(text: str) -> None:
    assert normal_form(normal_form(text)) == normal_form(text)


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_can_be_prepared(text: str) -> None:
    prepared = prepare(text)
    assert prepared.text == text
    assert prepared.normal == normal_form(text)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("How do I export my data?", "en"),
        ("¿Cuándo llega mi pedido?", "es"),
        ("donde puedo ver mi factura", "es"),
        ("Когда приедет мой заказ?", "ru"),
        ("Wie kann ich das Passwort ändern?", ""),
        ("Comment est-ce que je change le mot de passe dans Outlook", ""),
        ("Як змінити пароль і пошту?", ""),
        ("如何更改密码", ""),
    ],
)
def test_a_language_is_known_by_its_small_words_and_letters(text: str, language: str) -> None:
    assert language_of(text) == language


def test_names_in_code_addresses_and_numbers_are_tokens_of_their_own() -> None:
    tokens = prepare("Why does getUser() in app/main.py send C# 1,000.50 to a.b@c.com at 5 p.m.?").tokens
    assert [token.text for token in tokens if token.kind == "code"] == ["getUser()", "app/main.py", "C#", "a.b@c.com"]
    assert [token.text for token in tokens if token.kind == "number"] == ["1,000.50", "5"]
    assert tokens[-1].low == "pm"


def test_contractions_are_two_words() -> None:
    assert [token.low for token in prepare("It doesn't work, I'm lost").tokens] == [
        "it",
        "does",
        "not",
        "work",
        "i",
        "am",
        "lost",
    ]


def test_a_document_is_not_taken_apart() -> None:
    assert prepare("word " * LONGEST).tokens == ()
