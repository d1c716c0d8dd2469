"""Single flight: one computation per question, every client a live subscriber.

A flight is owned by a task, not by a client. It buffers its deltas in one list; each subscriber keeps only its place in it, so
a slow client does not stall the others, and memory is one answer per flight whatever the number of clients. Only where the
fastest of them is `AHEAD` deltas behind does the computation wait: nobody takes what it says. The first subscriber leaving
harms nobody; the last one leaving before End cancels the computation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable

from anaphora.errors import BackendFailed, ServiceError
from anaphora.transcript import Collector
from anaphora.types import Completion, Delta

log = logging.getLogger(__name__)

AHEAD = 1024

Start = Callable[[], AsyncIterator[Delta] | AsyncIterator[list[Delta]]]
"""What a computation says, piece by piece or whatever it has at once."""
Landed = Callable[[Completion], Awaitable[None]]


class Flight:
    """One computation and all that it said so far."""

    __slots__ = ("_forget", "_furthest", "_room", "_subscribers", "_waiting", "completion", "deltas", "error", "over", "task")

    def __init__(self, start: Start, landed: Landed, forget: Callable[[], None]) -> None:
        self.deltas: list[Delta] = []
        self.error: BaseException | None = None
        self.completion: Completion | None = None
        """All of it, once it ended cleanly."""
        self.over = False
        """No more deltas will come: the answer ended, failed or was cancelled."""
        self._subscribers = 0
        self._furthest = 0
        """How many deltas the fastest subscriber has read."""
        self._room: asyncio.Future[None] | None = None
        """What the computation waits for where it is too far ahead of everybody."""
        self._waiting: list[asyncio.Future[None]] = []
        self._forget = forget
        self.task = asyncio.create_task(self._fly(start, landed), name="anaphora-flight")
        self.task.add_done_callback(self._landed)

    def subscribe(self, *, collapsed: bool) -> Subscription:
        self._subscribers += 1
        return Subscription(self, collapsed)

    def unsubscribe(self) -> None:
        self._subscribers -= 1
        if self._subscribers == 0 and not self.over:
            self._end(BackendFailed("The computation was cancelled: nobody was waiting for it any more."))
            self._forget()  # now, not when the task has unwound: who asks next must not join a dying flight
            self.task.cancel()
        self._wake()  # the leaver may be waiting; the others look again and go on waiting

    def news(self) -> asyncio.Future[None]:
        """Done after the next delta or at the end. Only called while the caller has read everything and it is not over."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(woken)
        return woken

    def has_read(self, num_deltas: int) -> None:
        """A subscriber has come so far."""
        if num_deltas > self._furthest:
            self._furthest = num_deltas
            if self._room is not None and not self._room.done() and len(self.deltas) - num_deltas < AHEAD:
                self._room.set_result(None)

    async def _fly(self, start: Start, landed: Landed) -> None:
        collector = Collector()
        deltas = self.deltas
        pieces = start()
        try:
            async for piece in pieces:
                for delta in piece if isinstance(piece, list) else (piece,):
                    collector.add(delta)
                    deltas.append(delta)
                if collector.completion is not None:
                    self.completion = collector.completion
                    self._end(None)  # before the backend tidies up: no client waits for that
                    break
                self._wake()
                if len(deltas) - self._furthest >= AHEAD:
                    self._room = asyncio.get_running_loop().create_future()
                    await self._room
        finally:
            aclose = getattr(pieces, "aclose", None)  # generators and engine clients have it; a plain iterator need not
            if aclose is not None:
                await aclose()
        if collector.completion is None:
            raise BackendFailed("The answer was cut off before its end.")
        await landed(collector.completion)

    def _landed(self, task: asyncio.Task[None]) -> None:
        """The task is done, however it came to that: nobody may be left waiting."""
        self._forget()
        if task.cancelled():
            self._end(BackendFailed("The computation was cancelled."))
            return
        error = task.exception()
        if error is not None and not isinstance(error, ServiceError):
            log.error("a computation failed unexpectedly", exc_info=error)
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        if self.over:
            return
        self.over = True
        self.error = error
        self._wake()

    def _wake(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        for woken in waiting:
            if not woken.done():  # a cancelled subscriber's future is done already
                woken.set_result(None)


class Subscription:
    """One client's place in a flight: the deltas so far, then the live ones. Raises the flight's error to every subscriber.

    Iterated by one task. `aclose` (or `leave`) gives the place up, also when it was never iterated; it may be called twice.
    """

    __slots__ = ("_flight", "_left", "_next", "collapsed")

    def __init__(self, flight: Flight, collapsed: bool) -> None:
        self._flight = flight
        self._next = 0
        self._left = False
        self.collapsed = collapsed
        """True for those who joined a computation that someone else began."""

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Delta:
        if not await self._more():
            raise StopAsyncIteration
        delta = self._flight.deltas[self._next]
        self._next += 1
        self._flight.has_read(self._next)
        return delta

    async def burst(self) -> list[Delta]:
        """Everything that was said and not read yet, at least one delta; empty at the end and after leaving."""
        if not await self._more():
            return []
        flight = self._flight
        burst = flight.deltas[self._next :]
        self._next = len(flight.deltas)
        flight.has_read(self._next)
        return burst

    async def _more(self) -> bool:
        """Wait until there is a delta to read; False when there will be none."""
        flight = self._flight
        while not self._left:
            if self._next < len(flight.deltas):
                return True
            if flight.over:
                self.leave()
                if flight.error is not None:
                    raise flight.error.with_traceback(None)  # shared by all subscribers: tracebacks must not pile up
                return False
            await flight.news()
        return False

    @property
    def over(self) -> bool:
        return self._flight.over

    @property
    def completion(self) -> Completion | None:
        """The whole answer, once it ended cleanly."""
        return self._flight.completion

    def leave(self) -> None:
        """Give the place up. Whoever is waiting in this subscription comes to its end at once."""
        if not self._left:
            self._left = True
            self._flight.unsubscribe()

    async def aclose(self) -> None:
        self.leave()


class Flights:
    """The computations under way, by key."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, Flight] = {}
        self._aloft: set[Flight] = set()

    def __len__(self) -> int:
        """Computations that have not landed yet, dying ones included."""
        return len(self._aloft)

    def join(self, key: Hashable | None, start: Start, landed: Landed) -> Subscription:
        """Subscribe to the flight of `key`, which `start` begins if there is none. Key None: a flight of one's own.

        `landed` is awaited by the flight's own task exactly once, after a clean End; until it returns the flight can still be
        joined, so that between the end of a computation and its being learned nobody starts a second one.
        """
        if key is not None and (flying := self._by_key.get(key)) is not None:
            return flying.subscribe(collapsed=True)
        flight = Flight(start, landed, lambda: self._forget(key, flight))
        self._aloft.add(flight)
        flight.task.add_done_callback(lambda _: self._aloft.discard(flight))
        if key is not None:
            self._by_key[key] = flight
        return flight.subscribe(collapsed=False)

    def _forget(self, key: Hashable | None, flight: Flight) -> None:
        if key is not None and self._by_key.get(key) is flight:
            del self._by_key[key]

    async def drain(self) -> None:
        """Wait until everything that is aloft now has landed."""
        await asyncio.gather(*(flight.task for flight in self._aloft), return_exceptions=True)
        await asyncio.sleep(0)  # where all were done already nothing was waited for: not for what follows on that either

    async def aclose(self) -> None:
        """Cancel what is not over, let what is over be learned, and wait until all of it has landed."""
        for flight in self._aloft:
            if not flight.over:
                flight.task.cancel()
        await self.drain()
