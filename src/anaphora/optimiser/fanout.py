"""Of many requests at once with one cold prefix, the first goes ahead and the others wait for its first token (R22).

An entry can be read only once the answer of the request that writes it has begun. Sent all at once, each of N requests pays
for the whole prefix; sent one ahead, N - 1 of them read it. What one of them waits for is decided purely (`Cold`); the waiting
itself is bounded, and whoever goes ahead and fails is followed by the next.
"""

from __future__ import annotations

import asyncio

import msgspec

from anaphora import breakpoints
from anaphora.optimiser.history import Known, marked
from anaphora.optimiser.plans import Plan
from anaphora.profiles import Profile
from anaphora.prompt import Lengths, Prompt

LONGEST_S = 15.0
"""Nobody waits longer for another's first token."""


class Cold(msgspec.Struct, frozen=True):
    """What one request writes, and what it could read if somebody else had written it."""

    writes: tuple[tuple[bytes, int], ...]
    """Names of prefixes and their tokens."""
    reads: tuple[tuple[bytes, int], ...]
    """The longest first."""
    readable: int
    """Tokens that can be read already."""
    least: int
    """So many more tokens must be read for waiting to pay."""


def cold(prompt: Prompt, lengths: Lengths, profile: Profile, known: Known, plan: Plan | None = None) -> Cold:
    """`plan`: what is added to the body; None: it is sent as it is."""
    ends, names = lengths.ends, known.names
    if profile.accounting == "openai-classic":
        blocks = [i for i, end in enumerate(ends) if end >= profile.minimum]
        writes, lookups = blocks, blocks[::-1]
    else:
        sent = prompt if plan is None else marked(prompt, plan.marks, plan.fields)
        planned = breakpoints.plan(sent, lengths, profile)
        writes, lookups = [point.block for point in planned.writes], list(planned.lookups)
    alive = set(known.alive)
    return Cold(
        writes=tuple((names[i], ends[i]) for i in writes if i not in alive),
        reads=tuple((names[i], ends[i]) for i in lookups),
        readable=max((ends[i] for i in lookups if i in alive), default=0),
        least=profile.minimum if profile.rates.read < 1 else lengths.total + 1,
    )


def saved(num_requests: int, tokens: int, profile: Profile) -> float:
    """Tokens at the plain price that one warm-up saves `num_requests` requests with a cold prefix of `tokens`."""
    dearest = max((float(profile.rates.write.get(ttl, 1)) for ttl in profile.ttls[:1]), default=1.0)
    return max(0, num_requests - 1) * (dearest - float(profile.rates.read)) * tokens


class Turn:
    """One request's place. Wait, send, say `begun` at the first token, and `over` in any case."""

    def __init__(self, fan_out: FanOut, scope: str, need: Cold) -> None:
        self._fan_out = fan_out
        self._scope = scope
        self._need = need
        self._readable = need.readable
        self._warming: list[tuple[str, bytes]] = []
        self.waited = False

    async def wait(self, longest_s: float = LONGEST_S) -> bool:
        """Returns when it is this request's turn. False: what it waited for did not come in time, or failed for all."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + longest_s
        while (found := self._fan_out.warming(self._scope, self._need, self._readable)) is not None:
            tokens, warming = found
            self.waited = True
            await asyncio.wait({warming}, timeout=max(0.0, until_s - loop.time()))
            if not warming.done():
                return False
            if warming.result():
                self._readable = tokens
        self._warming = self._fan_out.warm(self._scope, self._need)
        return True

    def begun(self) -> None:
        """The first token is there: what this request writes can be read."""
        self._fan_out.done(self._warming, readable=True)
        self._warming = []

    def over(self) -> None:
        """The request ended; without a first token, one of those that wait goes ahead instead."""
        self._fan_out.done(self._warming, readable=False)
        self._warming = []


class FanOut:
    """Who is writing which prefix now. Made for one event loop."""

    def __init__(self) -> None:
        self._futures: dict[tuple[str, bytes], asyncio.Future[bool]] = {}

    def __len__(self) -> int:
        return len(self._futures)

    def turn(self, scope: str, need: Cold) -> Turn:
        """`scope`: whose prefixes these are, and where they go: nothing is shared between scopes."""
        return Turn(self, scope, need)

    def warming(self, scope: str, need: Cold, readable: int) -> tuple[int, asyncio.Future[bool]] | None:
        """The longest prefix that another request is writing now, if it is worth waiting for."""
        for name, tokens in need.reads:
            if tokens - readable < need.least:
                return None
            future = self._futures.get((scope, name))
            if future is not None:
                return tokens, future
        return None

    def warm(self, scope: str, need: Cold) -> list[tuple[str, bytes]]:
        """This request writes now what nobody else does."""
        keys = [(scope, name) for name, _ in need.writes if (scope, name) not in self._futures]
        loop = asyncio.get_running_loop()
        for key in keys:
            self._futures[key] = loop.create_future()
        return keys

    def done(self, keys: list[tuple[str, bytes]], *, readable: bool) -> None:
        for key in keys:
            self._futures.pop(key).set_result(readable)
