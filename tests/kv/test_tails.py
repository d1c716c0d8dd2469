"""What two prompts share of the block in which they part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anaphora.kv.tails import SIBLINGS, Tail, Tails
from anaphora.types import BlockHash, Scope, Tenant

A, B = Tenant("a"), Tenant("b")
ROOT = b"root"


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "big"))


def test_the_longest_common_beginning_comes_first() -> None:
    tails = Tails(8)
    tails.add(ROOT, name(1), [1, 2, 3, 4], A)
    tails.add(ROOT, name(2), [1, 2, 9, 9], A)
    tails.add(ROOT, name(3), [7, 2, 3, 4], A)
    assert tails.find(ROOT, [1, 2, 3, 8], A) == [Tail(name(1), 3), Tail(name(2), 2)]
    assert tails.find(ROOT, [1, 2, 3], A)[0] == Tail(name(1), 3)
    assert tails.find(b"elsewhere", [1, 2, 3, 8], A) == []
    assert tails.find(ROOT, [], A) == []


def test_only_the_latest_siblings_are_remembered_and_each_once() -> None:
    tails = Tails(8)
    for number in range(SIBLINGS + 1):
        tails.add(ROOT, name(number), [5, number], A)
    tails.add(ROOT, name(SIBLINGS), [5, SIBLINGS], A)
    assert {tail.block for tail in tails.find(ROOT, [5], A)} == {name(number) for number in range(1, SIBLINGS + 1)}


def test_parents_that_were_added_to_longest_ago_are_forgotten_first() -> None:
    tails = Tails(2)
    for parent in (b"1", b"2", b"1", b"3"):
        tails.add(parent, name(0), [1], A)
    assert [bool(tails.find(parent, [1], A)) for parent in (b"1", b"2", b"3")] == [True, False, True]
    assert len(tails) == 2


def test_nothing_of_a_forgotten_tenant_stays() -> None:
    tails = Tails(8)
    tails.add(ROOT, name(1), [1], A)
    tails.add(ROOT, name(2), [1], B)
    tails.add(b"2", name(3), [1], A)
    tails.forget(Scope(tenant=A, tag="some"))
    assert tails.find(ROOT, [1], A)
    tails.forget(Scope(tenant=A))
    assert tails.find(ROOT, [1], A) == tails.find(b"2", [1], A) == []
    assert tails.find(ROOT, [1], B) == [Tail(name(2), 1)]
    tails.forget(Scope())
    assert len(tails) == 0


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), max_size=4), st.lists(st.integers(0, 2), max_size=4))
def test_what_is_found_is_common_to_both(blocks: list[list[int]], tokens: list[int]) -> None:
    tails = Tails(8)
    for number, block in enumerate(blocks):
        tails.add(ROOT, name(number), block, A)
    found = tails.find(ROOT, tokens, A)
    assert [tail.num_tokens for tail in found] == sorted((tail.num_tokens for tail in found), reverse=True)
    for tail in found:
        block = blocks[int.from_bytes(tail.block, "big")]
        assert block[: tail.num_tokens] == tokens[: tail.num_tokens]
        assert (
            block[tail.num_tokens : tail.num_tokens + 1] != tokens[tail.num_tokens : tail.num_tokens + 1]
            or not tokens[tail.num_tokens :]
        )
