"""The verifier that is shipped: what it says, that it says the same again, and what it says of nonsense."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anaphora.levels.semantic.comparing import MIN_SCORE
from anaphora.levels.semantic.guards import refusal
from anaphora.levels.semantic.texts import prepare
from anaphora.levels.semantic.verifier import MOST, Verifier

GOLDEN = Path(__file__).parent / "verifier_golden.json"
WORDS = ["how", "do", "I", "not", "can", "cancel", "my", "card", "3", "30", "London", "from", "to", "before", "?", "по", "la"]
verifier = Verifier.load()


@pytest.mark.parametrize("row", json.loads(GOLDEN.read_text(encoding="utf-8")), ids=lambda row: row["b"][:40])
def test_the_shipped_weights_give_the_probabilities_they_were_shipped_with(row: dict[str, Any]) -> None:
    given_now = verifier.probability(prepare(row["a"]), prepare(row["b"]), row["similarity"])

    assert given_now == pytest.approx(row["probability"], abs=1e-3)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("How do I turn on notifications?", "How do I turn off notifications?"),
        ("Can I fly from Oslo to Rome?", "Can I fly from Rome to Oslo?"),
        ("What is the limit for 3 users?", "What is the limit for 30 users?"),
        ("Does the fee apply before the trial?", "Does the fee apply after the trial?"),
        ("How do I unlock the account?", "How do I lock the account?"),
    ],
)
def test_what_turns_a_question_around_is_no_sure_answer_however_alike_the_vectors_are(a: str, b: str) -> None:
    one, other = prepare(a), prepare(b)

    assert refusal(one, other) is not None or verifier.probability(one, other, 0.99) < verifier.threshold


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("How do I change my email address?", "How can I change my email address?"),
        ("How do I cancel my subscription?", "how do i cancle my subscription"),
        ("What is the price of the pro plan?", "What's the price of the pro plan, please?"),
    ],
)
def test_the_same_question_slightly_changed_is_a_candidate(a: str, b: str) -> None:
    assert verifier.probability(prepare(a), prepare(b), 0.95) >= MIN_SCORE


@pytest.mark.parametrize(
    ("a", "b", "served"),
    [
        ("¿Cómo puedo cancelar mi suscripción?", "cómo puedo cancelar mi suscripción, gracias", True),
        ("¿Cómo puedo cancelar mi suscripción?", "¿Cómo puedo renovar mi suscripción?", False),
        ("Как мне отменить подписку?", "как мне отменить подписку, пожалуйста", True),
        ("Как мне отменить подписку?", "Как мне продлить подписку?", False),
        ("How do I cancel my subscription?", "¿Cómo puedo cancelar mi suscripción?", False),
    ],
)
def test_in_other_languages_only_the_same_words_are_served(a: str, b: str, served: bool) -> None:
    assert (verifier.probability(prepare(a), prepare(b), 0.95) >= verifier.plain_threshold) is served


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("¿Puedo devolver unos zapatos usados?", "¿Puedo devolver unos zapatos?"),
        ("Можно ли вернуть ношеную обувь?", "Можно ли вернуть обувь?"),
        ("¿Quién dirige el archivo de la ciudad?", "¿dirige el archivo de la ciudad?"),
        ("Почему закрыт городской архив?", "закрыт городской архив?"),
    ],
)
def test_in_other_languages_one_word_less_is_another_question(a: str, b: str) -> None:
    assert verifier.probability(prepare(a), prepare(b), 0.95) < MIN_SCORE


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("В каком здании находится архив города?", "В мраморе здании находится архив города?"),
        ("Почему закрыт городской архив?", "Жатва закрыт городской архив?"),
        ("Кто жил между рекой и лесом до войны?", "Кто жил ветер рекой и лесом до войны?"),
        ("¿Quién dirige el archivo de la ciudad?", "¿Mármol dirige el archivo de la ciudad?"),
        ("¿Quién vive entre la estación y el parque?", "¿Quién vive cosecha la estación y el parque?"),
    ],
)
def test_in_other_languages_no_small_word_is_taken_for_another(one: str, other: str) -> None:
    assert verifier.probability(prepare(one), prepare(other), 0.99) < MIN_SCORE


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Какой архив хранит старые карты?", "Каокй архив хранит старые карты?"),
        ("¿Quién dirige el archivo de la ciudad?", "quien dirige el archivo de la ciudad"),
        ("¿Cuándo abre el archivo de la ciudad?", "Hola, ¿cuándo abre el archivo de la ciudad? Gracias"),
    ],
)
def test_in_other_languages_slips_of_small_words_and_thanks_are_served(one: str, other: str) -> None:
    assert verifier.probability(prepare(one), prepare(other), 0.95) >= verifier.plain_threshold


SAY = """
from anaphora.levels.semantic.texts import prepare
from anaphora.levels.semantic.verifier import shipped
one = "I tried to make a transfer and it didn't work."
other = (
    "I'm trying to make a bank transfer but It's not going through. Could there not be enough funds to transfer "
    "or something? Have I done it too many times?"
)
print(shipped().probability(prepare(one), prepare(other), 0.8))
"""


def test_a_probability_is_the_same_in_every_process() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", SAY],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(5)
    }

    assert len(said) == 1


questions = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
)


@settings(deadline=None)
@given(questions, questions, st.floats(-1, 1, width=32))
def test_a_probability_is_symmetric_the_same_again_and_never_certain(a: str, b: str, similarity: float) -> None:
    one, other = prepare(a), prepare(b)

    probability = verifier.probability(one, other, similarity)

    assert 0.0 <= probability <= MOST
    assert probability == verifier.probability(other, one, similarity) == Verifier.load().probability(one, other, similarity)
