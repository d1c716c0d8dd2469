"""What a replica's cache says of itself, told to the router: events by a thread, tokens asked for in the background.

The router knows pieces of text. Which blocks of tokens they are is learned behind the requests: of the latest ones that have
pieces not yet known the replica is asked how it tokenizes them, one at a time (`routing.associations`). Prompts for an adapter,
or with a salt, have blocks of their own, though their tokens are those of others.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec

from anaphora.backends.upstream import Upstream
from anaphora.errors import ConfigError, NotFound, ServiceError
from anaphora.keys import block_hashes
from anaphora.routing.associations import Associations
from anaphora.routing.base import CacheEvent, Question
from anaphora.routing.vllm_events import Subscriber, Translator, apart
from anaphora.types import Request

log = logging.getLogger(__name__)

_READ_S = 0.2
"""How long the thread waits for events before it looks whether it shall end."""
_PAUSE_S = 1.0
"""After the replica did not say how it tokenizes."""
_MAX_WAITING = 16
"""Requests whose tokens are still to be asked for; older ones are left to what comes after them."""
_NAMESPACE = b"tokens"


class Listening:
    """To one replica. `tell` is called on the event loop, with events of pieces of text."""

    def __init__(self, upstream: Upstream, endpoint: str, replay: str, tell: Callable[[Sequence[CacheEvent]], None]) -> None:
        """Raises ConfigError where pyzmq is not installed."""
        if find_spec("zmq") is None:
            raise ConfigError(f"{upstream.name}: kv_events needs pyzmq: pip install 'anaphora[vllm-events]'")
        self._upstream = upstream
        self._endpoint = endpoint
        self._replay = replay
        self._tell = tell
        self._subscriber: Subscriber | None = None
        self._associations = Associations()
        self._block_size = 0
        self._adapters: frozenset[str] = frozenset()
        self._models: set[str] = set()
        """Of which it is known whether they are adapters."""
        self._sent: list[Question] = []
        """Not yet told to the associations: that is done off the requests' path."""
        self._waiting: deque[tuple[Request, Question, int]] = deque(maxlen=_MAX_WAITING)
        self._wake = asyncio.Event()
        self._asking: asyncio.Task[None] | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._listen, args=(loop,), name="anaphora-kv-events", daemon=True)
        self._thread.start()
        self._asking = asyncio.create_task(self._ask(), name="anaphora-tokenize")

    async def aclose(self) -> None:
        """Waits for the thread."""
        self._stopping.set()
        if self._asking is not None:
            self._asking.cancel()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def sent(self, request: Request, question: Question) -> None:
        """`request` was sent there; `question` is what the router has of it. Costs next to nothing."""
        self._sent.append(question)
        self._waiting.append((request, question, self._associations.num_events))
        self._wake.set()

    def stats(self) -> dict[str, int]:
        """Batches of events that came, and that never came; what the router learned of pieces of text by them."""
        subscriber, associations = self._subscriber, self._associations
        return {
            "num_event_batches": 0 if subscriber is None else subscriber.num_batches,
            "num_event_batches_missed": 0 if subscriber is None else subscriber.num_missed,
            "num_pieces_stored": associations.num_arrived,
            "num_pieces_dropped": associations.num_lost,
        }

    # -- events --------------------------------------------------------------------------------------------------------

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        translator = Translator(_NAMESPACE)
        try:
            with Subscriber(self._endpoint, translator, replay=self._replay) as self._subscriber:
                while not self._stopping.is_set():
                    if events := self._subscriber.read(_READ_S):
                        with suppress(RuntimeError):  # the loop is closed
                            loop.call_soon_threadsafe(self._heard, events, translator.block_size)
        except Exception:  # of any kind: the router goes on with what it knows by itself
            log.exception("the events of upstream %s are not read any more", self._upstream.name)

    def _heard(self, events: Sequence[CacheEvent], block_size: int) -> None:
        if block_size and block_size != self._block_size:
            if self._block_size:  # it was started anew, otherwise: the blocks that are known are not its
                self._associations = Associations()
            self._block_size = block_size
            self._wake.set()
        self._told(self._noted().events(events))

    def _noted(self) -> Associations:
        """The associations, which know of all that was sent."""
        sent, self._sent = self._sent, []
        for question in sent:
            self._associations.sent(question)
        return self._associations

    def _told(self, events: Sequence[CacheEvent]) -> None:
        if events:
            self._tell(events)

    # -- tokens --------------------------------------------------------------------------------------------------------

    async def _ask(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._noted()
            while self._waiting and self._block_size:
                request, question, since = self._waiting.pop()
                if self._noted().knows(question):
                    continue
                try:
                    tokens = await self._upstream.tokenize(request)
                    namespace = await self._namespace(request)
                except NotFound as error:
                    log.info("%s; what its events say stays unknown to the router", error.message)
                    await self._only_note()
                except ServiceError as error:
                    log.debug("upstream %s does not tokenize: %s", self._upstream.name, error.message)
                    await asyncio.sleep(_PAUSE_S)
                else:
                    await self._learn(question, namespace, tokens, since)

    async def _only_note(self) -> None:
        while True:
            self._noted()
            self._waiting.clear()
            self._wake.clear()
            await self._wake.wait()

    async def _namespace(self, request: Request) -> bytes:
        model = self._upstream.model_there(request.model)
        if model not in self._models:
            self._adapters = await self._upstream.adapters(request)
            self._models.add(model)
        return apart(_NAMESPACE, model if model in self._adapters else "", request.cache_salt or "")

    async def _learn(self, question: Question, namespace: bytes, tokens: Sequence[int], since: int) -> None:
        size = self._block_size
        blocks = await asyncio.to_thread(block_hashes, namespace, tokens, size)
        if size == self._block_size:
            self._told(self._noted().learn(question, blocks, size, len(tokens), since))
