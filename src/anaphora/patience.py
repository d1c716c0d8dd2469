"""How long others may take, not counting the time in which this process could not look.

Where a process is held up (its machine has too much to do, or one call of its own takes long), what it waits for may have come
meanwhile, and an ordinary timer would end the wait before anybody has looked. One that comes late says so by itself: it is then
set once more, for as long as it was late.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

HELD_UP_S = 0.1
"""A timer that comes later than that was held up."""


def grace_s(due_s: float, now_s: float, limit_s: float) -> float:
    """For how long to wait on, at `now_s`, where the wait was to end at `due_s`: at most `limit_s`. 0: it is over."""
    late_s = now_s - due_s
    return min(late_s, limit_s) if late_s > HELD_UP_S else 0.0


@asynccontextmanager
async def patience(within_s: float) -> AsyncIterator[None]:
    """As `asyncio.timeout`. Raises TimeoutError. Is set once more for `within_s` in all, whatever happens."""
    loop = asyncio.get_running_loop()
    left_s = within_s
    timer: asyncio.TimerHandle
    async with asyncio.timeout(None) as limit:

        def look(due_s: float) -> None:
            nonlocal timer, left_s
            now_s = loop.time()
            more_s = grace_s(due_s, now_s, left_s)
            if more_s:
                left_s -= more_s
                timer = loop.call_at(now_s + more_s, look, now_s + more_s)
            else:
                limit.reschedule(now_s)

        due_s = loop.time() + within_s
        timer = loop.call_at(due_s, look, due_s)
        try:
            yield
        finally:
            timer.cancel()
