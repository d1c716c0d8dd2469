"""An engine driven by hand, step by step, in the caller's own thread: for tests and benchmarks of what it computes.

driver = Driver(EngineCore(options, policy))
asked = driver.submit(request)
driver.drain()
asked.completion, asked.tokens
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from anaphora.errors import ServiceError
from anaphora.transcript import Collector
from anaphora.types import Begin, Completion, Delta, Request, Usage

if TYPE_CHECKING:
    from anaphora.backends.engine_core import EngineCore
    from anaphora.backends.engine_sequences import Job


class Asked:
    """One submitted request, and what came of it so far."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.error: ServiceError | None = None
        self.job: Job | None = None
        self._collector = Collector()

    def emit(self, deltas: list[Delta]) -> None:
        self.deltas += deltas
        for delta in deltas:
            self._collector.add(delta)

    def fail(self, error: ServiceError) -> None:
        self.error = error

    @property
    def done(self) -> bool:
        return self._collector.completion is not None

    @property
    def completion(self) -> Completion:
        """The whole answer; raises what the engine failed with. AssertionError while it is under way."""
        if self.error is not None:
            raise self.error
        assert self._collector.completion is not None, "not answered yet"
        return self._collector.completion

    @property
    def usage(self) -> Usage:
        """As known at the beginning; the completion has the final one."""
        begin = self.deltas[0]
        assert isinstance(begin, Begin)
        return begin.usage

    @property
    def tokens(self) -> list[list[int]]:
        """The generated token ids of each choice, up to now."""
        assert self.job is not None
        return [sequence.tokens[sequence.num_prompt :] for sequence in self.job.generations]


class Driver:
    """Submits to `core` and steps it."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._num_submitted = 0

    def submit(self, request: Request) -> Asked:
        """Raises the ServiceErrors of a request that is not taken."""
        asked = Asked()
        asked.job = self.core.prepare(self._num_submitted, request, asked.emit, asked.fail)
        self._num_submitted += 1
        self.core.submit(asked.job)
        return asked

    def cancel(self, asked: Asked) -> None:
        assert asked.job is not None
        self.core.cancel(asked.job.id)

    def drain(self) -> int:
        """Step until there is nothing left to do; how many steps that took."""
        steps = 0
        while self.core.step():
            steps += 1
        return steps

    def ask(self, request: Request) -> Asked:
        """One request from beginning to end, with whatever else is under way."""
        asked = self.submit(request)
        self.drain()
        return asked

    def ask_together(self, requests: Iterable[Request]) -> list[Asked]:
        """All of them at once."""
        together = [self.submit(request) for request in requests]
        self.drain()
        return together
