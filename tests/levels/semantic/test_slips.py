"""Slips of the pen are told from other words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.levels.semantic.slips import distance, is_slip, is_typo

words = st.text(alphabet="abcdeéñя", min_size=1, max_size=10)


@pytest.mark.parametrize(("one", "other"), [("which", "wihch"), ("cancel", "cancle"), ("qué", "que"), ("ещё", "еще")])
def test_swapped_letters_and_accents_left_out_are_slips(one: str, other: str) -> None:
    assert is_slip(one, other)


@pytest.mark.parametrize(("one", "other"), [("which", "amazon"), ("to", "in"), ("lock", "clock"), ("sí", "no")])
def test_another_word_is_none(one: str, other: str) -> None:
    assert not is_slip(one, other)


def test_accents_count_in_words_that_differ_otherwise() -> None:
    assert not is_typo("qué", "que")
    assert not is_slip("qué", "fue")


@given(words, words, words)
def test_the_distance_is_one_both_ways_and_nothing_for_equal_words(one: str, other: str, third: str) -> None:
    assert distance(one, other) == distance(other, one)
    assert (distance(one, other) == 0) == (one == other)
    assert is_slip(one, other) == is_slip(other, one)
    assert distance(one + third, other + third) <= distance(one, other)
