"""The contract every cache level keeps (`anaphora.testing.levels` checks it)."""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from anaphora.events import Forgotten, Hit, Miss, Refused, Stored
from anaphora.tiers.base import TierStats
from anaphora.types import CacheControl, Key, Request, Scope

Q_contra = TypeVar("Q_contra", contravariant=True)
V = TypeVar("V")


class Question(msgspec.Struct, frozen=True):
    """What the levels of answers are asked: a request, its key, and how fresh the client wants it."""

    request: Request
    key: Key
    control: CacheControl = CacheControl()


class Level(Protocol[Q_contra, V]):
    """A kind of remembered answer. Never raises where it cannot answer or learn: it says so (invariant 8)."""

    @property
    def name(self) -> str: ...

    async def lookup(self, question: Q_contra) -> Hit[V] | Miss:
        """Does not suspend where the answer is in this process's memory."""
        ...

    async def learn(
        self, question: Q_contra, value: V, *, clean: bool, cost_s: float, tags: tuple[str, ...] = ()
    ) -> Stored | Refused:
        """Remember `value` if it may be (invariant 3). `clean`: it was finished as it should; `cost_s` is what it took."""
        ...

    async def forget(self, scope: Scope) -> Forgotten: ...

    async def stats(self) -> dict[str, TierStats]: ...

    async def flush(self) -> None:
        """Return when what was learned so far is in every tier."""
        ...

    async def aclose(self) -> None: ...
