"""Much to be moved, in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

B = TypeVar("B")
T = TypeVar("T")

_AT_ONCE = 2
"""Batches under way at a time: one is checked while the next one arrives."""
_BUSY_BYTES = 256 << 10
"""Checksums over more than this are computed on another thread: the event loop has other things to do."""


async def on_a_thread(num_bytes: int, work: Callable[[], T]) -> T:
    return work() if num_bytes < _BUSY_BYTES else await asyncio.to_thread(work)


def pieces(items: list[T], length: int) -> Iterator[list[T]]:
    return (items[start : start + length] for start in range(0, len(items), length))


async def each(batches: list[B], work: Callable[[B], Awaitable[T]]) -> AsyncIterator[T]:
    """What `work` makes of the batches, `_AT_ONCE` of them under way; the first failure ends all."""
    if len(batches) == 1:
        yield await work(batches[0])
        return
    waiting = iter(batches)
    running: set[asyncio.Future[T]] = set()
    try:
        while True:
            while len(running) < _AT_ONCE and (batch := next(waiting, None)) is not None:
                running.add(asyncio.ensure_future(work(batch)))
            if not running:
                return
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            future = done.pop()
            running.remove(future)
            yield future.result()
    finally:
        for future in running:
            future.cancel()
        await asyncio.gather(*running, return_exceptions=True)
