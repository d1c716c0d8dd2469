"""The simulated comparison of ways to decide runs, and tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_the_comparison_finds_ours_within_the_budget_and_a_low_fixed_threshold_far_outside(
    script: Callable[[str], Any],
) -> None:
    figures = script("risk.py").measured(num_hits=3_000, num_runs=1, budget=0.05)
    for traffic in ("steady", "overconfident"):
        ways = figures[traffic]
        assert ways["ours"]["wrong"] <= 0.05 < ways["fixed 0.8"]["wrong"]
    for ways in figures.values():
        assert ways["ours"]["served"] > 0
        assert ways["ours"]["audited"] > 0 == ways["fixed 0.8"]["audited"]
    # While traffic changes nothing is promised but that it is noticed.
    assert figures["changing"]["ours"]["wrong"] < figures["changing"]["fixed 0.9"]["wrong"]
