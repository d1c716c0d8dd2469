"""From events to the book, behind the answers: one thread of each gateway process.

On the event loop an event costs an append to a queue. The thread looks into it twice a second, prices what is there, and
writes it in one transaction. Whatever goes wrong with the file is told as an event, for logs and metrics, and the entries are
kept for the next time; no request ever waits for it or fails by it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from anaphora.clock import Clock
from anaphora.events import Answered, Computed, Dropped, Emit, Event, Failed
from anaphora.ledger.book import Book, BookProblem
from anaphora.ledger.entry import Entry, Pricing, charge, entry
from anaphora.types import Scope, Usage

log = logging.getLogger(__name__)

EVERY_S = 0.5
MAX_WAITING = 100_000
"""Entries that wait for a book that cannot be written; further ones are lost, and counted."""
BATCH = 1000
"""Entries of one transaction: others wait for the file meanwhile."""
_AT_A_TIME = 16
"""Events after which the event loop's thread, which may be waiting for the interpreter, is let go first."""
_NUM_PENDING = 1024
"""Computations of which one of the two events, that they ended and that their first client's answer did, is still to come."""
_PRUNE_EVERY_S = 3600.0
_DAY_S = 86_400


class Settles(Protocol):
    def settle(self, request_id: str, tokens: int, paid: int) -> None:
        """A request used so many tokens, and so much money, in place of what was reserved for it."""
        ...

    def spend(self, tenant: str, tokens: int, paid: int) -> None:
        """A tenant used more (or less) than was said before."""
        ...


class Notes(Protocol):
    def record(self, entry: Entry) -> None:
        """Must not raise, and not wait."""
        ...

    def close(self) -> None: ...


class Recorder:
    """`record` and `forget` are called on the event loop's thread; `tell` is called on the recorder's own, with what went
    wrong. `settles` is told what each request used, `notes` every entry."""

    concerns = (Answered, Computed)

    def __init__(
        self,
        path: Path,
        pricing: Pricing,
        clock: Clock,
        *,
        tell: Emit,
        settles: Settles | None = None,
        notes: Notes | None = None,
        keep_days: int = 0,
    ) -> None:
        self._book = Book(path, writes=True)
        self._pricing = pricing
        self._clock = clock
        self._tell = tell
        self._settles = settles
        self._notes = notes
        self._keep_days = keep_days
        self._queue: deque[tuple[float, Answered | Computed | Scope]] = deque()
        self._computed: OrderedDict[str, Usage] = OrderedDict()
        self._left: OrderedDict[str, Entry] = OrderedDict()
        self._waiting: list[Entry] = []
        self._forgets: list[Scope] = []
        self._failing = False
        self._pruned_s = float("-inf")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="anaphora-ledger", daemon=True)

    def record(self, event: Event) -> None:
        """Takes every event; most do not concern it."""
        if isinstance(event, Answered | Computed):
            self._queue.append((self._clock.now_s(), event))

    def forget(self, scope: Scope) -> None:
        """Drop labels and ids of what was recorded so far within `scope`. Amounts are accounting, and stay."""
        self._queue.append((self._clock.now_s(), scope))

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Write what is left. Waits for it; safe to call twice."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stopping.wait(EVERY_S)
            try:
                self._work()
            except Exception as error:  # a bug must not end the ledger
                log.exception("the ledger failed unexpectedly")
                self._tell(Failed("ledger", "write", repr(error)))
        if self._waiting:
            log.error("the ledger %s could not be written: %d requests are not in it", self._book.path, len(self._waiting))
            self._tell(Dropped("ledger", len(self._waiting)))
        self._book.close()
        if self._notes is not None:
            self._notes.close()

    def _work(self) -> None:
        for number in range(len(self._queue)):  # and no further: what comes meanwhile is for the next time
            if number % _AT_A_TIME == 0:
                time.sleep(0)
            at_s, what = self._queue.popleft()
            if isinstance(what, Answered):
                self._answered(what, at_s)
            elif isinstance(what, Computed):
                self._was_computed(what)
            else:
                self._anonymise(what)
            if len(self._waiting) >= BATCH and not self._failing:
                self._write()
        self._write()
        self._prune()

    def _answered(self, event: Answered, at_s: float) -> None:
        leads = event.source in ("miss", "bypass")
        computed = self._computed.pop(event.request_id, None) if leads else None
        made = entry(event, at_s, self._pricing, computed)
        if leads and event.outcome != "finished" and computed is None and event.request_id:
            _remember(self._left, event.request_id, made)
        if self._settles is not None:
            if event.source == "passed":  # nothing was reserved: how much it would take could not be told
                self._settles.spend(event.tenant, made.tokens, made.paid)
            else:
                self._settles.settle(event.request_id, made.tokens, made.paid)
        if self._notes is not None:
            self._notes.record(made)
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(made)
        else:
            self._tell(Dropped("ledger", 1))

    def _was_computed(self, event: Computed) -> None:
        """Somebody else had joined the computation and stayed when its first client left: now its cost is known."""
        made = self._left.pop(event.request_id, None)
        if made is None:
            if event.request_id:
                _remember(self._computed, event.request_id, event.usage)
            return
        tokens, paid = made.tokens, made.paid
        made.estimated = 0
        charge(made, event.usage, self._pricing)
        if self._settles is not None:
            self._settles.spend(event.tenant, made.tokens - tokens, made.paid - paid)
        if not any(waiting is made for waiting in self._waiting):
            self._attempt("amend", lambda: self._book.amend(made))

    def _anonymise(self, scope: Scope) -> None:
        for made in self._waiting:
            if _within(made, scope):
                made.tag = made.request_id = ""
        self._forgets.append(scope)

    def _write(self) -> None:
        while self._forgets:
            scope = self._forgets[0]
            if not self._attempt("forget", lambda scope=scope: self._book.anonymise(scope.tenant, scope.model, scope.tag)):  # type: ignore[misc]
                return
            del self._forgets[0]
        while self._waiting:
            batch = self._waiting[:BATCH]
            if not self._attempt("write", lambda entries=batch: self._book.append(entries)):  # type: ignore[misc]
                return
            del self._waiting[: len(batch)]

    def _prune(self) -> None:
        now_s = self._clock.now_s()
        if self._keep_days and now_s - self._pruned_s >= _PRUNE_EVERY_S:
            self._pruned_s = now_s
            self._attempt("prune", lambda: self._book.prune(round((now_s - self._keep_days * _DAY_S) * 1e6)))

    def _attempt(self, operation: str, attempt: Callable[[], object]) -> bool:
        try:
            attempt()
        except BookProblem as error:
            if not self._failing:
                log.warning("%s; requests go on, and are written down later", error)
            self._failing = True
            self._tell(Failed("ledger", operation, str(error)))
            return False
        self._failing = False
        return True


def _within(made: Entry, scope: Scope) -> bool:
    return (
        scope.tenant in (None, made.tenant) and scope.model in (None, made.model, made.asked) and scope.tag in (None, made.tag)
    )


def _remember(pending: OrderedDict[str, Entry] | OrderedDict[str, Usage], request_id: str, what: Entry | Usage) -> None:
    pending[request_id] = what  # type: ignore[assignment]
    if len(pending) > _NUM_PENDING:
        pending.popitem(last=False)
