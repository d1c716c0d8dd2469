from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.policies.base import Policy
from anaphora.policies.gdsf import GDSF
from anaphora.testing.policies import PolicyContract


class TestGDSF(PolicyContract):
    def make(self) -> Policy[str]:
        return GDSF()


def test_what_is_cheap_for_its_size_leaves_first() -> None:
    policy: GDSF[str] = GDSF()
    policy.insert("dear and small", 10, 100.0)
    policy.insert("dear and large", 1000, 100.0)
    policy.insert("cheap and small", 10, 0.5)
    assert list(policy.victims()) == ["cheap and small", "dear and large", "dear and small"]


def test_what_is_used_often_stays_longer() -> None:
    policy: GDSF[str] = GDSF()
    for key in "abc":
        policy.insert(key, 1, 1.0)
    policy.touch("a")
    policy.touch("a")
    policy.touch("b")
    assert list(policy.victims()) == ["c", "b", "a"]


def test_among_equals_the_least_recently_used_leaves_first() -> None:
    policy: GDSF[str] = GDSF()
    for key in "abc":
        policy.insert(key, 1, 1.0)
        policy.touch(key)
    assert list(policy.victims()) == ["a", "b", "c"]


def test_evicting_ages_what_stays_but_forgetting_does_not() -> None:
    policy: GDSF[str] = GDSF()
    policy.insert("cheap", 1, 1.0)
    policy.insert("middle", 1, 5.0)
    policy.insert("dear", 1, 100.0)
    policy.remove("dear")  # not from the front
    policy.insert("new", 1, 2.0)
    assert list(policy.victims()) == ["cheap", "new", "middle"]
    policy.remove("cheap")
    policy.remove("new")  # from the front: the age is 2 now
    policy.insert("newer", 1, 4.0)
    assert list(policy.victims()) == ["middle", "newer"]


def test_a_walk_does_not_survive_a_change() -> None:
    policy: GDSF[str] = GDSF()
    for key in "abc":
        policy.insert(key, 1, 1.0)
    walk = policy.victims()
    policy.remove(next(walk))
    with pytest.raises(RuntimeError, match="changed"):
        next(walk)


def test_touching_for_ever_does_not_fill_the_memory() -> None:
    policy: GDSF[int] = GDSF()
    for key in range(10):
        policy.insert(key, 1, 1.0)
    for step in range(10_000):
        policy.touch(step % 10)
    assert len(policy._heap) <= 2 * 10 + 16


class ReferenceGDSF:
    """The rule as it stands in the paper, in quadratic time."""

    def __init__(self) -> None:
        self.age = 0.0
        self.now = 0
        self.rows: dict[int, tuple[float, int, int, int, float]] = {}  # key → (priority, last use, frequency, size, cost)

    def use(self, key: int, frequency: int, size: int, cost: float) -> None:
        self.now += 1
        self.rows[key] = (self.age + frequency * cost / size, self.now, frequency, size, cost)

    def touch(self, key: int) -> None:
        _, _, frequency, size, cost = self.rows[key]
        self.use(key, frequency + 1, size, cost)

    def remove(self, key: int) -> None:
        if self.order()[0] == key:
            self.age = self.rows[key][0]
        del self.rows[key]

    def order(self) -> list[int]:
        return sorted(self.rows, key=lambda key: self.rows[key][:2])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("insert", "touch", "touch", "remove", "evict")),
            st.integers(0, 7),
            st.integers(1, 4),
            st.sampled_from((0.0, 0.5, 1.0, 3.0)),
        ),
        max_size=80,
    )
)
def test_the_order_is_that_of_the_paper(steps: list[tuple[str, int, int, float]]) -> None:
    policy: GDSF[int] = GDSF()
    reference = ReferenceGDSF()
    for verb, key, size, cost in steps:
        if verb == "insert":
            policy.insert(key, size, cost)
            reference.use(key, 1, size, cost)
        elif verb == "evict" and reference.rows:
            policy.remove(next(policy.victims()))
            reference.remove(reference.order()[0])
        elif key in reference.rows and verb == "touch":
            policy.touch(key)
            reference.touch(key)
        elif key in reference.rows and verb == "remove":
            policy.remove(key)
            reference.remove(key)
        assert list(policy.victims()) == reference.order()
        assert list(islice(policy.victims(), 2)) == reference.order()[:2]
