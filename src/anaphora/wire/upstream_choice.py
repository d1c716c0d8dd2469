"""One choice of an answer, its deltas brought into the order that `types.ToolUseDelta` asks for.

OpenAI's streams may write several tool calls at the same time. Here each is let through to its end before the next: the first
as it comes, what comes of others meanwhile when their turn is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator

import msgspec

from anaphora.types import Said, TextDelta, ThinkingDelta, ToolUseDelta
from anaphora.wire.upstream import malformed


class _Call:
    __slots__ = ("begun", "closed", "id", "index", "name", "said", "waiting")

    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.index = 0
        self.begun = False
        self.closed = False
        self.waiting: list[str] = []
        self.said: list[str] = []

    def is_complete(self) -> bool:
        """Nothing can follow: its end was told, or its arguments are a whole object."""
        if self.closed:
            return True
        if not self.said or not self.said[-1].rstrip().endswith("}"):
            return False
        try:
            msgspec.json.decode("".join(self.said))
        except (msgspec.MsgspecError, RecursionError):
            return False
        return True


class ChoiceOrder:
    def __init__(self, choice: int) -> None:
        self._choice = choice
        self._calls: dict[Hashable, _Call] = {}
        self._queue: deque[_Call] = deque()  # not yet let through to their end; the first is being let through
        self._held: list[Said] = []  # came while a call was unfinished
        self._num_begun = 0
        self.faithful = True

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    def text(self, delta: TextDelta | ThinkingDelta) -> tuple[Said, ...]:
        if not self._queue:
            return (delta,)
        self._held.append(delta)
        return ()

    def call(self, key: Hashable, arguments: str = "", *, call_id: str = "", name: str = "") -> Iterator[Said]:
        """More of the call that the upstream knows by `key`."""
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = _Call()
            self._queue.append(call)
        elif call not in self._queue:
            self.faithful = self.faithful and not arguments.strip()  # it had ended
            return
        call.id = call.id or call_id
        call.name = call.name or name
        if arguments:
            call.waiting.append(arguments)
        yield from self._let_through(call)

    def close(self, key: Hashable) -> Iterator[Said]:
        """The call is whole."""
        call = self._calls.get(key)
        if call is not None and call in self._queue:
            call.closed = True
            yield from self._let_through(None)

    def finish(self) -> Iterator[Said]:
        """All that was held back."""
        for call in self._queue:
            if not call.name:
                raise malformed("a tool call without a name")
            call.closed = True
        yield from self._let_through(None)

    def _let_through(self, newest: _Call | None) -> Iterator[Said]:
        """`newest` has just got more, so it goes on."""
        while self._queue:
            call = self._queue[0]
            if not call.name:
                return
            yield from self._say(call)
            if call is newest or not call.is_complete():
                return
            self._queue.popleft()
        yield from self._held
        self._held.clear()

    def _say(self, call: _Call) -> Iterator[Said]:
        if not call.begun:
            call.begun, call.index = True, self._num_begun
            self._num_begun += 1
            yield ToolUseDelta(self._choice, call.index, "", call.id, call.name)
        for piece in call.waiting:
            yield ToolUseDelta(self._choice, call.index, piece)
        call.said += call.waiting
        call.waiting = []
