"""Which request meets which fault, as a rule without a server."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.testing.upstream.script import KINDS, QUESTIONS, Answer, Asked, Fault, Match, Script

A_QUESTION = Asked("/v1/messages", "claude-opus-5", b'{"model": "claude-opus-5"}')
paths = st.sampled_from([*sorted(QUESTIONS), "/v1/models"])
asked = st.builds(Asked, paths, st.sampled_from(["a", "b"]), st.sampled_from([b"x", b"y"]))
matches = st.builds(Match, st.sampled_from(["", "/v1/models", "/v1/messages"]), st.sampled_from(["", "a"]), st.just(""))


@given(st.lists(st.builds(Fault, st.sampled_from(["429", *KINDS]), st.integers(1, 3), matches)), st.lists(asked))
def test_a_fault_meets_as_many_matching_requests_as_it_says_and_the_first_told_comes_first(
    faults: list[Fault], requests: list[Asked]
) -> None:
    script = Script(tuple(faults))
    left = [fault.count or 0 for fault in faults]
    for request in requests:
        expected = next((at for at, fault in enumerate(faults) if left[at] and fault.match(request)), None)
        assert script.fault(request) == (None if expected is None else faults[expected])
        if expected is not None:
            left[expected] -= 1
    assert [(fault.kind, fault.count) for fault in script.faults()] == [
        (fault.kind, count) for fault, count in zip(faults, left, strict=True) if count
    ]


@given(st.lists(st.floats(0, 0.5), max_size=4), st.integers(0, 99))
def test_shares_of_one_request_add_up(shares: list[float], seed: int) -> None:
    faults = tuple(Fault(str(400 + number), share=share) for number, share in enumerate(shares))
    script, same = Script(faults, Random(seed)), Random(seed)
    for _ in range(20):
        drawn = same.random()
        below = [number for number in range(len(shares)) if drawn < sum(shares[: number + 1])]
        found = script.fault(A_QUESTION)
        if any(abs(drawn - sum(shares[: number + 1])) < 1e-9 for number in range(len(shares))):
            continue  # on the edge sums in another order may differ
        assert (None if found is None else found.kind) == (str(400 + below[0]) if below else None)


def test_other_requests_draw_no_lots() -> None:
    script = Script((Fault("500", share=0.5),), Random(3))
    alone = [script.fault(A_QUESTION) is not None for _ in range(50)]
    script = Script((Fault("500", share=0.5),), Random(3))
    mixed = []
    for _ in range(50):
        assert script.fault(Asked("/v1/models", "", b"")) is None
        mixed.append(script.fault(A_QUESTION) is not None)
    assert alone == mixed


@pytest.mark.parametrize("kind", ["", "late", "399", "600", "4290", "-429"])
def test_there_is_no_such_fault(kind: str) -> None:
    with pytest.raises(ValueError, match="no fault is called"):
        Fault(kind)


def test_a_reset_comes_before_the_answer_unless_told_otherwise() -> None:
    assert Fault("reset").at_event == 0
    assert Fault("reset", after_events=2).at_event == 2
    assert Fault("cut").at_event == 3


def test_answers_are_given_in_order_and_can_be_taken_back() -> None:
    script = Script()
    for text in ("one", "two", "three"):
        script.add_answer(Answer(text))
    assert [script.answer(A_QUESTION), script.answer(A_QUESTION)] == [Answer("one"), Answer("two")]
    assert script.answers() == [Answer("three")]
    script.clear_answers()
    assert script.answer(A_QUESTION) is None
