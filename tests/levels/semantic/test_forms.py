"""What is kept of a text says of it what the text itself says, and what cannot be used is of no harm."""

from __future__ import annotations

import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.levels.semantic.features import features, plain_features
from anaphora.levels.semantic.forms import form_of, recalled, version
from anaphora.levels.semantic.guards import refusal
from anaphora.levels.semantic.reading import Reading
from anaphora.levels.semantic.texts import LONGEST, Prepared, prepare
from anaphora.levels.semantic.verifier import shipped

SAID = (
    "How do I can't won't cancel my 3 30 two hundred $5.50 5 km 10 miles from to before Monday London New York VPN `a b` "
    "C++ --force ¿Cómo не как заказ мой on off turn not John's the was bought by Adam than only , . ? ! : -"
)
TEXTS = [
    "How do I cancel order 3 before Monday?",
    "Can't I turn it off? It's John's.",
    "What was bought by Adam for $1,000.50 in New York?",
    "Why does getUser() in app/main.py fail with C++ at 5 p.m.?",
    "Is twenty-five miles more than 40 km?",
    "¿Cómo cambio mi contraseña sin el móvil?",
    "Почему мой заказ № 15 не доставлен до понедельника?",
]


def pairs() -> list[tuple[str, str]]:
    found = []
    for path in sorted(Path(__file__).parent.glob("traps_*.toml")):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        found += [(row[-2], row[-1]) for row in (*table["traps"], *table["good"])]
    return found


def whole(prepared: Prepared) -> dict[str, Any]:
    return {field: getattr(prepared, field) for field in prepared.__struct_fields__}


def again(text: str) -> Prepared:
    return recalled(text, form_of(prepare(text)))


@given(st.lists(st.sampled_from(SAID.split()), max_size=14).map(" ".join) | st.text(alphabet=st.characters(codec="utf-8")))
def test_a_text_that_was_kept_is_the_text_taken_apart(text: str) -> None:
    assert whole(again(text)) == whole(prepare(text))


@pytest.mark.parametrize(("one", "other"), pairs())
def test_guards_and_verifier_say_the_same_of_what_was_kept(one: str, other: str) -> None:
    a, b, kept = prepare(one), prepare(other), again(other)
    assert form_of(b)  # else nothing is tested
    assert whole(kept) == whole(b)
    assert refusal(a, kept) == refusal(a, b)
    fresh, read = Reading(b), Reading(kept)
    assert features(Reading(a), read, 0.8) == features(Reading(a), fresh, 0.8)
    assert plain_features(read, Reading(a)) == plain_features(fresh, Reading(a))
    assert shipped().probability(a, kept, 0.8) == shipped().probability(a, b, 0.8)


@pytest.mark.parametrize("form", [b"", b"\x00", version(), version() + b"\x9c\x01", b"    " + form_of(prepare("a"))[4:]])
def test_a_text_without_a_form_that_can_be_used_is_taken_apart_again(form: bytes) -> None:
    assert whole(recalled(TEXTS[0], form)) == whole(prepare(TEXTS[0]))


def test_of_a_text_that_is_not_taken_apart_nothing_is_kept() -> None:
    assert form_of(prepare("a " * LONGEST)) == b""
    assert form_of(prepare("?")) == b""


def test_a_form_is_a_few_hundred_bytes() -> None:
    assert max(len(form_of(prepare(text))) for text in TEXTS) < 400


def test_forms_have_the_number_of_how_texts_are_taken_apart() -> None:
    """Where this fails because rules changed and not words of the lexicon, raise `FORM`; then write the new sum down."""
    said = msgspec.json.Encoder(order="deterministic").encode([again(text) for text in TEXTS])
    assert sha256(said).hexdigest()[:12] == "a09c7cfd3751"
