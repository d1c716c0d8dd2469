from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anaphora.routing.base import Question, Replica
from anaphora.routing.comparison import compare
from anaphora.routing.expected import Expected
from anaphora.routing.least_busy import LeastBusy
from anaphora.routing.oracle import Oracle
from anaphora.routing.prefix import Prefix
from anaphora.routing.round_robin import RoundRobin
from anaphora.routing.simulation import Arrival, Outcome, Speed, replay
from anaphora.routing.traces import generated, scaled, sessions
from anaphora.testing.routing import chain

SPEED = Speed(step_s=0.01, token_s=1e-4, position_s=0.0, context_s=0.0, chunk_tokens=1000, capacity_tokens=100_000)


def run(arrivals: list[Arrival], speed: Speed = SPEED, num_replicas: int = 1) -> list[Outcome]:
    replicas = [Replica(f"r{number}", capacity_tokens=speed.capacity_tokens) for number in range(num_replicas)]
    return replay(arrivals, {replica.name: speed for replica in replicas}, RoundRobin(), replicas).outcomes


def asked(name: str, num_tokens: int) -> Question:
    return chain(name, num_tokens // 64, tokens=num_tokens)


def test_a_prompt_alone_takes_its_tokens_and_an_answer_its_steps() -> None:
    (outcome,) = run([Arrival(5.0, asked("a", 2500), 11)])
    assert outcome.first_s == pytest.approx(2500e-4)
    assert outcome.whole_s == pytest.approx(2500e-4 + 10 * 0.01)
    assert outcome.cached_tokens == 0


def test_a_prompt_that_was_computed_before_is_found_but_for_its_end() -> None:
    first, second = run([Arrival(0.0, asked("a", 2560), 1), Arrival(10.0, asked("a", 2560), 1)])
    assert (first.cached_tokens, second.cached_tokens) == (0, 2560 - 64)  # at least one token is always computed
    assert second.first_s == pytest.approx(0.01)


def test_a_prompt_in_line_finds_what_the_one_before_it_computes() -> None:
    first, second = run([Arrival(0.0, asked("a", 6400), 1), Arrival(0.1, asked("a", 12800), 1)])
    assert second.cached_tokens == 6400
    assert second.first_s == pytest.approx(first.first_s - 0.1 + 0.64, rel=0.05)


def test_prompts_are_prefilled_in_order_and_answers_go_on_meanwhile() -> None:
    one, two, three = run(
        [Arrival(0.0, asked("a", 900), 50), Arrival(0.1, asked("b", 5000), 1), Arrival(0.1, asked("c", 1000), 1)]
    )
    assert 0.5 < two.first_s < 0.61  # a chunk holds something of the next prompt too
    assert three.first_s >= two.first_s
    assert one.whole_s > 0.09 + 0.5  # it waited for chunks of the others between its tokens


def test_what_does_not_fit_waits_for_room() -> None:
    speed = msgspec.structs.replace(SPEED, capacity_tokens=3000)
    one, two = run([Arrival(0.0, asked("a", 2000), 101), Arrival(0.0, asked("b", 2000), 1)], speed)
    assert two.first_s == pytest.approx(one.whole_s + 0.2, rel=0.05)


def test_an_arrival_in_a_long_stretch_of_decoding_is_seen_after_the_step_under_way() -> None:
    _, two = run([Arrival(0.0, asked("a", 100), 1000), Arrival(1.005, asked("b", 100), 1)])
    assert two.first_s < 0.03


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.sampled_from("abc"), st.integers(1, 3000), st.integers(1, 200)), min_size=1, max_size=30
    ),
    st.integers(4000, 20_000),
    st.integers(1, 3),
)
def test_every_request_ends_after_its_first_token_and_nothing_is_found_that_was_never_asked(
    rows: list[tuple[float, str, int, int]], capacity: int, num_replicas: int
) -> None:
    arrivals = sorted((Arrival(at_s, asked(name, tokens), out) for at_s, name, tokens, out in rows), key=lambda a: a.at_s)
    outcomes = run(arrivals, msgspec.structs.replace(SPEED, capacity_tokens=capacity), num_replicas)
    assert len(outcomes) == len(arrivals)
    seen: set[bytes] = set()
    for arrival, outcome in zip(arrivals, outcomes, strict=True):
        present = sum(64 for block in arrival.question.blocks if block in seen)
        assert outcome.cached_tokens <= min(present, arrival.question.num_tokens - 1)
        assert 0 < outcome.first_s <= outcome.whole_s
        seen.update(arrival.question.blocks)


def test_a_turn_waits_for_the_answer_before_it() -> None:
    one, two, three = run(
        [Arrival(0.0, asked("a", 1000), 101), Arrival(0.5, asked("b", 1000), 1, after=0), Arrival(0.3, asked("c", 1000), 1)]
    )
    assert three.first_s == pytest.approx(0.11, rel=0.1)  # only the first answer is written beside it
    assert one.whole_s == pytest.approx(0.1 + 100 * 0.01 + 0.1, rel=0.05)
    assert two.first_s == pytest.approx(0.1, rel=0.01)  # nobody else is left


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_every_turn_of_a_session_comes_after_the_one_before_and_begins_with_it(
    num_sessions: int, num_turns: int, seed: int
) -> None:
    arrivals = sessions(num_sessions, num_turns, seed)
    assert len(arrivals) == num_sessions * num_turns
    for number, arrival in enumerate(arrivals):
        assert (arrival.after is None) == (number % num_turns == 0)
        if arrival.after is not None:
            before = arrivals[arrival.after].question
            assert arrival.after == number - 1
            assert arrival.question.blocks[: len(before.blocks)] == before.blocks
            assert arrival.question.num_tokens > before.num_tokens
    assert len(run(arrivals, num_replicas=2)) == len(arrivals)


@pytest.mark.parametrize("slowness", [0.1, 1.0, 10.0, 100.0, 1000.0])
def test_in_a_fleet_of_any_speed_that_has_just_started_conversations_stay_where_they_are(slowness: float) -> None:
    speed = Speed(step_s=5e-3 * slowness, token_s=5e-5 * slowness, chunk_tokens=512, capacity_tokens=40_000)
    replicas = [Replica(f"r{number}", capacity_tokens=speed.capacity_tokens) for number in range(3)]
    speeds = {replica.name: speed for replica in replicas}
    first_s: dict[str, float] = {}
    hit_rates: dict[str, float] = {}
    for name, strategy in {"expected": Expected, "least-busy": LeastBusy, "prefix": Prefix}.items():
        outcomes = [one for seed in range(12) for one in replay(sessions(seed=seed), speeds, strategy(), replicas).outcomes]
        first_s[name] = sum(one.first_s for one in outcomes)
        hit_rates[name] = sum(one.cached_tokens for one in outcomes) / sum(one.num_tokens for one in outcomes)
    assert hit_rates["expected"] > hit_rates["prefix"] - 0.02  # where everybody stays
    assert hit_rates["expected"] > hit_rates["least-busy"]
    assert first_s["expected"] < 1.05 * first_s["prefix"]
    assert first_s["expected"] < first_s["least-busy"]


def test_the_default_strategy_beats_taking_turns_and_finds_nearly_as_much_as_the_oracle() -> None:
    done = compare(
        "generated",
        generated(num_sessions=150),
        {"expected": Expected, "round-robin": RoundRobin, "oracle": Oracle},
        loads=[0.3, 0.5],
        num_replicas=4,
        speed=Speed(),
        progress=lambda text: None,
    )
    rows = {(row.strategy, row.load): row for row in done.rows}
    for load in (0.3, 0.5):
        expected, turns, oracle = (rows[name, load] for name in ("expected", "round-robin", "oracle"))
        assert expected.first_p90_s < turns.first_p90_s / 2
        assert expected.hit_rate > oracle.hit_rate - 0.03


def test_a_scaled_trace_keeps_its_order_and_begins_at_once() -> None:
    arrivals = generated(num_sessions=5)
    faster = scaled(arrivals, 10.0)
    assert faster[0].at_s == 0
    assert faster[-1].at_s == pytest.approx((arrivals[-1].at_s - arrivals[0].at_s) / 10)
    assert [one.question for one in faster] == [one.question for one in arrivals]
