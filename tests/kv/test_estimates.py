from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anaphora.kv.estimates import RETRY_S, Estimates, Line

BLOCK = 16
BYTES = 100_000


def measured(*, per_token_s: float = 1e-3, per_position_s: float = 1e-7) -> Estimates:
    estimates = Estimates(BLOCK)
    for start in range(0, 4096, 512):
        seconds = sum(per_token_s + per_position_s * p for p in range(start, start + 512))
        estimates.computed(start, start + 512, seconds)
    return estimates


@given(st.floats(0, 10), st.floats(0, 10), st.lists(st.floats(0, 1e4), min_size=2, max_size=20, unique=True))
@example(3.0, 0.0, [2.0, 9.0, 0.0, 1.0])  # level: rounding makes it fall a little
def test_a_line_is_found_again(offset: float, slope: float, xs: list[float]) -> None:
    line = Line()
    for x in xs:
        line.add(x, offset + slope * x)
    found_offset, found_slope = line.fit()
    if max(xs) - min(xs) > 1:
        middle = (max(xs) + min(xs)) / 2
        assert found_offset + found_slope * middle == pytest.approx(offset + slope * middle, rel=0.5, abs=1e-3)
    assert found_offset >= 0
    assert found_slope >= 0


def test_the_latest_points_count_most() -> None:
    line = Line()
    for _ in range(100):
        line.add(1.0, 1.0)
    for _ in range(100):
        line.add(1.0, 3.0)
    assert line.fit()[1] == pytest.approx(3.0, rel=1e-3)


def test_computing_costs_more_the_more_stands_before() -> None:
    estimates = measured()
    assert estimates.compute_s(0, 512) == pytest.approx(512e-3 + 512**2 / 2 * 1e-7, rel=1e-3)
    late, early = estimates.compute_s(8000, 8512), estimates.compute_s(0, 512)
    assert late is not None
    assert early is not None
    assert late > early


def test_what_was_never_measured_is_tried() -> None:
    assert Estimates(BLOCK).worth(0, [("disk", BYTES)] * 10, 0.0) == 10
    assert measured().worth(0, [("disk", BYTES)] * 10, 0.0) == 10


def test_a_tier_faster_than_computing_is_loaded_from_and_a_slower_one_is_not() -> None:
    estimates = measured()
    for num_blocks in (1, 8, 64):
        estimates.loaded("disk", num_blocks * BYTES, num_blocks * 1e-3)  # a block takes 16 ms to compute
        estimates.loaded("far", num_blocks * BYTES, num_blocks * 40e-3)
    assert estimates.pays("disk", BYTES) is True
    assert estimates.pays("far", BYTES) is False
    assert estimates.worth(0, [("disk", BYTES)] * 20 + [("far", BYTES)] * 5, 0.0) == 20
    assert estimates.worth(0, [("far", BYTES)] * 5, 0.0) == 0
    assert estimates.declined == {"far": 10}


def test_a_latency_is_paid_for_many_blocks_and_not_for_one() -> None:
    estimates = measured()
    for num_blocks in (1, 8, 64):
        estimates.loaded("far", num_blocks * BYTES, 0.1 + num_blocks * 1e-3)
    assert estimates.worth(0, [("far", BYTES)], 0.0) == 0
    assert estimates.worth(0, [("far", BYTES)] * 64, 0.0) == 64


def test_late_blocks_are_worth_more_than_early_ones() -> None:
    """Each block takes 20 ms to load; computing it takes 16 ms at the start and 26 ms after 6,000 tokens."""
    estimates = measured()
    for num_blocks in (1, 8, 64):
        estimates.loaded("far", num_blocks * BYTES, num_blocks * 20e-3)
    assert estimates.worth(0, [("far", BYTES)] * 10, 0.0) == 0
    assert estimates.worth(6000, [("far", BYTES)] * 10, 0.0) == 10


def test_a_tier_that_did_not_pay_is_tried_again_after_a_while() -> None:
    estimates = measured()
    estimates.loaded("far", BYTES, 10.0)
    assert estimates.worth(0, [("far", BYTES)], 100.0) == 0
    assert estimates.worth(0, [("far", BYTES)], 100.0 + RETRY_S - 1) == 0
    assert estimates.worth(0, [("far", BYTES)], 100.0 + RETRY_S) == 1


def test_all_blocks_of_a_model_are_worth_the_same_wherever_they_stand_and_whoever_measured() -> None:
    assert Estimates(BLOCK).block_s() is None
    worths = {measured(per_token_s=1e-3 * factor).block_s() for factor in (0.95, 1.0, 1.05)}
    assert worths == {2.0**-6}, "16 ms, as a power of two"
    assert measured(per_token_s=1e-2).block_s() == 2.0**-3
