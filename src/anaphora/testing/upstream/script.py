"""What a test upstream is told to do: which requests fail and how, and what is answered instead of an echo. No I/O.

A fault or an answer is for the next requests that match, in the order they were told. A fault with a `share` below 1 is for
that share of them, drawn from a seeded generator: the same requests in the same order meet the same faults.
"""

from __future__ import annotations

from random import Random
from typing import Any, Generic, TypeVar

import msgspec

from anaphora.types import FinishReason

QUESTIONS = frozenset({"/v1/messages", "/v1/chat/completions", "/v1/responses", "/v1/completions"})

BREAKS = frozenset({"cut", "reset"})
"""The connection ends: as if the server had died, or with a TCP reset."""
PAUSES = frozenset({"slow", "stall"})
"""The head of the answer is late, or the answer stands still in the middle."""
MALFORMS = frozenset({"malformed-sse", "malformed-json"})
KINDS = (*sorted(BREAKS), *sorted(PAUSES), *sorted(MALFORMS), "error")
"""Beside these every status from 400 to 599 is a kind."""

_AFTER_EVENTS = 3


class Match(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which requests are meant. What is empty does not matter, but without a path only questions are meant."""

    path: str = ""
    model: str = ""
    contains: str = ""
    """Text within the body as it was sent."""

    def __call__(self, asked: Asked) -> bool:
        return (
            (asked.path == self.path if self.path else asked.path in QUESTIONS)
            and (not self.model or asked.model == self.model)
            and self.contains.encode() in asked.body
        )


class Asked(msgspec.Struct, frozen=True):
    """A request, as far as it matters for what is done with it."""

    path: str
    model: str
    body: bytes


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One way to fail. `kind`: a status ("429"), or one of `KINDS`; "error" is the dialect's error event within a stream."""

    kind: str
    count: int | None = 1
    """Requests that it meets. None: all, until it is taken back. With a `share` it always is None."""
    match: Match = Match()
    share: float = 1.0
    after_events: int | None = None
    """Events of the stream ("error": tokens of the answer) that go out before it. None: 3, and none before a reset."""
    wait_s: float | None = None
    """How long "slow" and "stall" last. None: until the client leaves."""
    retry_after_s: float | None = None
    should_retry: bool | None = None
    """Sent as `x-should-retry`. None: what the provider sends with that status."""
    status: int = 529
    """That an "error" event means, and that it has if the answer was not to be streamed."""
    message: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS and not (self.kind.isdigit() and 400 <= int(self.kind) <= 599):
            raise ValueError(f"no fault is called '{self.kind}'; there are statuses from 400 to 599, {', '.join(KINDS)}")
        if not 0 <= self.share <= 1:
            raise ValueError("a share is from 0 to 1")

    @property
    def refusal(self) -> int | None:
        """The status of the answer, where it is refused at once."""
        return int(self.kind) if self.kind.isdigit() else None

    @property
    def at_event(self) -> int:
        if self.after_events is not None:
            return self.after_events
        return 0 if self.kind == "reset" else _AFTER_EVENTS


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any] = {}


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is answered instead of an echo.

    Either content in no dialect, thinking first, then text, then tool calls; or, `events` and `body`, just the bytes that go
    out, for whatever no dialect here knows. With those the request is not read either: any body is accepted.
    """

    text: str = ""
    num_tokens: int = 0
    """A text of so many tokens, where `text` is empty."""
    thinking: str = ""
    signature: str = ""
    tools: tuple[ToolCall, ...] = ()
    reason: FinishReason | None = None
    """Why it ends. None: "tool_use" with tools, else "end_turn"."""
    events: tuple[str | dict[str, Any], ...] = ()
    """Of a stream: text as it is, objects framed as the dialect does it."""
    body: Any = None
    """Of an answer that is not streamed: any JSON."""
    status: int = 200
    """With `events` or `body`; so are `headers`."""
    headers: dict[str, str] = {}
    count: int | None = 1
    match: Match = Match()

    @property
    def raw(self) -> bool:
        return bool(self.events) or self.body is not None


Told = TypeVar("Told", Fault, Answer)


class _Queue(Generic[Told]):
    """In the order they were told, with how many requests each is still for."""

    def __init__(self) -> None:
        self.told: list[tuple[Told, int | None]] = []

    def add(self, told: Told, count: int | None) -> None:
        if count is None or count > 0:
            self.told.append((told, count))

    def use(self, index: int) -> Told:
        told, left = self.told[index]
        if left is not None:
            if left == 1:
                del self.told[index]
            else:
                self.told[index] = (told, left - 1)
        return told


class Script:
    """Everything a test upstream was told and has not done yet."""

    def __init__(self, faults: tuple[Fault, ...] = (), random: Random | None = None) -> None:
        self._random = random or Random(0)
        self._faults: _Queue[Fault] = _Queue()
        self._answers: _Queue[Answer] = _Queue()
        for fault in faults:
            self.add_fault(fault)

    def add_fault(self, fault: Fault) -> None:
        self._faults.add(fault, fault.count if fault.share == 1 else None)

    def add_answer(self, answer: Answer) -> None:
        self._answers.add(answer, answer.count)

    def fault(self, asked: Asked) -> Fault | None:
        """What goes wrong with this request; that is one less of it then."""
        drawn = self._random.random() if asked.path in QUESTIONS else 1.0
        for index, (fault, _) in enumerate(self._faults.told):
            if not fault.match(asked):
                continue
            if fault.share == 1 or drawn < fault.share:
                return self._faults.use(index)
            drawn -= fault.share  # shares of one request add up; they do not multiply
        return None

    def answer(self, asked: Asked) -> Answer | None:
        for index, (answer, _) in enumerate(self._answers.told):
            if answer.match(asked):
                return self._answers.use(index)
        return None

    def faults(self) -> list[Fault]:
        return [msgspec.structs.replace(fault, count=left) for fault, left in self._faults.told]

    def answers(self) -> list[Answer]:
        return [msgspec.structs.replace(answer, count=left) for answer, left in self._answers.told]

    def clear_faults(self) -> None:
        self._faults.told.clear()

    def clear_answers(self) -> None:
        self._answers.told.clear()
