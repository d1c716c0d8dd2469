"""How long others may take, not counting the time in which this process could not look.

Where a process is held up (its machine has too much to do, or one call of its own takes long), what it waits for may have come
meanwhile, and an ordinary timer would end the wait before anybody has looked. One that comes late says so by itself: it is then
set once more, for as long as it was late.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

HELD_UP_S = 0.1
"""A timer that comes later than that was held up."""


def grace_s(due_s: float, now_s: float, limit_s: float) -> float:
    """For how long to wait on, at `now_s`, where the wait was to end at `due_s`: at most `limit_s`. 0: it is over."""
    late_s = now_s - due_s
    return max(0.0, min(late_s, limit_s)) if late_s > HELD_UP_S else 0.0


class Patience:
    """`async with Patience(5.0):` is as `asyncio.timeout`, and raises TimeoutError. It is set once more for `within_s` in all,
    whatever happens."""

    __slots__ = ("_due_s", "_left_s", "_limit", "_loop", "_timer")

    def __init__(self, within_s: float) -> None:
        self._left_s = within_s
        self._limit = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._set(self._loop.time() + self._left_s)
        await self._limit.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._limit.__aexit__(kind, error, trace)

    def _set(self, due_s: float) -> None:
        self._due_s = due_s
        self._timer = self._loop.call_at(due_s, self._look)

    def _look(self) -> None:
        now_s = self._loop.time()
        more_s = grace_s(self._due_s, now_s, self._left_s)
        if more_s:
            self._left_s -= more_s
            self._set(now_s + more_s)
        else:
            self._limit.reschedule(now_s)
