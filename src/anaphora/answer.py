"""What a client gets from the gateway: an answer that is there already, or one that is being computed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Literal

import msgspec

from anaphora.accounting import NOBODY, Asked, Bill
from anaphora.clock import Clock
from anaphora.errors import ServiceError
from anaphora.events import Answered, AnswerNamed, Emit, Hit, Miss, MissReason
from anaphora.flight import Subscription
from anaphora.memory import Recall
from anaphora.transcript import replay
from anaphora.types import (
    Begin,
    Completion,
    Delta,
    End,
    Finish,
    FinishReason,
    Key,
    Raw,
    Request,
    Said,
    TextDelta,
    ThinkingDelta,
    ToolUseDelta,
    Usage,
)

Source = Literal["hit", "miss", "collapsed", "bypass"]
NO_USAGE = Usage()
_CHARS_PER_TOKEN = 4
"""A rule of thumb, for what was cut before anybody counted its tokens."""


class Recalled:
    """An answer from the cache. Times in seconds."""

    __slots__ = ("age_s", "completion", "key", "level", "misses", "saved_s", "ttl_s")
    source: Source = "hit"

    def __init__(self, hit: Hit[Completion], key: Key, misses: tuple[Miss, ...] = ()) -> None:
        self.completion = hit.value
        self.level = hit.level
        self.misses = misses
        """Of the levels that were asked before."""
        self.key = key[:8].hex()
        """Start of the question's key in hex. (The entry's own may be derived from it.)"""
        self.age_s = hit.age_s
        self.ttl_s = hit.ttl_s
        self.saved_s = hit.cost_s

    def deltas(self) -> Iterator[Said]:
        return replay(self.completion)

    def answered(self, request: Request, elapsed_s: float, asked: Asked = NOBODY) -> Answered:
        completion = self.completion
        reasons = tuple([choice.reason for choice in completion.choices])
        usage = completion.usage
        return Answered(
            request.tenant,
            request.model,
            "hit",
            "finished",
            usage,
            reasons,
            elapsed_s,
            elapsed_s,
            (),
            self.saved_s,
            self.level,
            asked.model,
            completion.model,
            completion.upstream,
            request_id=asked.request_id,
            workspace=asked.workspace,
            tag=asked.tag,
        )


class Live:
    """An answer that is being computed. Iterated by one task; whoever holds it must call `leave` in the end."""

    __slots__ = (
        "_begun",
        "_meter",
        "_older",
        "_subscription",
        "bill",
        "instead",
        "key",
        "misses",
        "raw",
        "reason",
        "source",
    )

    def __init__(
        self,
        subscription: Subscription,
        source: Source,
        recalled: Recall,
        meter: Meter,
        bill: Bill | None = None,
        older: Callable[[], Awaitable[Hit[Completion] | None]] | None = None,
    ) -> None:
        """`older` looks for an answer past its lifetime, for where this one cannot be computed."""
        self.source = source
        self.bill = bill
        """Whose usage the answer carries; None: that of the backend."""
        self.key = recalled.key[:8].hex() if recalled.key is not None else ""
        """Start of the question's key in hex; empty where it has none."""
        self.misses = recalled.misses
        """Of all levels of the answer cache."""
        self.reason = _reason(recalled.misses)
        """Why it was not recalled. None: no level was asked."""
        self.raw: list[Raw] = []
        """Of an answer asked for whole, and given whole by an upstream: its own bytes. Filled by `whole`."""
        self.instead: Hit[Completion] | None = None
        """An answer past its lifetime, which is given because no new one could be computed."""
        self._older = older
        self._begun = False
        self._subscription = subscription
        self._meter = meter

    async def burst(self) -> list[Delta]:
        """All deltas since the last call, at least one; empty at the end. Raises ServiceError where the computation fails."""
        if self.instead is not None:
            return []
        try:
            burst = await self._subscription.burst()
        except Exception as error:  # of any kind, and it goes on its way
            self.instead = await self._look_back(error)
            if self.instead is None:
                self._meter.finish("failed")
                raise
            old: list[Delta] = list(replay(self.instead.value))
            self._meter.is_a_hit()
            self._meter.note(old)
            return old
        self._begun = True
        entered = burst if self.bill is None else self.bill.enter(burst)
        self._meter.note(burst)  # after the bill: which is settled with the first delta
        return entered

    async def _look_back(self, error: Exception) -> Hit[Completion] | None:
        """What else there is to give, if nothing was given yet and it is not the request that is wrong."""
        outage = isinstance(error, ServiceError) and (error.status >= 500 or error.status == 429)
        return await self._older() if self._older is not None and outage and not self._begun else None

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while burst := await self.burst():
            for delta in burst:
                yield delta

    async def whole(self) -> Completion | None:
        """The finished answer; None where its client left before it was finished."""
        end: End | None = None
        while burst := await self.burst():
            self.raw += [delta for delta in burst if isinstance(delta, Raw)]
            if isinstance(burst[-1], End):
                end = burst[-1]
        completion = self._subscription.completion if self.instead is None else self.instead.value
        if end is None or completion is None:
            return None
        return (
            completion
            if self.bill is None or self.instead is not None
            else msgspec.structs.replace(completion, usage=end.usage)
        )

    @property
    def over(self) -> bool:
        """Nothing more will be computed: everything there will be is there."""
        return self._subscription.over

    def leave(self) -> None:
        """Safe to call at any time, more than once: ends a wait in `burst`, cancels the computation if nobody else waits."""
        self._subscription.leave()
        self._meter.finish("left")


def _reason(misses: tuple[Miss, ...]) -> MissReason | None:
    """The most telling one: why what is kept of this very question was of no use, else what the last level says."""
    if not misses:
        return None
    return misses[-1].reason if misses[0].reason is MissReason.ABSENT else misses[0].reason


Answer = Recalled | Live


class Meter:
    """Times one client's answer, and says so in one event when it is over."""

    def __init__(
        self,
        request: Request,
        source: Source,
        started_s: float,
        clock: Clock,
        emit: Emit,
        *,
        asked: Asked = NOBODY,
        bill: Bill | None = None,
        refresh: bool = False,
        audit: bool = False,
    ) -> None:
        self._refresh = refresh
        self._audit = audit
        self._asked = asked
        self._bill = bill
        self._begin: Begin | None = None
        self._num_chars = 0
        self._request = request
        self._source: Source = source
        self._started_s = started_s
        self._clock = clock
        self._emit = emit
        self._first_s: float | None = None
        self._last_s = started_s
        self._gaps_s: list[float] = []
        self._reasons: list[FinishReason] = []
        self._over = False

    def is_a_hit(self) -> None:
        """What could not be computed was remembered after all."""
        self._source, self._bill = "hit", None

    def note(self, burst: list[Delta]) -> None:
        now_s = self._clock.monotonic_s()
        for delta in burst:
            if isinstance(delta, Raw):
                continue
            if isinstance(delta, TextDelta | ThinkingDelta):
                self._piece(len(delta.text), now_s)
            elif isinstance(delta, ToolUseDelta):
                self._piece(len(delta.arguments), now_s)
            elif isinstance(delta, Finish):
                self._reasons.append(delta.reason)
            elif isinstance(delta, Begin):
                self._begin = delta
                if delta.answer_id and self._asked.request_id:
                    self._emit(AnswerNamed(self._request.tenant, self._asked.request_id, delta.answer_id))
            elif isinstance(delta, End):
                self.finish("finished", delta.usage, delta.compute_s)

    def _piece(self, num_chars: int, now_s: float) -> None:
        self._num_chars += num_chars
        if self._first_s is None:
            self._first_s = now_s - self._started_s
        else:
            self._gaps_s.append(now_s - self._last_s)
        self._last_s = now_s

    def finish(self, outcome: Literal["finished", "failed", "left"], usage: Usage = NO_USAGE, compute_s: float = 0.0) -> None:
        if self._over:
            return
        self._over = True
        request, asked, begin, bill = self._request, self._asked, self._begin, self._bill
        billed = bill.usage(usage) if bill is not None and outcome == "finished" else None
        self._emit(
            Answered(
                request.tenant,
                request.model,
                self._source,
                outcome,
                usage,
                tuple(self._reasons),
                self._clock.monotonic_s() - self._started_s,
                self._first_s,
                tuple(self._gaps_s),
                compute_s if self._source in ("collapsed", "hit") else 0.0,
                "",
                asked.model,
                "" if begin is None else begin.model,
                "" if begin is None else begin.upstream,
                billed,
                None if begin is None or outcome == "finished" else self._begun(begin),
                asked.request_id,
                asked.workspace,
                asked.tag,
                self._refresh,
                self._audit and self._source == "miss",
            )
        )

    def _begun(self, begin: Begin) -> Usage:
        usage = begin.usage if self._bill is None else self._bill.usage(begin.usage)
        said = -(-self._num_chars // _CHARS_PER_TOKEN)
        return msgspec.structs.replace(usage, output_tokens=max(usage.output_tokens, said))
