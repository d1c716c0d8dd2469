"""Whoever answered fastest lately."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from anaphora.routing.base import Choice, Question, Replica, RequestId
from anaphora.routing.inflight import Counting

NUM_SAMPLES = 10
FAULT_S = 1000.0
"""What a failure counts as."""


class Latency(Counting):
    """The smallest mean time per token of the answer over the latest answers. Whoever has not answered yet is tried."""

    def __init__(self) -> None:
        super().__init__()
        self._samples: dict[str, deque[float]] = {}

    def pick(self, question: Question, replicas: Sequence[Replica], now_s: float) -> Choice | None:
        return self.least(replicas, lambda replica: self._mean(replica.name))

    def ended(self, request: RequestId, now_s: float, *, output_tokens: int, cached_tokens: int | None = None) -> None:
        sent = self.in_flight.over(request)
        self._add(sent.choice.replica, (now_s - sent.began_s) / max(1, output_tokens))

    def failed(self, request: RequestId, now_s: float, *, fault: bool = True) -> None:
        sent = self.in_flight.over(request)
        if fault:
            self._add(sent.choice.replica, FAULT_S)

    def removed(self, replica: str) -> None:
        super().removed(replica)
        self._samples.pop(replica, None)

    def _add(self, replica: str, sample: float) -> None:
        self._samples.setdefault(replica, deque(maxlen=NUM_SAMPLES)).append(sample)

    def _mean(self, replica: str) -> float:
        samples = self._samples.get(replica)
        return sum(samples) / len(samples) if samples else 0.0
