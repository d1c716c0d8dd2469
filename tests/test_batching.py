"""What is computed together, and when: checked over random arrivals."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anaphora.batching import Batcher, BatchingOptions, Item

items = st.tuples(st.integers(0, 4), st.integers(0, 300), st.sampled_from(["text", "image"]))


def filled(*sizes: int, owner: int = 0, options: BatchingOptions | None = None) -> Batcher:
    batcher = Batcher(options or BatchingOptions(most_tokens=100, most_items=4))
    batcher.add([Item(owner, number, size) for number, size in enumerate(sizes)], 0.0)
    return batcher


def sizes(batch: list[Item]) -> list[int]:
    return [item.num_tokens for item in batch]


def drained(batcher: Batcher) -> list[list[Item]]:
    batches = []
    while batch := batcher.take():
        batches.append(batch)
    return batches


@given(st.lists(items, max_size=60), st.integers(1, 400), st.integers(1, 8))
def test_everything_is_computed_once_in_batches_that_fit_and_are_of_one_kind(
    arrivals: list[tuple[int, int, str]], most_tokens: int, most_items: int
) -> None:
    batcher = Batcher(BatchingOptions(most_tokens=most_tokens, most_items=most_items))
    given_items = [Item(owner, number, size, kind) for number, (owner, size, kind) in enumerate(arrivals)]
    for item in given_items:
        batcher.add([item], 0.0)
    assert len(batcher) == len(given_items)
    batches = drained(batcher)
    assert sorted(item.number for batch in batches for item in batch) == list(range(len(given_items)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(sizes(batch)) <= most_tokens
        assert len(batch) <= most_items
        assert len({item.modality for item in batch}) == 1
    assert batcher.wait_s(0.0) is None


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_texts_of_similar_length_go_together(lengths: list[int]) -> None:
    batches = drained(filled(*lengths))
    order = [size for batch in batches for size in sizes(batch)]
    assert order == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 100))
def test_a_small_request_waits_for_no_more_than_one_batch_of_a_large_one(large: list[int], small: int) -> None:
    batcher = filled(*large)
    batcher.take()
    batcher.add([Item(1, 0, small)], 0.0)
    soon = batcher.take() + batcher.take()
    assert any(item.owner == 1 for item in soon)


def test_an_item_larger_than_a_batch_is_one_of_its_own() -> None:
    assert [sizes(batch) for batch in drained(filled(500, 10, 10))] == [[500], [10, 10]]


def test_a_request_that_is_given_up_is_not_computed() -> None:
    batcher = filled(10, 10)
    batcher.add([Item(1, 0, 10)], 0.0)
    batcher.drop(0)
    batcher.drop(7)
    assert [item.owner for item in batcher.take()] == [1]


def test_nothing_waits_unless_it_is_told_to() -> None:
    assert filled(10).wait_s(0.0) == 0.0


PATIENT = BatchingOptions(most_tokens=100, most_items=4, most_wait_s=0.05)


def test_the_first_after_a_long_time_waits_for_nobody() -> None:
    batcher = filled(10, options=PATIENT)
    assert batcher.wait_s(0.0) == 0.0
    batcher.take()
    batcher.add([Item(1, 0, 10)], 60.0)
    assert batcher.wait_s(60.0) == 0.0


def test_while_others_come_quickly_one_waits_for_them_but_not_for_longer_than_it_may() -> None:
    batcher = Batcher(PATIENT)
    for number in range(3):
        batcher.add([Item(number, 0, 10)], number * 0.01)
    wait_s = batcher.wait_s(0.02)
    assert wait_s is not None
    assert 0 < wait_s <= 0.02  # two gaps from the last one
    assert batcher.wait_s(0.05) == 0.0


def test_a_full_batch_waits_for_nobody() -> None:
    batcher = Batcher(PATIENT)
    for number in range(4):
        batcher.add([Item(number, 0, 10)], number * 0.001)
    assert batcher.wait_s(0.003) == 0.0
