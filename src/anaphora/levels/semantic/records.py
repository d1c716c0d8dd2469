"""What the semantic level keeps: questions, whether an answer to one was wrong for another, and what was decided, and why."""

from __future__ import annotations

from typing import Literal

import msgspec

from anaphora.types import Key, Scope, Tenant

Source = Literal["audit", "feedback", "imported"]


class Owned(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Whose it is: what a forget goes by."""

    tenant: Tenant
    model: str
    tags: tuple[str, ...] = ()

    def within(self, scope: Scope) -> bool:
        """Whether `scope` covers it: every field that is set matches."""
        return (
            (scope.tenant is None or scope.tenant == self.tenant)
            and (scope.model is None or scope.model == self.model)
            and (scope.tag is None or scope.tag in self.tags)
        )


class Entry(Owned, frozen=True, kw_only=True, gc=False):
    """A question that was answered. The answer lies in the exact level, under `key`."""

    id: int
    """Drawn at random: processes that share a file need not ask each other."""
    space: bytes
    """Only questions of one space are compared."""
    digest: bytes
    """Of the text's normal form: equal for texts of the same content."""
    key: Key
    text: str
    form: bytes = b""
    """What was computed of the text (`forms`). Empty: nothing is kept of it."""
    stored_at_s: float
    expires_at_s: float | None = None

    def expired(self, now_s: float) -> bool:
        return self.expires_at_s is not None and self.expires_at_s <= now_s


class Labelled(Owned, frozen=True, kw_only=True, gc=False):
    """Whether the answer to one question was wrong for another one; the evidence of the pool (tenant, model)."""

    score: float
    wrong: bool
    u: float = 0.0
    """What was drawn to decide whether it is audited."""
    inclusion: float = 1.0
    """With what probability a pair of this score became a label."""
    source: Source = "audit"
    at_s: float = 0.0
    version: str = ""
    """Of what made the scores: those of another one say nothing."""


class Decision(Owned, frozen=True, kw_only=True, gc=False):
    """What was decided about one request, and why."""

    request_id: str
    answer_id: str = ""
    """What the client knows the answer by."""
    outcome: str
    """`served`, `audited`, `refused`, ..."""
    step: str = ""
    """The one that decided."""
    entry_id: int = 0
    """The nearest one's. 0: there was none."""
    text: str = ""
    other_text: str = ""
    """The entry's."""
    similarity: float = 0.0
    score: float = 0.0
    at_s: float = 0.0
