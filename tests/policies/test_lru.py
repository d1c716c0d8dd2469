from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anaphora.policies.base import Policy
from anaphora.policies.lru import LRU
from anaphora.testing.policies import PolicyContract


class TestLRU(PolicyContract):
    def make(self) -> Policy[str]:
        return LRU()


def test_the_least_recently_used_key_leaves_first() -> None:
    policy: LRU[str] = LRU()
    for key in "abc":
        policy.insert(key, 1, 1.0)
    policy.touch("a")
    policy.insert("b", 1, 1.0)
    assert list(policy.victims()) == ["c", "a", "b"]


@given(st.lists(st.tuples(st.sampled_from(("insert", "touch", "remove")), st.integers(0, 5))))
def test_the_order_is_that_of_a_list_to_whose_end_used_keys_move(steps: list[tuple[str, int]]) -> None:
    policy: LRU[int] = LRU()
    order: list[int] = []
    for verb, key in steps:
        if verb == "insert":
            policy.insert(key, 1, 1.0)
        elif key not in order:
            continue
        elif verb == "touch":
            policy.touch(key)
        else:
            policy.remove(key)
        order = [k for k in order if k != key] + ([] if verb == "remove" else [key])
        assert list(policy.victims()) == order
