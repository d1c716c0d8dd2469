"""An upstream that keeps failing is left alone, and is tried again with one request at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from anaphora.backends.breaker import MAX_REST_S, Breaker


def fail(breaker: Breaker, now_s: float, times: int = 1) -> None:
    for _ in range(times):
        breaker.failed(now_s, breaker.sent())


def test_it_opens_after_so_many_failures_in_a_row() -> None:
    breaker = Breaker(3, 10.0)
    fail(breaker, 0.0, 2)
    breaker.succeeded()
    fail(breaker, 0.0, 2)
    assert breaker.passes(0.0)
    fail(breaker, 0.0)
    assert not breaker.passes(9.9)
    assert breaker.opens_in_s(4.0) == 6.0
    assert breaker.passes(10.0)
    assert breaker.num_opened == 1


def test_one_success_closes_it() -> None:
    breaker = Breaker(1, 10.0)
    fail(breaker, 0.0)
    assert breaker.sent()
    assert not breaker.passes(10.0)
    breaker.succeeded()
    assert breaker.passes(10.0)
    assert breaker.sent() == 0


def test_a_trial_that_fails_doubles_the_rest_up_to_a_limit_and_a_success_makes_it_short_again() -> None:
    breaker = Breaker(1, 10.0)
    now_s, rests = 0.0, []
    for _ in range(6):
        fail(breaker, now_s)
        rests.append(breaker.opens_in_s(now_s))
        now_s += rests[-1]
    assert rests == [10.0, 20.0, 40.0, 80.0, MAX_REST_S, MAX_REST_S]
    breaker.succeeded()
    fail(breaker, now_s)
    assert breaker.opens_in_s(now_s) == 10.0


def test_a_trial_whose_client_left_says_nothing_and_the_next_request_is_one() -> None:
    breaker = Breaker(1, 10.0)
    fail(breaker, 0.0)
    trial = breaker.sent()
    assert not breaker.passes(10.0)
    breaker.left(trial)
    assert breaker.passes(10.0)


def test_failures_of_requests_that_were_sent_before_it_opened_do_not_lengthen_the_rest() -> None:
    breaker = Breaker(2, 10.0)
    early = [breaker.sent() for _ in range(5)]
    for trial in early:
        breaker.failed(1.0, trial)
    assert breaker.opens_in_s(1.0) == 10.0
    assert breaker.num_opened == 1


def test_an_old_trial_does_not_end_a_newer_one() -> None:
    breaker = Breaker(1, 10.0)
    early = breaker.sent()
    fail(breaker, 0.0)
    old = breaker.sent()
    breaker.succeeded()  # one that was sent before it opened
    fail(breaker, 20.0)
    breaker.sent()
    breaker.left(old)
    breaker.left(early)
    assert not breaker.passes(30.0)


@given(st.integers(1, 9), st.floats(0.1, 100.0), st.floats(0.0, 1e6))
def test_it_always_passes_again_after_its_rest(failures: int, rest_s: float, now_s: float) -> None:
    breaker = Breaker(failures, rest_s)
    fail(breaker, now_s, failures)
    assert not breaker.passes(now_s)
    wait_s = breaker.opens_in_s(now_s)
    assert wait_s == pytest.approx(rest_s)
    assert breaker.passes(now_s + wait_s)


class Histories(RuleBasedStateMachine):
    """Requests come, and end in any order and way."""

    requests = Bundle("requests")

    @initialize(failures=st.integers(1, 3), rest_s=st.sampled_from([1.0, 50.0]))
    def begin(self, failures: int, rest_s: float) -> None:
        self.breaker = Breaker(failures, rest_s)
        self.failures, self.rest_s = failures, rest_s
        self.now_s = 0.0
        self.in_a_row = 0
        self.trials: set[int] = set()

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 60.0, 200.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.breaker.passes(self.now_s))
    @rule(target=requests)
    def send(self) -> int:
        was_open = not self.trials and self.breaker.opens_in_s(self.now_s) > 0
        assert not was_open
        trial = self.breaker.sent()
        if trial:
            assert not self.trials, "two trials at once"
            self.trials.add(trial)
        return trial

    @rule(trial=consumes(requests))
    def succeed(self, trial: int) -> None:
        self.breaker.succeeded()
        self.in_a_row = 0
        self.trials.clear()
        assert self.breaker.passes(self.now_s)

    @rule(trial=consumes(requests))
    def fail(self, trial: int) -> None:
        self.breaker.failed(self.now_s, trial)
        self.in_a_row += 1
        if trial in self.trials:
            self.trials.discard(trial)
            assert not self.breaker.passes(self.now_s)

    @rule(trial=consumes(requests))
    def leave(self, trial: int) -> None:
        before = self.breaker.opens_in_s(self.now_s)
        self.breaker.left(trial)
        self.trials.discard(trial)
        assert self.breaker.opens_in_s(self.now_s) == before

    @invariant()
    def it_is_closed_while_there_were_too_few_failures(self) -> None:
        if self.in_a_row < self.failures:
            assert self.breaker.passes(self.now_s)

    @invariant()
    def nothing_passes_while_it_rests_or_is_tried(self) -> None:
        if self.breaker.opens_in_s(self.now_s) > 0 or self.trials:
            assert not self.breaker.passes(self.now_s)

    @invariant()
    def no_rest_is_longer_than_the_longest(self) -> None:
        assert self.breaker.opens_in_s(self.now_s) <= max(self.rest_s, MAX_REST_S)


TestHistories = Histories.TestCase
