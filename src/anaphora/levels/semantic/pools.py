"""The evidence of every pool: a tenant's questions to a model."""

from __future__ import annotations

from collections.abc import Iterable

from anaphora.levels.semantic.entries import Entries, Labelled
from anaphora.levels.semantic.risk import Evidence, Label, Outcome, Policy, Rung
from anaphora.store import Mark
from anaphora.types import Scope, Tenant

Pool = tuple[Tenant, str]


class Pools:
    """Labels come in through `add`, and from other gateway processes through `entries`."""

    def __init__(self, policy: Policy, entries: Entries, version: str) -> None:
        self._policy = policy
        self._entries = entries
        self._version = version
        self._pools: dict[Pool, Evidence] = {}

    def decide(self, pool: Pool, score: float, u: float, now_s: float, budget: float) -> Outcome:
        return self._evidence(pool).decide(score, u, now_s, budget)

    def rungs(self, pool: Pool, now_s: float) -> list[Rung]:
        return self._evidence(pool).rungs(now_s)

    def all(self) -> list[Pool]:
        """That something is known of."""
        self._hear()
        return sorted(self._pools)

    def add(self, label: Labelled, since: Mark | None = None) -> bool:
        """Keep it; whether it counts. Not if something was forgotten since the mark `since`."""
        if since is not None and since != self._entries.mark():
            return False
        self._hear()
        self._entries.note(label)
        return self._take(label)

    def forget(self, scope: Scope) -> None:
        """Labels have no tags."""
        if scope.tag is None:
            gone = [pool for pool in self._pools if scope.tenant in (None, pool[0]) and scope.model in (None, pool[1])]
            for pool in gone:
                del self._pools[pool]

    def _evidence(self, pool: Pool) -> Evidence:
        self._hear()
        evidence = self._pools.get(pool)
        if evidence is None:
            evidence = self._pools[pool] = Evidence(self._policy, version=self._version)
        return evidence

    def _hear(self) -> None:
        heard: Iterable[Labelled] = self._entries.take_labels()
        for label in heard:
            self._take(label)

    def _take(self, label: Labelled) -> bool:
        pool = (label.tenant, label.model)
        evidence = self._pools.get(pool)
        if evidence is None:
            evidence = self._pools[pool] = Evidence(self._policy, version=self._version)
        return evidence.add(Label(label.score, label.wrong, label.u, label.inclusion, label.source, label.at_s, label.version))
