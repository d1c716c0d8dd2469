from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anaphora.routing.base import Question
from anaphora.routing.room import Room, whole_tokens
from anaphora.testing.routing import chain

QUESTIONS = st.builds(
    lambda name, shared, more: chain(name, shared + more, shared=shared),
    st.sampled_from("abc"),
    st.integers(0, 5),
    st.integers(0, 5),
)


def test_a_beginning_that_two_share_is_there_once() -> None:
    room = Room()
    one, two = chain("a", 10, shared=8), chain("b", 10, shared=8)
    assert room.needed_tokens(one) == whole_tokens(one)
    room.take(one)
    assert room.needed_tokens(two) == whole_tokens(two) - 8 * 64
    room.take(two)
    assert room.taken_tokens == whole_tokens(one) + whole_tokens(two) - 8 * 64
    assert room.whole_tokens == whole_tokens(one) + whole_tokens(two)
    room.give(one)
    assert room.taken_tokens == whole_tokens(two)


@given(st.lists(QUESTIONS, max_size=20), st.randoms())
def test_what_is_needed_is_what_is_taken_and_all_of_it_comes_back(asked: list[Question], random: object) -> None:
    room = Room()
    for question in asked:
        needed, before = room.needed_tokens(question), room.taken_tokens
        room.take(question)
        assert room.taken_tokens == before + needed <= room.whole_tokens
    random.shuffle(asked)  # type: ignore[attr-defined]
    for question in asked:
        room.give(question)
    assert (room.taken_tokens, room.whole_tokens) == (0, 0)
