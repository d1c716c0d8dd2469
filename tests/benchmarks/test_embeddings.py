"""What the benchmarks of embeddings are asked."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def source(script: Callable[[str], Any]) -> Any:
    return script("embeddings_texts.py")


@pytest.mark.parametrize(("num_draws", "repeats"), [(768, 0.6), (4096, 0.6), (1000, 0.9), (1000, 0.5)])
def test_as_many_of_the_draws_are_repeats_as_were_asked_for(source: Any, num_draws: int, repeats: float) -> None:
    pool = [str(number) for number in range(20_000)]
    asked = source.drawn(num_draws, repeats, pool, random.Random(1))
    assert len(asked) == num_draws
    assert 1 - len(set(asked)) / num_draws == pytest.approx(repeats, abs=0.04)


def test_the_first_texts_are_drawn_most_often(source: Any) -> None:
    asked = source.drawn(4096, 0.6, [str(number) for number in range(20_000)], random.Random(1))
    assert asked.count("0") > 1.5 * asked.count("1") > 1.5 * asked.count("9") > 0


def test_made_up_texts_are_all_different_and_always_the_same(source: Any) -> None:
    made_up = source.made_up(3000)
    assert len(set(made_up)) == 3000
    assert made_up == source.made_up(3000)
