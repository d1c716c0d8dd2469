"""Encoders on threads of their own, one each, fed batch by batch: the event loop never waits for a model, unless that is so
fast that to wait for a thread would take longer."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from anaphora.backends.encoders.base import Encoder, Kind
from anaphora.batching import Batcher, BatchingOptions, Item
from anaphora.clock import Clock, SystemClock
from anaphora.errors import BackendFailed, ConfigError

if TYPE_CHECKING:
    from anaphora.backends.encoders.base import Vectors

log = logging.getLogger(__name__)

_STOPPING = "The server is stopping."
_NUM_TIMES = 15
"""Of the latest batches, to say what a text takes: one that was held up, as the very first is, says nothing."""


_AT_ONCE_S = 0.0005
"""What takes no longer is computed by whoever asks."""
_AT_ONCE_CHARS = 2000
"""And is no longer than that: what a text takes was measured with others."""


class TextTooLong(Exception):
    """A text has more tokens than the encoder takes, and was not to be cut."""

    def __init__(self, number: int, num_tokens: int) -> None:
        super().__init__(f"text {number} has {num_tokens} tokens")
        self.number = number
        self.num_tokens = num_tokens


class _Job:
    """One call: texts, what became of those that were computed, and who waits."""

    def __init__(self, texts: Sequence[str], kind: Kind, *, whole: bool) -> None:
        self.texts = texts
        self.kind = kind
        self.whole = whole
        self.done: Future[tuple[Vectors, list[int]]] = Future()
        self.vectors: Vectors | None = None
        self.num_tokens: list[int] = []
        self.num_left = len(texts)

    def count(self, encoder: Encoder) -> None:
        """The tokens of each text. Raises TextTooLong where one is not to be cut."""
        self.num_tokens = [encoder.num_tokens(text, self.kind) for text in self.texts]
        longest = max(range(len(self.texts)), key=self.num_tokens.__getitem__)
        if self.whole and self.num_tokens[longest] > encoder.max_tokens:
            raise TextTooLong(longest, self.num_tokens[longest])


class Encoding:
    """One encoder, which `make` makes when it is first needed, on a thread of its own. For any event loop."""

    def __init__(
        self,
        make: Callable[[], Encoder],
        *,
        options: BatchingOptions | None = None,
        clock: Clock | None = None,
        used_s: Callable[[], float] = time.thread_time,
    ) -> None:
        """`used_s`: the processor time of the thread that asks."""
        self._make = make
        self._batcher = Batcher(options or BatchingOptions())
        self._clock = clock or SystemClock()
        self._used_s = used_s
        self._times_s: deque[float] = deque(maxlen=_NUM_TIMES)
        self._text_s: float | None = None
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: dict[int, _Job] = {}
        self._num_jobs = 0
        self._made: Future[Encoder] = Future()
        self._turn = threading.Lock()
        """Held by whoever calls the encoder."""
        self._thread: threading.Thread | None = None
        self._ended = False

    def begin(self) -> None:
        """Load the encoder, behind everything else."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="anaphora-encoder", daemon=True)
            self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether it is loaded."""
        return self._made.done()

    @property
    def text_s(self) -> float | None:
        """Processor time that a text takes lately. None: none was computed yet."""
        return self._text_s

    async def encoder(self) -> Encoder:
        """The encoder itself, once it is loaded: for what it is, not to be called. Raises BackendFailed."""
        if self._made.done():
            return self._made.result()
        self.begin()
        return await asyncio.shield(asyncio.wrap_future(self._made))  # others wait for it, too

    async def encode(self, texts: Sequence[str], kind: Kind = "", *, whole: bool = False) -> tuple[Vectors, list[int]]:
        """A row for each text, and how many tokens each has. Raises BackendFailed.

        `whole`: raises TextTooLong instead of cutting a text, before anything is computed.
        """
        encoder = await self.encoder()
        if not texts:
            return np.zeros((0, encoder.dimensions), np.float32), []
        job = _Job(texts, kind, whole=whole)
        if self._is_quick(texts) and self._turn.acquire(blocking=False):
            try:
                return self._at_once(encoder, job)
            finally:
                self._turn.release()
        self._queue.put(job)
        if self._ended:  # and this may have come too late for it
            raise BackendFailed(_STOPPING)
        return await asyncio.wrap_future(job.done)

    def _is_quick(self, texts: Sequence[str]) -> bool:
        """Whether the event loop is held up less by computing them than by handing them to a thread and back."""
        text_s = self._text_s
        return text_s is not None and len(texts) * text_s <= _AT_ONCE_S and sum(map(len, texts)) <= _AT_ONCE_CHARS

    def _at_once(self, encoder: Encoder, job: _Job) -> tuple[Vectors, list[int]]:
        if self._ended:
            raise BackendFailed(_STOPPING)
        job.count(encoder)
        try:
            return self._timed(encoder, job.texts, job.kind), job.num_tokens
        except Exception as error:
            log.exception("an encoder failed")
            raise BackendFailed(f"The embedding model failed: {error}") from error

    def _timed(self, encoder: Encoder, texts: Sequence[str], kind: Kind) -> Vectors:
        before_s = self._used_s()
        vectors = encoder.encode(texts, kind)
        self._times_s.append((self._used_s() - before_s) / len(texts))
        self._text_s = statistics.median(self._times_s)
        return vectors

    def close(self) -> None:
        """End the thread. What has not been computed fails."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            encoder = self._make()
        except Exception as error:
            log.exception("an encoder cannot be loaded")
            self._made.set_exception(BackendFailed(f"The embedding model cannot be loaded: {error}"))
            return
        self._made.set_result(encoder)
        while self._receive(encoder):
            batch = self._batcher.take()
            if batch:
                self._compute(encoder, batch)
        self._ended = True
        late = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        for job in (*self._jobs.values(), *late):
            if job is not None:
                _fail(job, BackendFailed(_STOPPING))

    def _receive(self, encoder: Encoder) -> bool:
        """Take what has come; where there is nothing to do, wait for it. False: it is over."""
        wait_s = self._batcher.wait_s(self._clock.monotonic_s())
        while True:
            try:
                job = self._queue.get(block=wait_s != 0, timeout=wait_s or None)
            except queue.Empty:
                return True
            if job is None:
                return False
            self._accept(encoder, job)
            wait_s = self._batcher.wait_s(self._clock.monotonic_s()) or 0.0

    def _accept(self, encoder: Encoder, job: _Job) -> None:
        try:
            with self._turn:
                job.count(encoder)
        except Exception as error:
            _fail(job, error)
            return
        self._num_jobs += 1
        self._jobs[self._num_jobs] = job
        job.vectors = np.zeros((len(job.texts), encoder.dimensions), np.float32)
        sizes = (min(num, encoder.max_tokens) for num in job.num_tokens)
        items = [Item(self._num_jobs, number, size, job.kind) for number, size in enumerate(sizes)]
        self._batcher.add(items, self._clock.monotonic_s())

    def _compute(self, encoder: Encoder, batch: list[Item]) -> None:
        jobs = [self._jobs[item.owner] for item in batch]
        try:
            texts = [job.texts[item.number] for job, item in zip(jobs, batch, strict=True)]
            with self._turn:
                vectors = self._timed(encoder, texts, jobs[0].kind)
        except Exception as error:
            log.exception("an encoder failed")
            for item in batch:
                self._end(item.owner, BackendFailed(f"The embedding model failed: {error}"))
            return
        for job, item, vector in zip(jobs, batch, vectors, strict=True):
            assert job.vectors is not None
            job.vectors[item.number] = vector
            job.num_left -= 1
            if job.num_left == 0:
                self._end(item.owner)
        for owner in {item.owner for item in batch}:
            if owner in self._jobs and self._jobs[owner].done.cancelled():
                self._end(owner)

    def _end(self, owner: int, error: Exception | None = None) -> None:
        job = self._jobs.pop(owner, None)
        if job is None:
            return
        self._batcher.drop(owner)
        if error is not None:
            _fail(job, error)
        elif job.vectors is not None and job.done.set_running_or_notify_cancel():
            job.done.set_result((job.vectors, job.num_tokens))


class Encoders:
    """Those of one process, by the names of their kinds: one `Encoding` each, whoever asks for it. `load` is the registry's."""

    def __init__(self, load: Callable[[str], Any], *, threads: int = 1) -> None:
        self._load = load
        self._threads = threads
        self._encodings: dict[str, Encoding] = {}

    def kind(self, name: str) -> Any:
        """The class, which tells the model's names and sizes. Raises ConfigError where it or what it needs is missing."""
        kind = self._load(name)
        missing = [package for package in kind.needs if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(f"the encoder {name} needs {' and '.join(missing)}: install anaphora[embeddings]")
        return kind

    def get(self, name: str) -> Encoding:
        """Raises ConfigError."""
        found = self._encodings.get(name)
        if found is None:
            kind = self.kind(name)
            make, options = partial(kind, threads=self._threads), getattr(kind, "batching", None)
            found = self._encodings[name] = Encoding(make, options=options)
        return found

    def close(self) -> None:
        for encoding in self._encodings.values():
            encoding.close()


def _fail(job: _Job, error: Exception) -> None:
    if job.done.set_running_or_notify_cancel():
        job.done.set_exception(error)
