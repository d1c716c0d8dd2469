"""Whoever was sent the longest part of the prompt before; with a threshold for balance, as most routers have it."""

from __future__ import annotations

from collections.abc import Sequence

from anaphora.routing.base import Choice, Question, Replica, RequestId
from anaphora.routing.holdings import Holdings
from anaphora.routing.inflight import Counting

MIN_SHARE = 0.3
"""A match that covers less of the prompt than this is none."""
MAX_GAP = 64
MAX_RATIO = 1.5
"""The fleet is out of balance where the busiest replica has so many requests more than the idlest one, and so many times as
many. Then the least busy one is taken, whatever it holds."""


class Prefix(Counting):
    def __init__(self) -> None:
        super().__init__()
        self._holdings: dict[str, Holdings] = {}

    def pick(self, question: Question, replicas: Sequence[Replica], now_s: float) -> Choice | None:
        busy = {replica.name: self.in_flight.count(replica.name) for replica in replicas if replica.open}
        if not busy:
            return None
        for replica in replicas:
            self._holdings.setdefault(replica.name, Holdings()).capacity_tokens = replica.capacity_tokens
        most, least = max(busy.values()), min(busy.values())
        if not (most - least > MAX_GAP and most > MAX_RATIO * least):
            found = {name: self._holdings[name].match(question).num_tokens for name in busy}
            name = max(found, key=lambda name: (found[name], -busy[name]))
            if found[name] > MIN_SHARE * question.num_tokens:
                return Choice(name, cached_tokens=found[name], scores={name: -found[name] for name in found})
        return self.least(replicas, lambda replica: busy[replica.name])

    def began(self, request: RequestId, question: Question, choice: Choice, now_s: float) -> None:
        super().began(request, question, choice, now_s)
        self._holdings.setdefault(choice.replica, Holdings()).sent(question)

    def removed(self, replica: str) -> None:
        super().removed(replica)
        self._holdings.pop(replica, None)
