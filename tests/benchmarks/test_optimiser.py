"""The benchmark of the optimiser: its bound is one, and what it claims holds for traffic made to order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anaphora.profiles import Profile, find

MODELS = {"claude-opus-5": "anthropic", "claude-sonnet-5-5": "anthropic", "gpt-5.6-sol": "openai"}
Script = Callable[[str], Any]


@pytest.fixture(scope="module")
def bench(script: Script) -> Any:
    return script("optimiser.py")


def profile_of(model: str) -> Profile:
    return find(model, "anthropic" if model.startswith("claude") else "openai")


def talk(bench: Any, name: str, turns: int, tokens: int = 400) -> tuple[Any, ...]:
    said = (bench.Piece(("user", "assistant")[i % 2], "text", f"{name} {i}".encode(), tokens) for i in range(2 * turns + 1))
    return (bench.Piece("system", "text", b"rules", 1500), *said)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("model", MODELS)
def test_no_policy_is_cheaper_than_the_bound(bench: Any, model: str, data: st.DataObject) -> None:
    steps = st.tuples(st.sampled_from("abc"), st.integers(0, 4), st.sampled_from([0.5, 30.0, 400.0, 2000.0, 50_000.0]))
    time_s, requests = 0.0, []
    for name, turns, gap_s in data.draw(st.lists(steps, min_size=1, max_size=15)):
        time_s += gap_s
        requests.append(bench.Sent(time_s, talk(bench, name, turns)))
    profile = profile_of(model)
    least = bench.bound(requests, profile)
    for policy in (bench.off, bench.litellm(profile), bench.optimised(profile)):
        assert bench.charge(requests, profile, policy).usd >= least - 1e-9


def conversations(bench: Any, gap_s: float) -> list[Any]:
    return [
        bench.Sent(number * 10_000.0 + turn * gap_s, talk(bench, f"talk {number}", turn))
        for number in range(10)
        for turn in range(10)
    ]


def questions(bench: Any, gap_s: float) -> list[Any]:
    return [bench.Sent(number * gap_s, talk(bench, f"question {number}", 0, 2000)) for number in range(100)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gap_s", [20.0, 600.0])
@pytest.mark.parametrize("made", [conversations, questions])
def test_the_optimiser_is_not_dearer_than_nothing_and_hardly_dearer_than_marking_everything(
    bench: Any, made: Callable[[Any, float], list[Any]], gap_s: float, model: str
) -> None:
    profile, requests = profile_of(model), made(bench, gap_s)
    on = bench.charge(requests, profile, bench.optimised(profile)).usd
    assert on <= bench.charge(requests, profile, bench.off).usd
    assert on < 1.01 * bench.charge(requests, profile, bench.litellm(profile)).usd
