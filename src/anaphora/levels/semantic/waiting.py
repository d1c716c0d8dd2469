"""What waits to be written to the semantic level's file. Not safe by itself: whoever owns it holds a lock."""

from __future__ import annotations

from collections.abc import Container
from itertools import islice

from anaphora.levels.semantic.entry_rows import Addition, Changes, Noted
from anaphora.types import Scope


class Waiting:
    """At most `max_waiting` of each kind: a file that cannot be written must not fill the memory."""

    def __init__(self, max_waiting: int) -> None:
        self.added: dict[int, Addition] = {}
        self.removed: list[int] = []
        self.used: dict[int, float] = {}
        self.noted: list[Noted] = []
        self._max_waiting = max_waiting
        self._forgotten: list[Scope] = []
        """Since something was last taken."""

    def take(self, num: int) -> Changes:
        """At most `num` of each kind, the oldest first."""
        added = list(islice(self.added.values(), num))
        for addition in added:
            del self.added[addition.entry.id]
        used = dict(islice(self.used.items(), num))
        for identity in used:
            del self.used[identity]
        changes = Changes(added, self.removed[:num], used, self.noted[:num])
        del self.removed[:num], self.noted[:num]
        self._forgotten = []
        return changes

    def put_back(self, changes: Changes, alive: Container[int]) -> None:
        """They could not be written. `alive`: a container of the ids that are still in memory."""
        self.added = {addition.entry.id: addition for addition in changes.added if addition.entry.id in alive} | self.added
        self.removed = [*changes.removed, *self.removed]
        self.used = {identity: at_s for identity, at_s in changes.used.items() if identity in alive} | self.used
        back = [noted for noted in changes.noted if not any(noted.what.within(scope) for scope in self._forgotten)]
        self.noted = [*back, *self.noted]

    def forget(self, scope: Scope) -> int:
        """How many additions that was."""
        self._forgotten.append(scope)
        self.noted = [noted for noted in self.noted if not noted.what.within(scope)]
        gone = [identity for identity, addition in self.added.items() if addition.entry.within(scope)]
        for identity in gone:
            del self.added[identity]
        return len(gone)

    def limit(self) -> int:
        """Drop the oldest beyond the maximum; how many that was."""
        num = 0
        for kept in (self.removed, self.noted):
            excess = max(0, len(kept) - self._max_waiting)
            del kept[:excess]
            num += excess
        for by_id in (self.added, self.used):
            excess = max(0, len(by_id) - self._max_waiting)
            for identity in list(islice(by_id, excess)):
                del by_id[identity]
            num += excess
        return num

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.used or self.noted)
