"""The questions that the semantic level remembers: in memory for whoever looks, in a file for other processes and for later.

Looking touches memory alone. What is added, removed or used is in memory at once and in the file soon: one thread writes it,
and reads what other processes wrote. Whatever goes wrong with the file is told as an event, and requests go on with what is in
memory.

After a process has forgotten something, every other one finds nothing until its thread has read what is left (invariant 7).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from anaphora.clock import Clock
from anaphora.events import Dropped, Emit, Evicted, Failed, Forgotten, ignore
from anaphora.levels.semantic.entry_file import EntriesFailed, EntryFile
from anaphora.levels.semantic.entry_rows import Addition, News, Noted, Position
from anaphora.levels.semantic.records import Decision, Entry, Labelled
from anaphora.levels.semantic.remembered import Remembered
from anaphora.levels.semantic.waiting import Waiting
from anaphora.store import Mark
from anaphora.tiers.base import TierStats
from anaphora.types import Key, Scope, Tenant
from anaphora.vectors import Vectors, VectorsDamaged

__all__ = ["Decision", "Entries", "EntriesFailed", "Entry", "Labelled"]

log = logging.getLogger(__name__)

NAME = "semantic"
EVERY_S = 0.25
"""How often the thread writes, and looks for news."""
MAX_WAITING = 10_000
"""Changes of a kind that wait for a file that cannot be written; the oldest ones are lost, and counted."""

_BATCH = 500
_ROWS = 2000
_REST_S = 5.0
_SAVE_EVERY_S = 300.0
_AIR_EVERY_S = 60.0
"""How often what has expired is removed, where nothing is written."""
_AT_A_TIME = 16
"""Entries after which the event loop's thread, which may be waiting for the interpreter, is let go first."""
_BEYOND = 1000
"""The file says what leaves first. Where it cannot, memory holds at most so many entries more than it should."""

T = TypeVar("T")


class Entries:
    """All methods but the asynchronous ones return at once, and may be called from any thread."""

    def __init__(
        self,
        folder: Path,
        *,
        dimensions: int,
        encoder: str,
        clock: Clock,
        max_entries: int = 200_000,
        emit: Emit = ignore,
    ) -> None:
        """`encoder`: the fingerprint of what the vectors come from; those of another one are dropped."""
        self._dimensions = dimensions
        self._clock = clock
        self._emit = emit
        self._max_entries = max_entries
        self._file = EntryFile(folder, encoder=encoder, max_entries=max_entries)
        self._lock = threading.Lock()
        """Held for moments: over what follows up to the thread's own."""
        self._held = Remembered(dimensions)
        self._waiting = Waiting(MAX_WAITING)
        self._heard: list[Labelled] = []
        self._num_erasures = 0
        self._num_evicted = 0
        # Of the thread alone, but that others see what it last made of the epoch.
        self._position = Position()
        self._changed: tuple[int, int] | None = None
        self._loaded: dict[int, bytes] = {}
        """Vectors that came from their file, by id, until their entries have been read: their spaces."""
        self._owed: list[Scope] = []
        """To be forgotten as soon as that is possible."""
        self._failing: set[str] = set()
        now_s = clock.monotonic_s()
        self._rest_until_s, self._saved_at_s, self._aired_at_s = now_s, now_s, now_s
        self._jobs: deque[Callable[[], None]] = deque()
        self._awake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="anaphora-semantic", daemon=True)
        with suppress(EntriesFailed):
            self._file.open_epoch()
        self._seen = self._file.epoch

    # -- looking -------------------------------------------------------------------------------------------------------

    def same(self, space: bytes, digest: bytes) -> Entry | None:
        """The entry of the same content."""
        if self._behind():
            return None
        entry = self._held.same(space, digest)
        return entry if entry is not None and not entry.expired(self._clock.now_s()) else None

    def near(self, space: bytes, vector: npt.ArrayLike, k: int) -> list[tuple[Entry, float]]:
        """The `k` nearest entries and their similarities (cosines), the nearest first."""
        if self._behind():
            return []
        now_s = self._clock.now_s()
        return [pair for pair in self._held.near(space, vector, k) if not pair[0].expired(now_s)]

    def get(self, identity: int) -> Entry | None:
        return None if self._behind() else self._held.get(identity)

    def __len__(self) -> int:
        return len(self._held)

    def take_labels(self) -> list[Labelled]:
        """Those in the file that were not taken yet, this process's own apart: at first all of earlier times, then what other
        processes note."""
        with self._lock:
            heard, self._heard = self._heard, []
        return heard

    # -- changing ------------------------------------------------------------------------------------------------------

    def add(
        self,
        *,
        space: bytes,
        digest: bytes,
        key: Key,
        text: str,
        vector: npt.ArrayLike,
        tenant: Tenant,
        model: str,
        form: bytes = b"",
        tags: tuple[str, ...] = (),
        ttl_s: float | None = None,
        since: Mark | None = None,
    ) -> Entry | None:
        """In the place of the one of the same content, if there is one. None: something was forgotten since the mark `since`,
        or the vector is none."""
        mark = self.mark()
        if (since is not None and since != mark) or self._behind():
            return None
        now_s = self._clock.now_s()
        entry = Entry(
            id=secrets.randbits(61) + 1,
            space=space,
            digest=digest,
            key=key,
            text=text,
            form=form,
            tenant=tenant,
            model=model,
            tags=tags,
            stored_at_s=now_s,
            expires_at_s=None if ttl_s is None else now_s + ttl_s,
        )
        with np.errstate(over="ignore"):  # what is infinite is refused below
            kept = np.asarray(vector, np.float16)
        with self._lock:
            try:
                self._insert(entry, kept)
            except ValueError:
                return None
            self._waiting.added[entry.id] = Addition(entry, kept.tobytes(), mark[1])
            self._discard(self._held.least_useful(len(self._held) - self._max_entries - _BEYOND))
        return entry

    def remove(self, identity: int) -> None:
        """What it stands for is no more: its answer left the exact level, say."""
        with self._lock:
            self._discard([identity])

    def used(self, identity: int) -> None:
        """It was of use."""
        with self._lock:
            if self._held.used(identity):
                self._waiting.used[identity] = self._clock.now_s()

    def note(self, what: Labelled | Decision, since: Mark | None = None) -> None:
        """Unless something was forgotten since the mark `since`: it may be about just that."""
        if since is not None and since != self.mark():
            return
        noted = Noted(what, self._file.epoch)
        with self._lock:
            self._waiting.noted.append(noted)

    # -- forgetting ----------------------------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """What has been forgotten up to now, by any process."""
        return self._num_erasures, self._file.epoch

    def drop(self, scope: Scope) -> None:
        """Another process is forgetting `scope`: drop what this one has of it."""
        self._drop(scope)

    async def forget(self, scope: Scope) -> Forgotten:
        """Erase entries, labels and decisions within `scope`, here and in the file (invariant 7). The receipt counts
        entries."""
        num_here, num_unwritten = self._drop(scope)
        try:
            num, remaining = await self._ask(lambda: self._forget(scope))
            receipt = Forgotten(scope, {NAME: num + num_unwritten}, {NAME: remaining})
        except EntriesFailed as error:
            self._failed("forget", error)
            receipt = Forgotten(scope, {NAME: num_here}, {}, (NAME,))
        self._emit(receipt)
        return receipt

    # -- for whoever can wait ------------------------------------------------------------------------------------------

    async def labels(self) -> list[Labelled]:
        """All that are left, the oldest first; none where the file cannot be read."""
        return await self._rows(self._file.labels)

    async def decisions(self, tenant: str | None = None, *, request: str = "", limit: int = -1) -> list[Decision]:
        """As `EntryFile` says; none where the file cannot be read."""
        return await self._rows(lambda: self._file.decisions(tenant, request=request, limit=limit))

    async def flush(self) -> None:
        """Return when everything is in the file, or could not be written, and what others wrote is here."""
        await self._ask(lambda: None)

    def stats(self) -> TierStats:
        return TierStats(len(self._held), self._held.num_bytes, 0, num_evicted=self._num_evicted)

    def start(self) -> None:
        """Begin to read what the file holds; it is found as it is read."""
        self._thread.start()

    async def aclose(self) -> None:
        """Write what is left, and the vectors."""
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def close(self) -> None:
        with self._lock:
            self._stopping = True
        self._awake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._held.vectors.close()

    # -- memory, under the lock ----------------------------------------------------------------------------------------

    def _insert(self, entry: Entry, vector: npt.NDArray[np.float16] | None) -> None:
        old = self._held.same(entry.space, entry.digest)
        self._held.add(entry, vector)
        if old is not None:
            self._discard([old.id], here_only=True)  # from the file it goes when this one is written

    def _discard(self, ids: Iterable[int], *, here_only: bool = False) -> list[Entry]:
        """Here, and else soon in the file."""
        gone = self._held.remove(ids)
        for entry in gone:
            self._waiting.used.pop(entry.id, None)
            if self._waiting.added.pop(entry.id, None) is None and not here_only:
                self._waiting.removed.append(entry.id)
        return gone

    def _drop(self, scope: Scope) -> tuple[int, int]:
        """How many entries that was, and how many of them were not in the file yet."""
        with self._lock:
            self._num_erasures += 1
            num_unwritten = self._waiting.forget(scope)
            num = len(self._discard(self._held.within(scope), here_only=True))
            self._heard = [label for label in self._heard if not label.within(scope)]
        return num, num_unwritten

    def _behind(self) -> bool:
        """Whether something was forgotten that this process's memory may still hold."""
        if self._file.epoch == self._seen:
            return False
        self._awake.set()
        return True

    # -- the thread ----------------------------------------------------------------------------------------------------

    async def _ask(self, work: Callable[[], T]) -> T:
        """`work`'s answer, after everything that was changed before was written."""
        answer: Future[T] = Future()

        def job() -> None:
            try:
                answer.set_result(work())
            except Exception as error:
                answer.set_exception(error)

        with self._lock:
            if self._stopping or not self._thread.is_alive():
                raise EntriesFailed("the semantic level's entries are closed")
            self._jobs.append(job)
        self._awake.set()
        return await asyncio.wrap_future(answer)

    async def _rows(self, read: Callable[[], list[T]]) -> list[T]:
        try:
            return await self._ask(read)
        except EntriesFailed as error:
            self._failed("read", error)
            return []

    def _run(self) -> None:
        self._load()
        while not self._stopping:
            self._work()
            self._awake.wait(EVERY_S)
            self._awake.clear()
        self._rest_until_s = self._clock.monotonic_s()
        self._work()
        self._attempt("save", self._save)
        self._file.close()

    def _work(self) -> None:
        num_jobs = len(self._jobs)  # what comes meanwhile is for the next time
        now_s = self._clock.monotonic_s()
        if num_jobs or now_s >= self._rest_until_s:
            written, read = self._attempt("write", self._write), self._attempt("read", self._read)
            if written and read and self._held.num_unsaved * 10 > len(self._held) and now_s - self._saved_at_s > _SAVE_EVERY_S:
                self._attempt("save", self._save)
        for _ in range(num_jobs):
            self._jobs.popleft()()

    def _attempt(self, operation: str, attempt: Callable[[], object]) -> bool:
        try:
            attempt()
        except EntriesFailed as error:
            self._failed(operation, error)
            self._rest_until_s = self._clock.monotonic_s() + _REST_S
            return False
        except Exception as error:  # a bug must not end what is remembered
            log.exception("the semantic level's entries failed unexpectedly")
            self._emit(Failed(NAME, operation, repr(error)))
            return False
        self._failing.discard(operation)
        return True

    def _failed(self, operation: str, error: Exception) -> None:
        self._emit(Failed(NAME, operation, str(error)))
        if operation not in self._failing:
            log.warning("%s; requests go on with what is in memory", error)
        self._failing.add(operation)

    def _write(self) -> None:
        for scope in list(self._owed):
            self._file.forget(scope)
            self._owed.remove(scope)
        now_s = self._clock.monotonic_s()
        while self._waiting or now_s - self._aired_at_s > _AIR_EVERY_S:
            with self._lock:
                changes = self._waiting.take(_BATCH)
            try:
                gone = self._file.write(changes, self._clock.now_s())
            except EntriesFailed:
                with self._lock:
                    self._waiting.put_back(changes, self._held)
                    num_lost = self._waiting.limit()
                if num_lost:
                    self._emit(Dropped(NAME, num_lost))
                raise
            self._aired_at_s = now_s
            with self._lock:
                evicted = self._discard(gone, here_only=True)
            if evicted:
                self._num_evicted += len(evicted)
                self._emit(Evicted(NAME, len(evicted), sum(len(entry.text) for entry in evicted)))

    def _forget(self, scope: Scope) -> tuple[int, int]:
        """How many entries were erased in the file, and how many are there."""
        self._owed.append(scope)
        num = self._file.forget(scope)
        self._owed.remove(scope)
        self._read()
        return num, self._file.count(scope)

    # -- reading, in the thread ----------------------------------------------------------------------------------------

    def _read(self) -> None:
        """What other processes wrote; at first everything."""
        changed = self._file.changed()
        epoch = self._file.epoch
        if epoch == self._seen and changed == self._changed:
            return
        position, known, heard, last = self._position, None, list[Labelled](), False
        while not last:
            news = self._file.news(position, _ROWS)
            known = set[int]() if news.anew else known
            self._heed(news)
            if known is not None:
                known.update(entry.id for entry in news.entries)
            heard += news.labels
            position, last = news.position, news.last
        if known is not None:
            with self._lock:
                self._discard(self._held.ids() - known - self._waiting.added.keys(), here_only=True)
            for identity, space in self._loaded.items():
                if identity not in self._held:
                    self._held.vectors.remove(space, [identity])
            self._loaded = {}
        with self._lock:
            self._heard += heard
        self._position, self._changed, self._seen = position, changed, epoch

    def _heed(self, news: News) -> None:
        fresh = [entry for entry in news.entries if entry.id not in self._held]
        encoded = self._file.vectors([entry.id for entry in fresh if entry.id not in self._loaded])
        for number, entry in enumerate(fresh):
            if number % _AT_A_TIME == 0:
                time.sleep(0)
            vector = encoded.get(entry.id)
            if vector is None and entry.id not in self._loaded:
                continue  # gone meanwhile
            with self._lock, suppress(ValueError):
                old = self._held.same(entry.space, entry.digest)
                if old is None or old.id not in self._waiting.added:  # else ours will be written in its place
                    self._insert(entry, None if vector is None else np.frombuffer(vector, np.float16))
        with self._lock:
            self._discard(news.removed, here_only=True)

    def _load(self) -> None:
        """The vectors of last time, so that no graph has to be built anew."""
        try:
            loaded = Vectors.load(self._file.vectors_path, self._dimensions)
        except FileNotFoundError:
            return
        except (VectorsDamaged, OSError) as error:
            log.warning("%s; built anew from the entries", error)
            self._emit(Failed(NAME, "load", str(error)))
            return
        self._loaded = {identity: space for space, ids in loaded.ids().items() for identity in ids}
        with self._lock:
            for addition in self._waiting.added.values():
                vector = np.frombuffer(addition.vector, np.float16).astype(np.float32)
                loaded.add(addition.entry.space, addition.entry.id, vector)
            before, self._held.vectors = self._held.vectors, loaded
        before.close()

    def _save(self) -> None:
        self._saved_at_s = self._clock.monotonic_s()
        num, self._held.num_unsaved = self._held.num_unsaved, 0
        if num:
            try:
                self._file.save(self._held.vectors)
            except EntriesFailed:
                self._held.num_unsaved += num
                raise
