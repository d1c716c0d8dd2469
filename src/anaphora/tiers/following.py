"""A tier that only this machine reaches, in front of one that others share: what they erase leaves it too."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Collection, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from anaphora.errors import TierFailed
from anaphora.tiers.base import EVERYTHING, Entry, KnowingTier, RemoteTier, Tier, TierStats
from anaphora.types import Key, Scope

_PATIENCE_S = 0.25
"""How long a read waits for what was erased to be gone. Usually that takes milliseconds."""


class Leader(Tier, RemoteTier, Protocol):
    pass


class FollowingTier:
    """`inner`, as a tier that hears of `leader`'s erasures. For one event loop.

    From the moment that there is news of an erasure it is as good as empty, until what was erased is gone from it: a task of
    its own sees to that. The same when it is first used, because others may have erased something while this machine was
    off; how far it had come by then is kept in the file `memo`. If the leader cannot be reached at that time, `inner` is used
    as it is until it can: whether something was erased is not known then, and to be of use without it is what a tier of one's
    own is for.
    """

    def __init__(self, inner: Tier, leader: Leader, *, memo: Path) -> None:
        self._inner = inner
        self._leader = leader
        self._memo = memo
        self._heeded: int | None = None
        """The leader's epoch up to which `inner` is rid of what was erased. None: it has not been asked yet."""
        self._unreachable = False
        self._looking: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def capacity_bytes(self) -> int:
        return self._inner.capacity_bytes

    async def get_many(self, keys: Collection[Key]) -> dict[Key, Entry]:
        if await self._still_behind():
            return {}
        found = await self._inner.get_many(keys)
        return {} if self._behind() else found

    def lacks(self, keys: Collection[Key]) -> bool:
        return isinstance(self._inner, KnowingTier) and self._inner.lacks(keys)

    async def sizes(self, keys: Collection[Key]) -> dict[Key, int]:
        return {} if await self._still_behind() else await self._inner.sizes(keys)

    async def put_many(self, entries: Mapping[Key, Entry], *, epoch: int | None = None) -> frozenset[Key]:
        # Even while behind: what was prepared before an erasure is refused or erased, because erasing changes the epoch.
        return await self._inner.put_many(entries, epoch=epoch)

    async def delete_many(self, keys: Collection[Key]) -> int:
        return await self._inner.delete_many(keys)

    async def forget(self, scope: Scope) -> int:
        return await self._inner.forget(scope)

    async def keys(self, scope: Scope = EVERYTHING) -> list[Key]:
        return await self._inner.keys(scope)

    def touch(self, keys: Iterable[Key]) -> None:
        self._inner.touch(keys)

    async def keep(self, keys: Collection[Key], until_s: float) -> int:
        return await self._inner.keep(keys, until_s)

    def epoch(self) -> int:
        return self._inner.epoch()

    async def stats(self) -> TierStats:
        return await self._inner.stats()

    async def aclose(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
            self._looking = None
        await self._inner.aclose()

    def _behind(self) -> bool:
        """Whether `inner` may hold what others erased. If so, sees to it that soon it does not."""
        if self._heeded == self._leader.epoch():
            return False
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look())
        return self._heeded is not None or not self._unreachable

    async def _still_behind(self) -> bool:
        if self._behind() and self._looking is not None:
            await asyncio.wait((self._looking,), timeout=_PATIENCE_S)
        return self._behind()

    async def _look(self) -> None:
        # Asked for before: what was heard of in the meantime may not be among what is told, and is looked for once more.
        epoch = self._leader.epoch()
        try:
            number, erased = await self._leader.erasures(await asyncio.to_thread(self._remembered))
            for erasure in dict.fromkeys(erased):
                if erasure.scope is not None:
                    await self._inner.forget(erasure.scope)
                else:
                    await self._inner.delete_many(erasure.keys)
            await asyncio.to_thread(self._remember, number)
        except TierFailed:
            self._unreachable = True
            return
        self._heeded = epoch

    def _remembered(self) -> int:
        try:
            return int(self._memo.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0  # all that is known to have been erased is erased again

    def _remember(self, number: int) -> None:
        written = self._memo.with_name(f"{self._memo.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk, say: some erasures are then done twice
            written.write_text(str(number), encoding="ascii")
            written.replace(self._memo)


def following(inner: Tier, leader: Leader, folder: Path, url: str) -> FollowingTier:
    """`inner`, whose files lie in `folder`, following the server at `url`: each server has a memo of its own there."""
    return FollowingTier(inner, leader, memo=folder / f"erased-{sha256(url.encode()).hexdigest()[:16]}")
