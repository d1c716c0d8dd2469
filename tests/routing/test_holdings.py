from __future__ import annotations

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.routing import holdings as holdings_module
from anaphora.routing.base import BlocksCleared, BlocksRemoved, BlocksStored
from anaphora.routing.holdings import Holdings
from anaphora.testing.routing import BLOCK, chain


def test_what_was_sent_is_held_and_the_least_recent_goes_first() -> None:
    holdings = Holdings(10 * BLOCK)
    for name in ("a", "b"):
        holdings.sent(chain(name, 5))
    holdings.sent(chain("a", 5))
    holdings.sent(chain("c", 3))
    assert [holdings.match(chain(name, 5)).num_blocks for name in "abc"] == [5, 2, 3]
    assert holdings.num_tokens == 10 * BLOCK


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 12)), max_size=40), st.integers(0, 20))
def test_it_never_holds_more_than_the_capacity_or_the_last_question(sent: list[tuple[str, int]], capacity: int) -> None:
    holdings = Holdings(capacity * BLOCK)
    for name, num_blocks in sent:
        holdings.sent(chain(name, num_blocks))
        assert 0 <= holdings.num_tokens <= max(capacity, num_blocks) * BLOCK
        assert holdings.match(chain(name, num_blocks)).num_blocks == num_blocks


def test_a_block_that_is_gone_takes_with_it_what_was_used_before_it() -> None:
    holdings = Holdings()
    for name in "abc":
        asked = chain(name, 5)
        holdings.settled(holdings.sent(asked))
    trail = holdings.sent(chain("b", 5))
    assert holdings.answered(chain("b", 5), trail, 10, 0, 0) == 5 * BLOCK
    assert [holdings.match(chain(name, 5)).num_blocks for name in "abc"] == [0, 5, 5]


def test_an_answer_that_found_what_was_expected_changes_nothing() -> None:
    holdings = Holdings()
    holdings.settled(holdings.sent(chain("a", 5)))
    trail = holdings.sent(chain("a", 5))
    assert holdings.answered(chain("a", 5), trail, 10, 5 * BLOCK - 32, 32) == 0
    assert holdings.match(chain("a", 5)).num_blocks == 5


def test_a_failed_request_leaves_only_what_was_there_before() -> None:
    holdings = Holdings()
    holdings.settled(holdings.sent(chain("a", 2)))
    trail = holdings.sent(chain("a", 6))
    holdings.failed(chain("a", 6), trail)
    assert holdings.match(chain("a", 6)).num_blocks == 2


def test_events_of_the_replica_are_heeded_and_slower_places_told_apart() -> None:
    holdings = Holdings()
    asked = chain("a", 6)
    holdings.events([BlocksStored(asked.blocks[:3], (BLOCK,) * 3), BlocksStored(asked.blocks[2:5], (BLOCK,) * 3, "cpu")])
    match = holdings.match(asked)
    assert (match.num_blocks, match.num_tokens, match.slower) == (5, 5 * BLOCK, {"cpu": 2 * BLOCK})
    holdings.events([BlocksRemoved(asked.blocks[1:3])])
    assert holdings.match(asked).num_blocks == 1
    holdings.events([BlocksCleared()])
    assert holdings.match(asked).num_tokens == 0


def test_what_is_held_is_nothing_for_the_garbage_collector() -> None:
    holdings = Holdings()
    gc.collect()
    before = len(gc.get_objects())
    holdings.sent(chain("a", 5_000))
    gc.collect()
    assert len(gc.get_objects()) - before < 500


def test_of_a_replica_whose_capacity_is_not_known_the_latest_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings_module, "UNKNOWN_CAPACITY_TOKENS", 10 * BLOCK)
    holdings = Holdings()
    for number in range(50):
        holdings.settled(holdings.sent(chain(f"question {number}", 1)))
    assert holdings.num_tokens == len(holdings._entries) * BLOCK == 10 * BLOCK
    assert holdings.match(chain("question 49", 1)).num_blocks == 1
