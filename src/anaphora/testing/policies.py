"""What every eviction policy owes its callers, as tests to inherit.

class TestMyPolicy(PolicyContract):
    def make(self) -> Policy[str]:
        return MyPolicy()
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import islice
from random import Random
from typing import NamedTuple, TypeVar

import pytest

from anaphora.policies.base import Policy

K = TypeVar("K", bound=Hashable)


class Access(NamedTuple):
    """One question of a trace: what was asked for, how large its answer is (bytes), what computing it costs (seconds)."""

    key: str
    size: int = 1
    cost: float = 1.0


def count_misses(policy: Policy[str], trace: Iterable[Access], capacity: int) -> int:
    """Misses of `policy`, empty at first, in a cache of `capacity` bytes. What is larger than the cache is not kept."""
    sizes: dict[str, int] = {}
    free, misses = capacity, 0
    for key, size, cost in trace:
        if key in policy:
            policy.touch(key)
            continue
        misses += 1
        if size > capacity:
            continue
        while free < size:
            victim = next(iter(policy.victims()))
            policy.remove(victim)
            free += sizes.pop(victim)
        policy.insert(key, size, cost)
        sizes[key] = size
        free -= size
    return misses


class PolicyContract:
    """Inherit, and say how an empty policy is made."""

    def make(self) -> Policy[str]:
        raise NotImplementedError

    def test_a_new_policy_is_empty(self) -> None:
        policy = self.make()
        assert len(policy) == 0
        assert "a" not in policy
        assert list(policy.victims()) == []

    def test_an_inserted_key_is_known_until_it_is_removed(self) -> None:
        policy = self.make()
        policy.insert("a", 10, 1.0)
        assert "a" in policy
        assert list(policy.victims()) == ["a"]
        policy.remove("a")
        assert "a" not in policy
        assert list(policy.victims()) == []

    def test_inserting_a_known_key_replaces_it(self) -> None:
        policy = self.make()
        policy.insert("a", 10, 1.0)
        policy.insert("b", 10, 1.0)
        policy.insert("a", 20, 2.0)
        assert len(policy) == 2
        assert sorted(policy.victims()) == ["a", "b"]
        policy.remove("a")
        assert list(policy.victims()) == ["b"]

    def test_touching_an_unknown_key_is_a_key_error(self) -> None:
        policy = self.make()
        policy.insert("a", 1, 1.0)
        with pytest.raises(KeyError):
            policy.touch("b")
        assert list(policy.victims()) == ["a"]

    def test_removing_an_unknown_key_is_a_key_error(self) -> None:
        policy = self.make()
        policy.insert("a", 1, 1.0)
        policy.remove("a")
        with pytest.raises(KeyError):
            policy.remove("a")
        assert len(policy) == 0

    def test_looking_at_victims_changes_nothing(self) -> None:
        policy = self.make()
        for key in "abcdef":
            policy.insert(key, 1, 1.0)
        first = list(policy.victims())
        assert list(islice(policy.victims(), 2)) == first[:2]
        assert list(policy.victims()) == first

    def test_any_key_may_be_removed_not_only_the_first_victim(self) -> None:
        policy = self.make()
        for key in "abcdef":
            policy.insert(key, 1, 1.0)
        last = list(policy.victims())[-1]
        policy.remove(last)
        assert sorted(policy.victims()) == sorted(set("abcdef") - {last})

    def test_keys_of_no_size_and_no_cost_are_taken(self) -> None:
        policy = self.make()
        policy.insert("a", 0, 0.0)
        policy.insert("b", 1, 0.0)
        policy.touch("a")
        assert sorted(policy.victims()) == ["a", "b"]

    def test_victims_are_exactly_the_keys_it_was_told_of_whatever_happened(self) -> None:
        policy = self.make()
        known: set[str] = set()
        for key, verb, rng in _random_steps(seed=1, steps=3000):
            _apply(policy, known, key, verb, rng)
            assert len(policy) == len(known)
            assert (key in policy) == (key in known)
        victims = list(policy.victims())
        assert sorted(victims) == sorted(known)

    def test_the_same_steps_always_give_the_same_order(self) -> None:
        orders = []
        for _ in range(2):
            policy, known = self.make(), set[str]()
            for key, verb, rng in _random_steps(seed=2, steps=1000):
                _apply(policy, known, key, verb, rng)
            orders.append(list(policy.victims()))
        assert orders[0] == orders[1]

    def test_a_key_that_is_never_used_again_leaves_in_the_end(self) -> None:
        """Nothing stays for ever on the fame of its past, as long as the others are used."""
        policy = self.make()
        policy.insert("old", 1, 1.0)
        for _ in range(20):
            policy.touch("old")
        for i in range(200):
            policy.insert(f"new{i}", 1, 1.0)
            policy.touch(f"new{i}")
            if len(policy) > 8:
                policy.remove(next(iter(policy.victims())))
        assert "old" not in policy


def _random_steps(seed: int, steps: int) -> Iterable[tuple[str, str, Random]]:
    rng = Random(seed)
    for _ in range(steps):
        yield f"k{rng.randrange(60)}", rng.choice(("insert", "insert", "touch", "touch", "touch", "remove", "evict")), rng


def _apply(policy: Policy[str], known: set[str], key: str, verb: str, rng: Random) -> None:
    if verb == "insert":
        policy.insert(key, rng.randrange(1, 100), rng.random())
        known.add(key)
    elif verb == "touch" and key in known:
        policy.touch(key)
    elif verb == "remove" and key in known:
        policy.remove(key)
        known.discard(key)
    elif verb == "evict" and known:
        victim = next(iter(policy.victims()))
        policy.remove(victim)
        known.discard(victim)
