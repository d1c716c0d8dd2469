"""Exact miss counts: a policy whose decisions change, in any way, is noticed here."""

from __future__ import annotations

from bisect import bisect
from itertools import accumulate
from random import Random

import pytest

from anaphora.policies.base import Policy
from anaphora.policies.gdsf import GDSF
from anaphora.policies.lru import LRU
from anaphora.testing.policies import Access, count_misses


def zipf_and_scans(seed: int = 20_260_101, length: int = 4000) -> list[Access]:
    """Popular keys by Zipf's law (s = 0.9, 500 keys), broken by three scans over 150 keys nobody asks for again.

    Only `Random.random` is drawn from: its sequence is promised to stay the same in later versions of Python.
    """
    rng = Random(seed)
    weights = list(accumulate(1 / rank**0.9 for rank in range(1, 501)))
    sizes = [1 + int(rng.random() * 32) for _ in range(500)]
    costs = [0.1 + 4 * rng.random() for _ in range(500)]
    trace: list[Access] = []
    for step in range(length):
        if step % 1000 == 999 and step < 3000:
            trace += [Access(f"scan{step}-{i}", 8, 0.5) for i in range(150)]
        i = bisect(weights, rng.random() * weights[-1])
        trace.append(Access(f"zipf{i}", sizes[i], costs[i]))
    return trace


def test_the_trace_is_what_it_was() -> None:
    trace = zipf_and_scans()
    assert len(trace) == 4450
    assert len({access.key for access in trace}) == 917
    assert sum(access.size for access in trace) == 62574


@pytest.mark.parametrize(
    ("policy", "capacity", "misses"),
    [
        (LRU(), 500, 3057),
        (LRU(), 2000, 2057),
        (GDSF(), 500, 2706),
        (GDSF(), 2000, 1814),
    ],
)
def test_the_misses_are_what_they_were(policy: Policy[str], capacity: int, misses: int) -> None:
    assert count_misses(policy, zipf_and_scans(), capacity) == misses
