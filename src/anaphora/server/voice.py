"""Where a server tells the person who started it how it is doing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from anaphora.backends.engine_ipc import Status
from anaphora.errors import ServiceError
from anaphora.types import ModelInfo


class Voice(Protocol):
    """Called from the event loop; must not block for long."""

    def say(self, text: str) -> None:
        """Something that happened."""
        ...

    def stage(self, text: str) -> None:
        """What the engine, which is not ready, is at now."""
        ...

    def settled(self, text: str) -> None:
        """The stages are over for now: questions are answered, or, as `text` says, never will be."""
        ...


class Lines:
    """A line for everything, on standard error: for logs, and for programs that read it."""

    def say(self, text: str) -> None:
        print(f"anaphora: {text}", file=sys.stderr, flush=True)

    def stage(self, text: str) -> None:
        self.say(text)

    def settled(self, text: str) -> None:
        self.say(text)


class Silent:
    """For one of several workers: what they share is told once, by the process that owns it."""

    def say(self, text: str) -> None:
        pass

    def stage(self, text: str) -> None:
        pass

    def settled(self, text: str) -> None:
        pass


class Source(Protocol):
    """Who can be asked what is being served."""

    async def models(self) -> tuple[ModelInfo, ...]: ...

    async def stats(self) -> dict[str, Any]: ...


class Announcer:
    """Turns what an engine says of itself into words. One event loop; `close` it before the engine goes."""

    def __init__(self, voice: Voice, url: str, *, with_keys: bool) -> None:
        self._voice = voice
        self._url = url
        self._with_keys = with_keys
        self._source: Source | None = None
        self._asking: asyncio.Task[None] | None = None
        self._last: Status | None = None

    def watch(self, source: Source) -> None:
        """Ask `source` for the figures, once it is ready."""
        self._source = source

    def on_status(self, status: Status) -> None:
        if self._source is None or status == self._last:
            return
        self._last = status
        if status.ready:
            self._asking = asyncio.create_task(self._tell_ready(self._source))
        elif status.refused is not None:
            self._voice.settled(f"the engine cannot run as configured: {status.refused}")
        else:
            self._voice.stage(status.stage)

    def close(self) -> None:
        """Nothing more is told: the end of an engine that is stopped is no news."""
        self._source = None
        if self._asking is not None:
            self._asking.cancel()

    async def _tell_ready(self, source: Source) -> None:
        try:
            models, stats = await source.models(), await source.stats()
        except ServiceError:  # gone again already; its next status says so
            return
        for line in ready_lines(self._url, models, stats, with_keys=self._with_keys):
            self._voice.settled(line)


def ready_lines(url: str, models: Sequence[ModelInfo], stats: Mapping[str, Any], *, with_keys: bool) -> tuple[str, ...]:
    """What is ready where, and a command that asks it; upstreams may have models that nobody named."""
    if not models:
        return (f"ready on {url}",)
    model = models[0].id
    names = ("dtype", "quantization", "device")
    figures = [str(stats[name]) for name in names if name in stats and (name, stats[name]) != ("quantization", "none")]
    if "context_tokens" in stats:
        figures.append(f"{stats['context_tokens']} tokens of context")
    shown = f"{model} ({', '.join(figures)})" if figures else model
    key = "-H 'authorization: Bearer YOUR-KEY' " if with_keys else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is an anaphora?"}}]}}'
    return (
        f"ready: {shown} on {url}",
        f"try: curl {url}/v1/chat/completions {key}-H 'content-type: application/json' -d '{body}'",
    )
