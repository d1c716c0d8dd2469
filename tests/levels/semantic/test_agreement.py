"""With a real encoder: what says the same, and what only looks so."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cache

import pytest

from anaphora.backends.encoders.minilm import MiniLM
from anaphora.levels.semantic.agreement import MAX_SENTENCES, agree
from anaphora.levels.semantic.comparing import Vector


@cache
def encoder() -> MiniLM:
    return MiniLM(threads=1)


async def embed(texts: Sequence[str]) -> Vector:
    return encoder().encode(texts)


def agrees(first: str, second: str) -> bool:
    answers = asyncio.run(agree(first, second, embed)), asyncio.run(agree(second, first, embed))
    assert answers[0] == answers[1]
    return answers[0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Paris.", "paris"),
        ("The capital of France is Paris.", "Paris is the capital of France."),
        ("You can cancel it in the settings.", "You can cancel it in settings."),
    ],
)
def test_what_says_the_same_agrees(first: str, second: str) -> None:
    assert agrees(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("The capital of France is Paris.", "The capital of France is Lyon."),
        ("It costs 5 euros a month.", "It costs 50 euros a month."),
        ("You can cancel it.", "You cannot cancel it."),
        ("Yes.", "No."),
        ("Turn it on in the settings.", "Turn it off in the settings."),
        ("Click on the link.", "Wood floats because it is lighter than water."),
        ("Paris.", "Paris. But the government sits in Versailles on Sundays, and the king lives elsewhere."),
        ("Paris.", ""),
        ("", "..."),
    ],
)
def test_what_differs_in_one_point_does_not(first: str, second: str) -> None:
    assert not agrees(first, second)


def test_a_long_answer_agrees_with_nothing_but_itself() -> None:
    long = " ".join(f"Sentence number {number}." for number in range(MAX_SENTENCES + 1))
    assert agrees(long, long)
    assert not agrees(long, f"{long} The end")
