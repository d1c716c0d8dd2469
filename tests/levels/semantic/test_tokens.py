"""How a text is cut: what is cut at once comes out as if it had been cut piece by piece."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from anaphora.levels.semantic import tokens
from anaphora.levels.semantic.tokens import pieces_of


@given(st.from_regex(tokens._PLAIN, fullmatch=True))
@example("How can't I sign-up, my friend; in the U.")
@example("I")
@example("Я не могу, а ты?")
def test_a_plain_text_is_cut_as_any_other(text: str) -> None:
    assert pieces_of(text) == tokens._cut(text)


@given(st.text(alphabet="aAbIяЯ'-.,;?!: \n5_/@+#`", max_size=20))
@example("aVa")
@example("the C++ file.")
@example("Good night! ")
def test_any_text_is_cut_in_one_way(text: str) -> None:
    assert pieces_of(text) == tokens._cut(text)


def test_what_opens_a_sentence_and_the_marks_are_kept() -> None:
    assert pieces_of("Well, who asks?") == [
        ("word", "Well", True, ","),
        ("word", "who", False, ""),
        ("word", "asks", False, "?"),
    ]
