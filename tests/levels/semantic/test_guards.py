"""Guards refuse what is plainly another question, and let pass what is plainly the same."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.levels.semantic.guards import GUARDS, refusal
from anaphora.levels.semantic.texts import LONGEST, normal_form, prepare

HERE = Path(__file__).parent
SETS = {
    language: tomllib.loads((HERE / f"traps_{language}.toml").read_text(encoding="utf-8")) for language in ("en", "es", "ru")
}
TRAPS: list[tuple[str, str, str]] = [tuple(row) for pairs in SETS.values() for row in pairs["traps"]]
GOOD: list[tuple[str, str]] = [tuple(row) for pairs in SETS.values() for row in pairs["good"]]


def _differ(guard: str, one: str, other: str) -> bool:
    return GUARDS[guard](prepare(one), prepare(other))


@pytest.mark.parametrize(("guard", "one", "other"), TRAPS)
def test_a_trap_is_refused_by_its_guard(guard: str, one: str, other: str) -> None:
    assert _differ(guard, one, other)
    assert refusal(prepare(one), prepare(other)) is not None


@pytest.mark.parametrize(("one", "other"), GOOD)
def test_the_same_question_passes(one: str, other: str) -> None:
    assert refusal(prepare(one), prepare(other)) is None


@pytest.mark.parametrize("language", SETS)
def test_every_guard_has_a_trap_in_every_language(language: str) -> None:
    traps = SETS[language]["traps"]
    assert len(traps) + len(SETS[language]["good"]) >= 60
    # Spanish says whose by `su`, of men and women alike.
    assert set(GUARDS) - {guard for guard, _, _ in traps} <= {"unread", "person"}


texts = st.one_of(
    st.text(),
    st.lists(st.sampled_from([word for _, *pair in TRAPS for text in pair for word in text.split()]), max_size=12).map(
        " ".join
    ),
    st.sampled_from([text for _, *pair in TRAPS for text in pair]),
)


@given(texts, texts)
def test_who_comes_first_makes_no_difference(one: str, other: str) -> None:
    assert refusal(prepare(one), prepare(other)) == refusal(prepare(other), prepare(one))


@given(
    texts, st.sampled_from([str.upper, str.lower, str.title, str.strip, lambda text: f"  {text}  ", lambda text: text + "."])
)
def test_equal_normal_forms_are_never_refused(text: str, change: object) -> None:
    changed = change(text)  # type: ignore[operator]
    if normal_form(changed) == normal_form(text):
        assert refusal(prepare(text), prepare(changed)) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Wie ändere ich das Passwort?", "Wie kann ich das Passwort ändern?"),
        ("如何更改密码", "怎么更改密码"),
        ("Is it?", "Are they?"),
        ("a " * LONGEST, "b " * LONGEST),
    ],
)
def test_what_cannot_be_read_is_refused(one: str, other: str) -> None:
    assert refusal(prepare(one), prepare(other)) in ("language", "unread")
