from __future__ import annotations

import time
from collections.abc import Sequence
from random import Random

import pytest

from anaphora.keys import block_hashes, kv_namespace
from anaphora.kv.cache import KVCache, Lease
from anaphora.policies.base import Policy
from anaphora.policies.gdsf import GDSF
from anaphora.policies.lru import LRU
from anaphora.types import BlockHash, Scope, Tenant

A, B = Tenant("a"), Tenant("b")
SIZE = 4


def hashes_of(tokens: Sequence[int], tenant: Tenant = A) -> list[BlockHash]:
    return block_hashes(kv_namespace(tenant, "model"), tokens, SIZE)


def prompt(name: int, num_blocks: int) -> list[int]:
    """`num_blocks` full blocks that no other name has, and one token more."""
    return [name] * (num_blocks * SIZE + 1)


def match(cache: KVCache, tokens: Sequence[int], tenant: Tenant = A) -> Lease:
    return cache.match(hashes_of(tokens, tenant), len(tokens), tenant=tenant)


def store(cache: KVCache, lease: Lease, tokens: Sequence[int], cost_s: float = 0.01) -> int:
    """Compute what the lease does not cover; how many blocks found room."""
    allocation = cache.allocate(lease, hashes_of(tokens, lease.tenant)[lease.num_blocks :])
    cache.commit(lease, len(allocation.block_ids), cost_s)
    return len(allocation.block_ids)


def serve(cache: KVCache, tokens: Sequence[int], tenant: Tenant = A, cost_s: float = 0.01) -> int:
    """A request from beginning to end; how many blocks it found."""
    lease = match(cache, tokens, tenant)
    store(cache, lease, tokens, cost_s)
    cache.release(lease)
    return lease.num_matched_blocks


def num_cached(cache: KVCache, tokens: Sequence[int], tenant: Tenant = A) -> int:
    """Looked up without being touched: an order of leaving stays what it is."""
    hashes = hashes_of(tokens, tenant)
    return len(cache._cached_prefix(hashes, len(tokens), tenant))


@pytest.fixture(params=[LRU, GDSF])
def policy(request: pytest.FixtureRequest) -> Policy[BlockHash]:
    made: Policy[BlockHash] = request.param()
    return made


def test_the_second_request_finds_what_the_first_computed() -> None:
    cache = KVCache(8, SIZE, LRU())
    assert serve(cache, prompt(1, 3)) == 0
    assert serve(cache, prompt(1, 3)) == 3
    stats = cache.stats()
    assert (stats.query_tokens, stats.hit_tokens) == (26, 12)
    assert (stats.num_free, stats.num_cached, stats.committed_blocks, stats.num_leases) == (5, 3, 3, 0)


def test_a_conversation_finds_its_own_answers_again() -> None:
    cache = KVCache(16, SIZE, LRU())
    tokens = list(range(10))
    lease = match(cache, tokens)
    assert store(cache, lease, tokens) == 2
    for token in range(100, 110):  # generated one by one
        tokens.append(token)
        store(cache, lease, tokens)
    assert lease.num_blocks == 5
    cache.release(lease)
    assert serve(cache, [*tokens, 7, 8, 9]) == 5


def test_one_token_is_left_to_compute_even_of_a_prompt_of_whole_blocks() -> None:
    cache = KVCache(8, SIZE, LRU())
    tokens = [1] * 8
    assert serve(cache, tokens) == 0
    assert serve(cache, tokens) == 1
    assert serve(cache, [*tokens, 1]) == 2


def test_a_prompt_without_tokens_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="token"):
        KVCache(8, SIZE, LRU()).match([], 0, tenant=A)


def test_blocks_are_found_once_they_are_committed_and_not_before() -> None:
    cache = KVCache(8, SIZE, LRU())
    lease = match(cache, prompt(1, 3))
    cache.allocate(lease, hashes_of(prompt(1, 3)))
    assert serve(cache, prompt(1, 1)) == 0
    cache.commit(lease, 2, 0.01)
    assert serve(cache, prompt(1, 3)) == 2
    assert len(lease.block_ids) == 2
    assert lease.num_blocks == 3


def test_more_cannot_be_committed_than_is_pending() -> None:
    cache = KVCache(8, SIZE, LRU())
    lease = match(cache, prompt(1, 3))
    with pytest.raises(ValueError, match="pending"):
        cache.commit(lease, 1, 0.01)


def test_a_cancelled_request_gives_back_what_it_had_not_finished() -> None:
    cache = KVCache(8, SIZE, LRU())
    lease = match(cache, prompt(1, 3))
    cache.allocate(lease, hashes_of(prompt(1, 3)))
    cache.commit(lease, 1, 0.01)
    cache.release(lease)
    assert cache.stats().num_free == 7
    assert serve(cache, prompt(1, 3)) == 1


def test_releasing_twice_is_a_value_error_and_so_is_any_use_after() -> None:
    cache = KVCache(8, SIZE, LRU())
    serve(cache, prompt(1, 2))
    holder = match(cache, prompt(1, 2))
    lease = match(cache, prompt(1, 2))
    cache.release(lease)
    for verb in (
        lambda: cache.release(lease),
        lambda: cache.allocate(lease, []),
        lambda: cache.commit(lease, 0, 0.0),
        lambda: cache.announce(lease, []),
    ):
        with pytest.raises(ValueError, match="released"):
            verb()
    assert lease.block_ids == []
    assert cache.stats().num_leased == len(holder.block_ids) == 2
    with pytest.raises(ValueError, match="another cache"):
        KVCache(8, SIZE, LRU()).release(holder)


def test_two_who_computed_the_same_store_it_once() -> None:
    cache = KVCache(8, SIZE, LRU())
    tokens = prompt(1, 4)
    first, second = match(cache, tokens), match(cache, tokens)
    store(cache, first, tokens[:9])
    allocation = cache.allocate(second, hashes_of(tokens))
    assert allocation.num_adopted == 2
    assert len(allocation.block_ids) == 2
    assert second.block_ids == first.block_ids
    cache.commit(second, 2, 0.01)
    assert cache.stats().num_cached == 4
    assert store(cache, first, tokens) == 0  # it adopts in turn
    assert first.block_ids == second.block_ids
    assert first.num_matched_blocks == second.num_matched_blocks == 0


def test_what_somebody_else_is_just_copying_is_left_to_him() -> None:
    cache = KVCache(8, SIZE, LRU())
    tokens = prompt(1, 2)
    first, second = match(cache, tokens), match(cache, tokens)
    cache.allocate(first, hashes_of(tokens))
    assert cache.allocate(second, hashes_of(tokens)).block_ids == []
    cache.commit(first, 2, 0.01)
    assert cache.allocate(second, hashes_of(tokens)).num_adopted == 2


def test_caching_is_best_effort_where_all_blocks_are_leased(policy: Policy[BlockHash]) -> None:
    cache = KVCache(4, SIZE, policy)
    holder = match(cache, prompt(1, 3))
    assert store(cache, holder, prompt(1, 3)) == 3
    other = match(cache, prompt(2, 3))
    assert store(cache, other, prompt(2, 3)) == 1
    assert store(cache, other, prompt(2, 3)) == 0
    cache.release(holder)
    assert store(cache, other, prompt(2, 3)) == 2
    cache.check()


def test_a_cache_without_blocks_is_a_cache_that_never_hits() -> None:
    cache = KVCache(0, SIZE, LRU())
    assert serve(cache, prompt(1, 3)) == 0
    assert serve(cache, prompt(1, 3)) == 0


def test_the_oldest_chain_leaves_first_from_its_tail_on() -> None:
    cache = KVCache(6, SIZE, LRU())
    serve(cache, prompt(1, 3))
    serve(cache, prompt(2, 3))
    serve(cache, prompt(3, 2))
    assert [num_cached(cache, prompt(name, 3)) for name in (1, 2, 3)] == [1, 3, 2]
    serve(cache, prompt(4, 2))
    assert [num_cached(cache, prompt(name, 3)) for name in (1, 2, 3, 4)] == [0, 2, 2, 2]


def test_a_chain_goes_whole_before_a_younger_one_even_if_both_were_computed_in_turns() -> None:
    cache = KVCache(8, SIZE, LRU())
    leases = [match(cache, prompt(name, 4)) for name in (1, 2)]
    for end in range(1, 5):
        for name, lease in zip((1, 2), leases, strict=True):
            store(cache, lease, prompt(name, end))
    for lease in leases:
        cache.release(lease)
    serve(cache, prompt(3, 3))
    assert [num_cached(cache, prompt(name, 4)) for name in (1, 2, 3)] == [1, 4, 3]


def test_a_shared_beginning_outlives_its_branches(policy: Policy[BlockHash]) -> None:
    cache = KVCache(8, SIZE, policy)
    system = [7] * (4 * SIZE)
    for name in range(20):
        serve(cache, [*system, *prompt(name + 100, 2)])
        assert num_cached(cache, [*system, 1]) == 4
    assert cache.stats().hit_tokens == 19 * 4 * SIZE


def test_what_is_dear_to_compute_stays_under_gdsf() -> None:
    cache = KVCache(4, SIZE, GDSF())
    serve(cache, prompt(1, 2), cost_s=1.0)
    for name in range(2, 8):
        serve(cache, prompt(name, 2), cost_s=0.1)
    assert num_cached(cache, prompt(1, 2)) == 2


def test_a_lease_that_ends_late_is_a_late_use() -> None:
    """Its blocks came to the front of the order while they could not leave. They do not go at once when it ends."""
    cache = KVCache(4, SIZE, LRU())
    serve(cache, prompt(1, 2))
    lease = match(cache, prompt(1, 2))
    for name in (2, 3, 4):
        serve(cache, prompt(name, 2))
    cache.release(lease)
    serve(cache, prompt(5, 1))
    assert num_cached(cache, prompt(1, 2)) == 2


def test_evicted_runs_are_handed_out_in_ascending_order() -> None:
    """The pool copies one run of neighbours at once."""
    cache = KVCache(64, SIZE, LRU())
    serve(cache, prompt(1, 64))
    lease = match(cache, prompt(2, 40))
    ids = cache.allocate(lease, hashes_of(prompt(2, 40))).block_ids
    assert ids == list(range(ids[0], ids[0] + 40))


# -- followers wait for a leader ---------------------------------------------------------------------------------------


def num_announced(cache: KVCache, tokens: Sequence[int], tenant: Tenant = A) -> int:
    """Blocks right behind the cached ones that are being computed."""
    hashes = hashes_of(tokens, tenant)
    last = cache.awaited(hashes, len(tokens), tenant=tenant)
    return 0 if last is None else hashes.index(last) + 1 - num_cached(cache, tokens, tenant)


def test_followers_see_what_is_being_computed_until_it_is_there() -> None:
    cache = KVCache(16, SIZE, LRU())
    tokens = prompt(1, 4)
    leader = match(cache, tokens)
    assert num_announced(cache, tokens) == 0
    cache.announce(leader, hashes_of(tokens))
    assert num_announced(cache, tokens) == 4
    assert num_announced(cache, [*tokens[:8], 5, 5, 5, 5, 5]) == 2
    assert num_announced(cache, tokens, B) == 0
    store(cache, leader, prompt(1, 3))
    assert num_announced(cache, tokens) == 1
    store(cache, leader, tokens)
    assert num_announced(cache, tokens) == 0
    assert serve(cache, tokens) == 4


def test_nobody_waits_for_a_block_he_could_not_use() -> None:
    cache = KVCache(16, SIZE, LRU())
    leader = match(cache, [1] * 8)
    cache.announce(leader, hashes_of([1] * 8))
    assert num_announced(cache, [1] * 8) == 1


def test_a_cancelled_leader_frees_his_followers() -> None:
    cache = KVCache(16, SIZE, LRU())
    tokens = prompt(1, 4)
    leader = match(cache, tokens)
    cache.announce(leader, hashes_of(tokens))
    cache.release(leader)
    assert num_announced(cache, tokens) == 0


def test_a_leader_who_finds_no_room_frees_his_followers() -> None:
    cache = KVCache(2, SIZE, LRU())
    tokens = prompt(1, 4)
    leader = match(cache, tokens)
    cache.announce(leader, hashes_of(tokens))
    assert store(cache, leader, prompt(1, 1)) == 1
    assert num_announced(cache, tokens) == 3
    assert store(cache, leader, tokens) == 1
    assert num_announced(cache, tokens) == 0


def test_of_two_leaders_one_may_go() -> None:
    cache = KVCache(16, SIZE, LRU())
    tokens = prompt(1, 4)
    leaders = [match(cache, tokens), match(cache, tokens)]
    for leader in leaders:
        cache.announce(leader, hashes_of(tokens))
    cache.release(leaders[0])
    assert num_announced(cache, tokens) == 4
    cache.announce(leaders[1], ())
    assert num_announced(cache, tokens) == 0


# -- forgetting --------------------------------------------------------------------------------------------------------


def test_a_tenant_never_finds_another_tenants_blocks_even_under_the_same_hash() -> None:
    cache = KVCache(8, SIZE, LRU())
    tokens = prompt(1, 2)
    serve(cache, tokens, A)
    lease = cache.match(hashes_of(tokens, A), len(tokens), tenant=B)
    assert lease.block_ids == []
    assert cache.allocate(lease, hashes_of(tokens, A)).block_ids == []


def test_forgetting_a_tenant_leaves_nothing_of_him_and_all_of_the_others() -> None:
    cache = KVCache(8, SIZE, LRU())
    serve(cache, prompt(1, 3), A)
    serve(cache, prompt(1, 2), B)
    assert cache.forget(Scope(tenant=A)) == 3
    assert cache.count(Scope(tenant=A)) == 0
    assert cache.count(Scope(tenant=B)) == cache.count(Scope()) == 2
    assert num_cached(cache, prompt(1, 3), A) == 0
    assert num_cached(cache, prompt(1, 2), B) == 2
    assert cache.forget(Scope()) == 2
    assert cache.stats().num_free == 8


def test_forgotten_blocks_under_a_lease_are_not_found_and_go_with_it() -> None:
    cache = KVCache(8, SIZE, LRU())
    tokens = prompt(1, 3)
    serve(cache, tokens[:9])
    lease = match(cache, tokens)
    cache.announce(lease, hashes_of(tokens)[2:])
    cache.allocate(lease, hashes_of(tokens)[2:])
    assert cache.forget(Scope(tenant=A)) == 3
    assert len(lease.block_ids) == 2
    assert num_cached(cache, tokens) == num_announced(cache, tokens) == 0
    assert (cache.count(Scope(tenant=A)), cache.stats().num_forgotten) == (3, 3)
    cache.check()
    cache.commit(lease, 1, 0.01)  # computed from what was forgotten: not kept
    assert (num_cached(cache, tokens), cache.stats().num_free) == (0, 6)
    assert cache.allocate(lease, hashes_of(tokens)[3:]).block_ids == []
    cache.release(lease)
    assert (cache.count(Scope(tenant=A)), cache.stats().num_free) == (0, 8)


def test_what_is_computed_after_the_forgetting_is_kept_beside_what_still_waits_to_go() -> None:
    cache = KVCache(8, SIZE, LRU())
    tokens = prompt(1, 2)
    serve(cache, tokens)
    before = match(cache, tokens)
    cache.forget(Scope())
    assert serve(cache, tokens) == 0
    assert serve(cache, tokens) == 2
    assert cache.stats().num_free == 4
    cache.release(before)
    assert cache.stats().num_free == 6
    assert serve(cache, tokens) == 2
    cache.check()


# -- speed -------------------------------------------------------------------------------------------------------------


class Counting(LRU[BlockHash]):
    """Counts what it is asked, which no other load on the machine can change."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def insert(self, key: BlockHash, size: int, cost: float) -> None:
        self.num_calls += 1
        super().insert(key, size, cost)

    def remove(self, key: BlockHash) -> None:
        self.num_calls += 1
        super().remove(key)


def test_evictions_are_cheap_in_a_large_cache_of_long_chains_with_most_of_it_leased() -> None:
    """10,000 evictions, one at a time, in 50,000 blocks, all of which stand in the policy's order before any that may go."""
    rng, policy = Random(1), Counting()
    cache = KVCache(50_000, SIZE, policy)
    leases = []
    for _ in range(40):
        tokens = [rng.randrange(1000) for _ in range(1000 * SIZE)]
        leases.append(match(cache, tokens))
        for end in range(100, 1001, 100):
            store(cache, leases[-1], tokens[: end * SIZE])
    for _ in range(10):
        serve(cache, [rng.randrange(1000) for _ in range(1000 * SIZE)])
    assert cache.stats().num_free == 0

    tokens = [rng.randrange(1000) for _ in range(10_000 * SIZE)]
    hashes = hashes_of(tokens)
    lease = cache.match(hashes, len(tokens), tenant=A)
    policy.num_calls, start_s = 0, time.process_time()
    for i in range(10_000):
        cache.allocate(lease, hashes[i : i + 1])
        cache.commit(lease, 1, 0.01)
    assert time.process_time() - start_s < 2.0, "seconds for what takes a tenth of one"
    assert cache.stats().evicted_blocks == 10_000
    assert policy.num_calls <= 40_000 + 3 * 10_000, "each block is passed over once, not at every eviction"
    cache.check()
