"""Whoever has the fewest requests on their way."""

from __future__ import annotations

from collections.abc import Sequence

from anaphora.routing.base import Choice, Question, Replica
from anaphora.routing.inflight import Counting


class LeastBusy(Counting):
    def pick(self, question: Question, replicas: Sequence[Replica], now_s: float) -> Choice | None:
        return self.least(replicas, lambda replica: self.in_flight.count(replica.name))
