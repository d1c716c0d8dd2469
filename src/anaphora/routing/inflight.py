"""Which requests are on which replica: what all strategies have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from anaphora.routing.base import CacheEvent, Choice, Load, Question, Replica, RequestId

T = TypeVar("T")


class Sent(Generic[T]):
    """One request that is on its way."""

    __slots__ = ("began_s", "choice", "first_s", "note", "question")

    def __init__(self, question: Question, choice: Choice, began_s: float, note: T) -> None:
        self.question = question
        self.choice = choice
        self.began_s = began_s
        self.first_s: float | None = None
        self.note = note


class InFlight(Generic[T]):
    """Requests by replica, in the order they were sent. `note` is what a strategy wants to know again when they end."""

    def __init__(self) -> None:
        self._sent: dict[RequestId, Sent[T]] = {}
        self._by_replica: dict[str, dict[RequestId, Sent[T]]] = {}

    def began(self, request: RequestId, sent: Sent[T]) -> None:
        """A request that is on its way already is a KeyError."""
        if request in self._sent:
            raise KeyError(f"{request!r} has begun already")
        self._sent[request] = sent
        self._by_replica.setdefault(sent.choice.replica, {})[request] = sent

    def __getitem__(self, request: RequestId) -> Sent[T]:
        return self._sent[request]

    def over(self, request: RequestId) -> Sent[T]:
        """It has ended or failed. One that is not on its way is a KeyError."""
        sent = self._sent.pop(request)
        there = self._by_replica[sent.choice.replica]
        del there[request]
        if not there:
            del self._by_replica[sent.choice.replica]
        return sent

    def of(self, replica: str) -> Sequence[Sent[T]]:
        return tuple(self._by_replica.get(replica, {}).values())

    def count(self, replica: str) -> int:
        return len(self._by_replica.get(replica, ()))

    def __len__(self) -> int:
        return len(self._sent)


class Counting:
    """A strategy that counts requests on their way and heeds nothing else. Others begin from it."""

    def __init__(self) -> None:
        self.in_flight: InFlight[None] = InFlight()
        self._turn = 0
        self._last_turn: dict[str, int] = {}

    def began(self, request: RequestId, question: Question, choice: Choice, now_s: float) -> None:
        self.in_flight.began(request, Sent(question, choice, now_s, None))
        self._turn += 1
        self._last_turn[choice.replica] = self._turn

    def first_token(self, request: RequestId, now_s: float) -> None:
        self.in_flight[request].first_s = now_s

    def ended(self, request: RequestId, now_s: float, *, output_tokens: int, cached_tokens: int | None = None) -> None:
        self.in_flight.over(request)

    def failed(self, request: RequestId, now_s: float, *, fault: bool = True) -> None:
        self.in_flight.over(request)

    def events(self, replica: str, events: Sequence[CacheEvent], now_s: float) -> None:
        pass

    def load(self, replica: str, load: Load, now_s: float) -> None:
        pass

    def removed(self, replica: str) -> None:
        self._last_turn.pop(replica, None)

    def least(self, replicas: Sequence[Replica], score: Callable[[Replica], float]) -> Choice | None:
        """The open replica of the smallest score; among equals, the one whose turn is longest ago."""
        scores = {replica.name: score(replica) for replica in replicas if replica.open}
        if not scores:
            return None
        name = min(scores, key=lambda name: (scores[name], self._last_turn.get(name, 0)))
        return Choice(name, scores=scores)
