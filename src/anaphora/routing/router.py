"""Replicas that come and go, and a strategy that is told of each request's fate exactly once.

router = Router(Expected(), [Replica("a"), Replica("b")])
route = router.route(question, now_s)
... send the request to route.replica ...
route.first_token(now_s)
route.ended(now_s, output_tokens=120, cached_tokens=4096)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import msgspec

from anaphora.routing.base import CacheEvent, Choice, Load, Question, Replica, Strategy


class Router:
    def __init__(self, strategy: Strategy, replicas: Iterable[Replica] = ()) -> None:
        self._strategy = strategy
        self._replicas: dict[str, Replica] = {}
        self._routes = 0
        self._open: dict[str, int] = {}
        for replica in replicas:
            self.add(replica)

    @property
    def replicas(self) -> tuple[Replica, ...]:
        return tuple(self._replicas.values())

    def in_flight(self, name: str) -> int:
        """Requests on their way to `name`, which may have been removed since."""
        return self._open.get(name, 0)

    def add(self, replica: Replica) -> None:
        """A new one, or a new state of one that is known."""
        self._replicas[replica.name] = replica

    def change(self, name: str, **fields: Any) -> Replica:
        """Set fields of a replica (`healthy`, `draining`, `started_s`, ...). An unknown name is a KeyError."""
        replica = msgspec.structs.replace(self._replicas[name], **fields)
        self._replicas[name] = replica
        return replica

    def remove(self, name: str) -> None:
        """It is asked nothing more; what it was asked may still end. An unknown name is a KeyError."""
        del self._replicas[name]
        self._strategy.removed(name)

    def route(self, question: Question, now_s: float, *, among: Collection[str] | None = None) -> Route | None:
        """Choose a replica for `question`, of `among` where it is given; None where none is open. The caller sends at once."""
        candidates: Sequence[Replica] = [
            replica for replica in self._replicas.values() if among is None or replica.name in among
        ]
        choice = self._strategy.pick(question, candidates, now_s)
        if choice is None:
            return None
        self._routes += 1
        self._strategy.began(self._routes, question, choice, now_s)
        self._open[choice.replica] = self._open.get(choice.replica, 0) + 1
        return Route(self, self._routes, choice)

    def events(self, name: str, events: Sequence[CacheEvent], now_s: float) -> None:
        """What the cache of a replica says of itself; ignored for one that is gone."""
        if name in self._replicas:
            self._strategy.events(name, events, now_s)

    def load(self, name: str, load: Load, now_s: float) -> None:
        """What the metrics of a replica say; ignored for one that is gone."""
        if name in self._replicas:
            self._strategy.load(name, load, now_s)

    def _over(self, name: str) -> None:
        self._open[name] -= 1
        if not self._open[name]:
            del self._open[name]


class Route:
    """One request on its way. The first of `ended` and `failed` counts, and nothing after it."""

    def __init__(self, router: Router, number: int, choice: Choice) -> None:
        self.choice = choice
        self._router = router
        self._number = number
        self._first = self._over = False

    @property
    def replica(self) -> str:
        return self.choice.replica

    def first_token(self, now_s: float) -> None:
        if not self._first and not self._over:
            self._first = True
            self._router._strategy.first_token(self._number, now_s)

    def ended(self, now_s: float, *, output_tokens: int, cached_tokens: int | None = None) -> None:
        """Answered whole. `cached_tokens`: from the answer's usage, None where it says nothing."""
        if self._finish():
            self._router._strategy.ended(self._number, now_s, output_tokens=output_tokens, cached_tokens=cached_tokens)

    def failed(self, now_s: float, *, fault: bool = True) -> None:
        """`fault`: of the replica's. False where the client left, or the request was wrong."""
        if self._finish():
            self._router._strategy.failed(self._number, now_s, fault=fault)

    def _finish(self) -> bool:
        if self._over:
            return False
        self._over = True
        self._router._over(self.choice.replica)
        return True
