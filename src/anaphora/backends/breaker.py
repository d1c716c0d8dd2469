"""A circuit breaker: an upstream that keeps failing is left alone for a while, then tried with one request. Pure."""

from __future__ import annotations

MAX_REST_S = 120.0


class Breaker:
    """Closed (everything passes) until `failures` in a row; then open for `rest_s`; then one request at a time passes as a
    trial. Each trial that fails makes the next rest twice as long, up to `MAX_REST_S`; whatever succeeds closes it."""

    def __init__(self, failures: int, rest_s: float) -> None:
        self._limit = failures
        self._first_rest_s = rest_s
        self._rest_s = rest_s
        self._failures = 0
        self._open_until_s: float | None = None
        self._trial = 0
        """Number of the trial under way. 0: none is."""
        self._num_trials = 0
        self.num_opened = 0

    def passes(self, now_s: float) -> bool:
        """Whether a request may be sent at `now_s`. Changes nothing: who sends one says `sent`."""
        if self._open_until_s is None:
            return True
        return now_s >= self._open_until_s and not self._trial

    def opens_in_s(self, now_s: float) -> float:
        """Seconds until a request may be sent again; 0: now."""
        return 0.0 if self._open_until_s is None else max(0.0, self._open_until_s - now_s)

    def sent(self) -> int:
        """The number of the trial that the request is, to be handed back with its outcome; 0: it is none."""
        if self._open_until_s is None:
            return 0
        self._num_trials += 1
        self._trial = self._num_trials
        return self._trial

    def succeeded(self) -> None:
        self._failures = 0
        self._rest_s = self._first_rest_s
        self._open_until_s = None
        self._trial = 0

    def failed(self, now_s: float, trial: int) -> None:
        """The upstream failed: it could not be reached, was too slow, or answered with an error of its own."""
        self._failures += 1
        if trial and trial == self._trial:
            self._trial = 0
            self._rest_s = min(MAX_REST_S, self._rest_s * 2)
        elif self._open_until_s is not None or self._failures < self._limit:
            return  # sent before it opened, or not often enough
        self._open_until_s = now_s + self._rest_s
        self.num_opened += 1

    def left(self, trial: int) -> None:
        """A request ended without saying anything of the upstream: its client went away, or it was the client's mistake."""
        if trial == self._trial:
            self._trial = 0
