"""Anaphora in a program of one's own, without a server: what the program computes itself is computed once.

    async with Cache() as cache:
        vectors = await cache.embed(texts, model.encode, model="my-model")

`BlockingCache` is the same for programs without an event loop, and for several threads.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import msgspec
import numpy as np
from anyio.from_thread import start_blocking_portal

from anaphora.build import embedding_level
from anaphora.clock import Clock, SystemClock
from anaphora.config import Config
from anaphora.errors import BackendFailed
from anaphora.events import Forgotten
from anaphora.levels.embedding import Encoded, Space
from anaphora.types import LOCAL_TENANT, Scope, Tenant

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal
    from numpy.typing import ArrayLike

    from anaphora.levels.embedding import Vectors

T = TypeVar("T")

Compute = Callable[[list[str]], "ArrayLike | Awaitable[ArrayLike]"]
"""Texts, all different, to vectors: one row each, in their order. Called in a thread if it is not asynchronous."""


class Cache:
    """For one event loop, on which it is opened and closed with `async with`. Raises ConfigError.

    `folder` is where it lies on disk (default: where the server's lies, `config.default_cache_dir`); several processes may
    share one. `config` is a whole configuration, of which the sections `cache` and `embeddings` count. `tenant` is whose it is:
    nothing is shared with another one.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        config: Config | None = None,
        tenant: str = LOCAL_TENANT,
        clock: Clock | None = None,
    ) -> None:
        config = config or Config()
        if folder is not None:
            config = msgspec.structs.replace(config, cache=msgspec.structs.replace(config.cache, dir=str(folder)))
        self._level = embedding_level(config, clock or SystemClock())
        self._tenant = Tenant(tenant)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._level.aclose()

    async def embed(self, texts: Sequence[str], compute: Compute, *, model: str, revision: str = "", kind: str = "") -> Vectors:
        """A vector for each of `texts`: float32 of shape (number of texts, dimensions), as it is kept (`embeddings.storage`),
        so the same now and later.

        `compute` is asked for those that are not known, each once. `model` and `revision` say whose vectors they are: change
        the revision with the weights. `kind` tells apart what a model tells apart ("query", "passage"). Raises what `compute`
        raises, and BackendFailed where that gives no vector for each text.
        """
        space = Space(self._tenant, model, revision, kind=kind)

        async def computed(missing: list[str]) -> Encoded:
            vectors = np.asarray(await _called(compute, missing), np.float32)
            if vectors.ndim != 2 or len(vectors) != len(missing):
                shape = " x ".join(map(str, vectors.shape))
                raise BackendFailed(f"There are {len(missing)} texts, and what was computed for them is {shape}.")
            return Encoded(vectors, [0] * len(missing))

        return (await self._level.embed(list(texts), space=space, compute=computed)).vectors

    async def forget(self, model: str | None = None) -> Forgotten:
        """Everything of the tenant, or only what is of `model`."""
        return await self._level.forget(Scope(tenant=self._tenant, model=model))

    async def stats(self) -> dict[str, Any]:
        """Tier name → figures."""
        return {name: msgspec.to_builtins(stats) for name, stats in (await self._level.stats()).items()}


class BlockingCache:
    """A `Cache` on an event loop in a thread of its own: for any threads, with `with`."""

    def __init__(self, folder: str | Path | None = None, *, config: Config | None = None, tenant: str = LOCAL_TENANT) -> None:
        self._make = lambda: Cache(folder, config=config, tenant=tenant)
        self._running: AbstractContextManager[BlockingPortal] | None = None
        self._portal: BlockingPortal | None = None
        self._cache: Cache | None = None

    def __enter__(self) -> Self:
        self._running = start_blocking_portal()
        self._portal = self._running.__enter__()
        try:
            self._cache = self._portal.call(_made, self._make)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Safe to call twice."""
        running, portal, cache = self._running, self._portal, self._cache
        self._running = self._portal = self._cache = None
        if running is not None and portal is not None:
            if cache is not None:
                portal.call(cache.__aexit__, None, None, None)
            running.__exit__(None, None, None)

    def embed(self, texts: Sequence[str], compute: Compute, *, model: str, revision: str = "", kind: str = "") -> Vectors:
        """As `Cache.embed`."""
        return self._call(lambda cache: cache.embed(texts, compute, model=model, revision=revision, kind=kind))

    async def aembed(
        self, texts: Sequence[str], compute: Compute, *, model: str, revision: str = "", kind: str = ""
    ) -> Vectors:
        """The same from another event loop, on which `compute` is then run, if it is asynchronous."""
        home = asyncio.get_running_loop()

        async def at_home(missing: list[str]) -> ArrayLike:
            running = asyncio.run_coroutine_threadsafe(_called(compute, missing), home)
            return await asyncio.wrap_future(running)

        portal, cache = self._opened()

        async def embedded() -> Vectors:
            return await cache.embed(texts, at_home, model=model, revision=revision, kind=kind)

        return await asyncio.wrap_future(portal.start_task_soon(embedded))

    def forget(self, model: str | None = None) -> Forgotten:
        """As `Cache.forget`."""
        return self._call(lambda cache: cache.forget(model))

    def stats(self) -> dict[str, Any]:
        """As `Cache.stats`."""
        return self._call(lambda cache: cache.stats())

    def _call(self, work: Callable[[Cache], Awaitable[T]]) -> T:
        portal, cache = self._opened()
        return portal.call(work, cache)

    def _opened(self) -> tuple[BlockingPortal, Cache]:
        if self._portal is None or self._cache is None:
            raise RuntimeError("the cache is not open: use it in a `with` block")
        return self._portal, self._cache


async def _made(make: Callable[[], Cache]) -> Cache:
    return make()


async def _called(compute: Compute, texts: list[str]) -> ArrayLike:
    if inspect.iscoroutinefunction(compute):
        return cast("ArrayLike", await compute(texts))
    found = await asyncio.to_thread(compute, texts)
    return await found if inspect.isawaitable(found) else found
