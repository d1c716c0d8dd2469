"""Whom to ask next."""

from __future__ import annotations

from collections.abc import Sequence

from anaphora.fleet.replicas import Target
from anaphora.routing.base import Choice, Question
from anaphora.routing.router import Route, Router


class NoChoice:
    """The place of a request where the router had nothing to choose, and learns nothing."""

    def __init__(self, replica: str) -> None:
        self.replica = replica
        self.choice = Choice(replica)

    def first_token(self, now_s: float) -> None:
        pass

    def ended(self, now_s: float, *, output_tokens: int, cached_tokens: int | None = None) -> None:
        pass

    def failed(self, now_s: float, *, fault: bool = True) -> None:
        pass


class Turns:
    """Whom to ask next: the router's choice of those of the pool who may be asked, then the fallbacks one after the other.
    `question` None: there is no choice."""

    def __init__(self, router: Router, pool: Sequence[Target], fallbacks: Sequence[Target], question: Question | None) -> None:
        self._router = router
        self._question = question
        self._stages = [{target.replica.name: target for target in pool}]
        self._stages += [{target.replica.name: target} for target in fallbacks]

    def next(self, now_s: float) -> tuple[Target, Route | NoChoice, bool] | None:
        """The target, its place with the router, and whether nobody is left behind it."""
        while self._stages:
            stage = self._stages[0]
            names = [name for name, target in stage.items() if target.replica.may_be_asked(now_s)]
            route = self._choose(names, now_s)
            if route is None:
                del self._stages[0]
                continue
            target = stage.pop(route.replica)
            return target, route, not any(self._stages)
        return None

    def _choose(self, names: Sequence[str], now_s: float) -> Route | NoChoice | None:
        if not names:
            return None
        return NoChoice(names[0]) if self._question is None else self._router.route(self._question, now_s, among=names)
