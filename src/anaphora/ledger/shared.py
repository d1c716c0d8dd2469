"""Limits that hold for several servers together: each tenant's counts lie in a cell that all of them change.

A change is decided here, by the same pure rule as on one server, on what the cell held when it was last seen; it takes place
only if the cell still holds that, and is decided anew otherwise. A process has one change of a tenant under way at a time;
what comes meanwhile goes with the next one. Time is that of the server with the cells.

While the cells cannot be reached nobody waits for them: `take` raises `Away`, and what is used meanwhile is told once they are
back.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from anaphora.clock import Clock
from anaphora.config import LimitConfig
from anaphora.errors import AnaphoraError, LimitReached, TierFailed
from anaphora.events import Emit, Failed
from anaphora.ledger.joint import (
    ByHour,
    Joint,
    Party,
    added,
    charged,
    entered,
    left,
    negative,
    of_hour,
    packed,
    total,
    unpacked,
)
from anaphora.ledger.limits import Counts, Used

log = logging.getLogger(__name__)

REST_S = 1.0
"""Between two looks whether the cells are back."""

Rule = Callable[[Counts, Used, float], Counts]
"""(the counts, what is held of them for answers under way, the time) to the counts after it. Raises LimitReached."""


class Away(AnaphoraError):
    """The cells cannot be reached."""


class Cells(Protocol):
    """`anaphora.tiers.valkey.cells`."""

    async def read(self, name: str) -> tuple[bytes, float]: ...

    async def swap(self, name: str, expected: bytes, data: bytes) -> tuple[bool, bytes, float]: ...

    async def aclose(self) -> None: ...


class Shared:
    """For the event loop that it is made on; `tell` may be called from any thread. `own` says what this server's tenants have
    used of this server alone, `report` is told of failures."""

    def __init__(
        self,
        cells: Cells,
        *,
        server: int,
        process: int,
        own: Callable[[str], Counts],
        clock: Clock,
        report: Emit,
        rest_s: float = REST_S,
    ) -> None:
        self._cells = cells
        self._server = server
        self._process = process
        self._own = own
        self._clock = clock
        self._report = report
        self._rest_s = rest_s
        self._loop = asyncio.get_running_loop()
        self._accounts: dict[str, _Account] = {}
        self._lock = threading.Lock()
        """On what they owe and hold."""
        self._ahead_s = clock.now_s() - clock.monotonic_s()
        """Of this process's monotonic clock is that of the cells, as last heard; at first they are taken to have ours."""
        self._returning: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def away(self) -> bool:
        return self._returning is not None

    def now_s(self) -> float:
        """By the clock of the cells, about."""
        return self._clock.monotonic_s() + self._ahead_s

    async def take(self, tenant: str, limits: LimitConfig, used: Used, rule: Rule, *, holds: bool = False) -> float:
        """Change the counts of `tenant` by `rule`, which charges `used`; when that was. `holds`: until something else is told,
        `used` is what an answer under way may take. Raises LimitReached as `rule` does, and Away."""
        if self.away:
            raise Away
        account = self._account(tenant, limits)
        asking = _Asking(rule, used, holds, self._loop.create_future())
        account.waiting.append(asking)
        self._begin(account)
        try:
            return await asking.done
        except asyncio.CancelledError:
            if asking.granted:
                self._give_back(account, asking)
            raise

    def tell(self, tenant: str, limits: LimitConfig, at_s: float, used: Used, held: Used = Used()) -> None:  # noqa: B008 (frozen)
        """What began at `at_s` has used so much, and holds so much more, or less."""
        self._owe(self._account(tenant, limits), of_hour(at_s, used), of_hour(at_s, held))

    def counts(self, tenant: str) -> tuple[Counts, float] | None:
        """As last heard, and the time. None: nothing was, or what was may be old."""
        account = self._accounts.get(tenant)
        if self.away or account is None or account.data is None:
            return None
        return account.joint.counts, max(account.joint.now_s, self.now_s())

    async def aclose(self) -> None:
        """Tell what is left to tell, if anybody listens."""
        self._closing = True
        if self._returning is not None:
            self._returning.cancel()
        await self.told()
        await self._cells.aclose()

    async def told(self) -> None:
        """Until the cells can be reached and hold all that was told."""
        await asyncio.sleep(0)  # what another thread told is taken in first
        while True:
            tasks = [account.task for account in list(self._accounts.values())]
            unfinished = [task for task in (self._returning, *tasks) if task is not None]
            if not unfinished:
                break
            await asyncio.wait(unfinished)

    # -- one tenant ----------------------------------------------------------------------------------------------------

    def _account(self, tenant: str, limits: LimitConfig) -> _Account:
        return self._accounts.get(tenant) or self._accounts.setdefault(tenant, _Account(tenant, limits))

    def _owe(self, account: _Account, used: ByHour, held: ByHour) -> None:
        with self._lock:
            account.owed, account.held = added(account.owed, used), added(account.held, held)
        with suppress(RuntimeError):  # the loop is closed: this process has ended
            self._loop.call_soon_threadsafe(self._begin, account)

    def _give_back(self, account: _Account, asking: _Asking) -> None:
        """Whoever asked for it is gone."""
        used = of_hour(account.joint.now_s, asking.used)
        self._owe(account, negative(used), negative(used) if asking.holds else {})

    def _begin(self, account: _Account) -> None:
        if account.task is None and not self.away:
            account.task = self._loop.create_task(self._tell_all(account), name="anaphora-limits")

    async def _tell_all(self, account: _Account) -> None:
        try:
            while account.has_news():
                asked, account.waiting = account.waiting, []
                try:
                    await self._change(account, asked)
                except TierFailed as error:
                    self._lost(error)
                    return
                finally:
                    for asking in asked:
                        asking.end(Away())  # no news where it has ended
        finally:
            account.task = None
            for asking in account.waiting:
                asking.end(Away())
            account.waiting = []

    async def _change(self, account: _Account, asked: list[_Asking]) -> None:
        owed: ByHour = {}
        try:
            if account.data is None:
                account.data, time_s = await self._cells.read(account.tenant)
                self._heard(time_s)
            swapped = False
            while not swapped:
                with self._lock:
                    owed, account.owed = added(owed, account.owed), {}
                joint, held, refused = self._decided(account, asked, owed)
                swapped, account.data, time_s = await self._cells.swap(account.tenant, account.data, packed(joint))
                self._heard(time_s)
        except TierFailed:
            with self._lock:
                account.owed = added(account.owed, owed)
            account.doubtful = True
            raise
        account.joint, account.told, account.doubtful = joint, held, False
        for asking, refusal in zip(asked, refused, strict=True):
            if refusal is None:
                if asking.holds:
                    with self._lock:
                        account.held = added(account.held, of_hour(joint.now_s, asking.used))
                if asking.done.cancelled():
                    self._give_back(account, asking)
                asking.granted = not asking.done.cancelled()
            asking.end(joint.now_s if refusal is None else refusal)

    def _decided(
        self, account: _Account, asked: list[_Asking], owed: ByHour
    ) -> tuple[Joint, ByHour, list[LimitReached | None]]:
        """What the cell is to hold, what of that is held by this process, and what `asked` come to."""
        before = unpacked(account.data or b"")
        party = Party(self._server, self._process, self._own(account.tenant), account.told)
        joint = entered(before, party, self.now_s())
        counts, held = joint.counts, account.held
        if self._server in before.servers:  # else it is among what this server has used by its own counts
            counts = charged(account.limits, counts, owed, joint.now_s)
        refused: list[LimitReached | None] = []
        others = joint.held(but=self._process)
        for asking in asked:
            try:
                counts = asking.rule(counts, total([others, *held.values()]), joint.now_s)
            except LimitReached as refusal:
                refused.append(refusal)
                continue
            refused.append(None)
            if asking.holds:
                held = added(held, of_hour(joint.now_s, asking.used))
        return left(joint, party, counts, held), held, refused

    # -- the server with the cells -------------------------------------------------------------------------------------

    def _heard(self, time_s: float) -> None:
        self._ahead_s = time_s - self._clock.monotonic_s()

    def _lost(self, error: TierFailed) -> None:
        self._report(Failed("limits", "change", str(error)))
        if self._returning is None and not self._closing:
            log.warning("limits cannot be shared (%s): meanwhile they are held by what this server alone knows", error)
            self._returning = self._loop.create_task(self._return(), name="anaphora-limits-return")

    async def _return(self) -> None:
        """By changing what could not be changed: a server that is full, say, still answers other questions."""
        try:
            while True:
                await asyncio.sleep(self._rest_s)
                account = next(account for account in list(self._accounts.values()) if account.doubtful)
                try:
                    await self._change(account, [])
                except TierFailed as error:
                    self._report(Failed("limits", "change", str(error)))
                else:
                    break
        finally:
            self._returning = None
        log.warning("limits are shared with other servers again")
        for account in list(self._accounts.values()):
            self._begin(account)


class _Asking:
    __slots__ = ("done", "granted", "holds", "rule", "used")

    def __init__(self, rule: Rule, used: Used, holds: bool, done: asyncio.Future[float]) -> None:
        self.rule = rule
        self.used = used
        self.holds = holds
        self.done = done
        self.granted = False

    def end(self, outcome: float | AnaphoraError) -> None:
        if self.done.done():
            return
        if isinstance(outcome, AnaphoraError):
            self.done.set_exception(outcome)
        else:
            self.done.set_result(outcome)


class _Account:
    """What this process knows of a tenant."""

    __slots__ = ("data", "doubtful", "held", "joint", "limits", "owed", "task", "tenant", "told", "waiting")

    def __init__(self, tenant: str, limits: LimitConfig) -> None:
        self.tenant = tenant
        self.limits = limits
        self.data: bytes | None = None
        """Of the cell, as last seen."""
        self.joint = Joint()
        """What this process has last put there."""
        self.waiting: list[_Asking] = []
        self.owed: ByHour = {}
        """What was used and is not in the cell yet."""
        self.held: ByHour = {}
        """What is reserved for answers of this process under way."""
        self.told: ByHour = {}
        """What of that is in the cell."""
        self.doubtful = False
        """Whether the latest change may have taken place all the same."""
        self.task: asyncio.Task[None] | None = None

    def has_news(self) -> bool:
        return bool(self.waiting or self.owed or self.doubtful or self.held != self.told)
