"""Entries of a provider's cache that are kept alive by a read in time: the last request once more, with no answer wanted.

Whether that pays is `optimiser.ping_due`'s decision, what may be spent the budget's. Only Anthropic's dialect has a request
that reads and says nothing (`max_tokens: 0`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable

import msgspec

from anaphora.clock import Clock
from anaphora.errors import ServiceError
from anaphora.events import Answered, Emit
from anaphora.optimiser import History, Plan, ping_due
from anaphora.profiles import Profile
from anaphora.prompt import Lengths, Prompt
from anaphora.types import Request, Scope, Usage
from anaphora.wire.fields import Json

MAX_KEPT = 256
"""Conversations whose last request is remembered for this, the latest."""
TAG = "keep-alive"
"""Of pings, in the ledger."""
_HOUR_S = 3600.0
_FIRST_LOOK_S = 60.0
"""No entry ends before that, and by then it can be read."""

Send = Callable[[str, Request, Json], Awaitable[Usage]]
"""The name of the upstream, whose request it is, and the body. Raises ServiceError."""


class Sent(msgspec.Struct, frozen=True):
    """A request that was sent, and what was known of its prompt."""

    request: Request
    upstream: str
    prompt: Prompt
    lengths: Lengths
    profile: Profile
    history: History
    plan: Plan
    body: Json


class _Kept:
    __slots__ = ("asked_s", "look_s", "sent")

    def __init__(self, sent: Sent, asked_s: float) -> None:
        self.sent = sent
        self.asked_s = asked_s
        self.look_s = asked_s + _FIRST_LOOK_S


class Pinging:
    """For one event loop. `tokens_per_hour`: what may be spent, in tokens at the plain price."""

    def __init__(self, tokens_per_hour: int, *, clock: Clock, emit: Emit) -> None:
        self._budget = tokens_per_hour
        self._clock = clock
        self._emit = emit
        self._kept: OrderedDict[tuple[str, str, bytes], _Kept] = OrderedDict()
        self._spent: deque[tuple[float, int]] = deque()
        self._num_pings = 0

    def __len__(self) -> int:
        return len(self._kept)

    def sent(self, sent: Sent) -> None:
        """A request goes out: the latest one of its conversation is what a ping would repeat."""
        if not self._budget or sent.prompt.dialect != "anthropic" or not _can_be_repeated(sent.body):
            return
        now_s = self._clock.now_s()
        known = sent.history.know(sent.prompt, sent.profile, now_s)
        name = (sent.request.tenant, sent.upstream, sent.history.conversation(known))
        self._kept[name] = _Kept(sent, now_s)
        self._kept.move_to_end(name)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def forget(self, scope: Scope) -> None:
        for name in [name for name in self._kept if scope.tenant in (None, name[0])]:
            del self._kept[name]

    async def once(self, send: Send) -> int:
        """Send the pings that are due now; how many those were."""
        num_pings = 0
        for name, kept in list(self._kept.items()):
            now_s = self._clock.now_s()
            if kept.look_s > now_s or self._kept.get(name) is not kept:
                continue
            one = kept.sent
            left = self._budget - self._spent_since(now_s - _HOUR_S)
            found = ping_due(
                one.prompt, one.lengths, one.profile, one.history, asked_s=kept.asked_s, now_s=now_s, budget_tokens=left
            )
            if found.again_s is None:
                del self._kept[name]
                continue
            kept.look_s = found.again_s
            if not found.due:
                continue
            self._spent.append((now_s, found.tokens))
            try:
                usage = await send(one.upstream, one.request, {**one.body, "max_tokens": 0})
            except ServiceError:
                self._kept.pop(name, None)  # it may be alive or not: the next request tells
                continue
            known = one.history.know(one.prompt, one.profile, now_s)
            one.history.refreshed(one.prompt, one.lengths, one.profile, known, now_s, one.plan)
            self._book(one, usage, self._clock.now_s() - now_s)
            num_pings += 1
        return num_pings

    def _spent_since(self, since_s: float) -> int:
        while self._spent and self._spent[0][0] <= since_s:
            self._spent.popleft()
        return sum(tokens for _, tokens in self._spent)

    def _book(self, sent: Sent, usage: Usage, took_s: float) -> None:
        """A ping costs money like any request."""
        self._num_pings += 1
        model = sent.request.model
        self._emit(
            Answered(
                sent.request.tenant,
                model,
                "bypass",
                "finished",
                usage,
                ("max_tokens",),
                took_s,
                None,
                asked=model,
                answered=sent.prompt.model,
                upstream=sent.upstream,
                tag=TAG,
            )
        )


def _can_be_repeated(body: Json) -> bool:
    """Without a change that would make it another prompt: a pre-warm takes neither of these."""
    thinking, choice, output = body.get("thinking"), body.get("tool_choice"), body.get("output_config")
    if isinstance(thinking, dict) and thinking.get("type") == "enabled":
        return False
    if isinstance(choice, dict) and choice.get("type") in ("any", "tool"):
        return False
    return not (isinstance(output, dict) and output.get("format") is not None)
