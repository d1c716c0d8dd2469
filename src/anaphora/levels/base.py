"""The contract every cache level keeps (`anaphora.testing.levels` checks it)."""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from anaphora.events import Forgotten, Hit, Miss, Refused, Stored
from anaphora.store import Mark
from anaphora.tiers.base import TierStats
from anaphora.types import CacheControl, Key, Request, Scope

Q_contra = TypeVar("Q_contra", contravariant=True)
V = TypeVar("V")


class Question(msgspec.Struct, frozen=True):
    """What the levels of answers are asked: a request, its key, and how fresh the client wants it."""

    request: Request
    key: Key
    control: CacheControl = CacheControl()
    fingerprint: str = ""
    """The model's, which the key covers."""
    request_id: str = ""
    """For what is said of it later."""


class Level(Protocol[Q_contra, V]):
    """A kind of remembered answer. Never raises where it cannot answer or learn: it says so (invariant 8)."""

    @property
    def name(self) -> str: ...

    async def lookup(self, question: Q_contra) -> Hit[V] | Miss:
        """Does not suspend where the answer is in this process's memory."""
        ...

    async def learn(
        self,
        question: Q_contra,
        value: V,
        *,
        clean: bool,
        cost_s: float,
        tags: tuple[str, ...] = (),
        since: Mark | None = None,
    ) -> Stored | Refused:
        """Remember `value` if it may be (invariant 3). `clean`: it was finished as it should; `cost_s` is what it took.

        `since` is the level's mark from when the question was asked: if anything was forgotten after it, by any process that
        shares a tier, the answer is refused (invariant 7).
        """
        ...

    def mark(self) -> Mark:
        """What has been forgotten up to now. Immediate."""
        ...

    async def forget(self, scope: Scope) -> Forgotten: ...

    def drop(self, scope: Scope) -> None:
        """Another gateway process of this server is forgetting `scope`: drop what only this process has of it. Immediate.

        What is in tiers that both share is erased by the other one. Changes the mark.
        """
        ...

    async def stats(self) -> dict[str, TierStats]: ...

    async def flush(self) -> None:
        """Return when what was learned so far is in every tier."""
        ...

    async def aclose(self) -> None: ...
