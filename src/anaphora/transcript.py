"""Deltas to a completion and back. Pure.

Law: for every completion `c` that a `Collector` made, `collect(replay(c)) == c`. So an answer that is replayed from the cache
in another form than it was first asked for (streamed or whole) has the same content, and may itself be collected again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from anaphora.errors import BackendFailed
from anaphora.types import (
    Begin,
    Choice,
    Completion,
    Delta,
    End,
    Finish,
    Raw,
    Said,
    TextDelta,
    TextPart,
    ThinkingDelta,
    ThinkingPart,
    TokenLogprob,
    ToolUseDelta,
    ToolUsePart,
    Usage,
)

PIECE_CHARS = 48
"""Smallest piece of a replayed text; short answers come in few deltas."""
MAX_PIECES = 32
"""A replayed text part has about this many deltas at most, however long it is."""


class _Draft:
    """One choice while its deltas come in."""

    __slots__ = ("finish", "logprobs", "parts", "tools")

    def __init__(self) -> None:
        self.parts: list[_Text | _Thinking | _ToolUse] = []
        self.tools: dict[int, _ToolUse] = {}
        self.logprobs: list[TokenLogprob] = []
        self.finish: Finish | None = None

    def text(self, delta: TextDelta) -> None:
        if delta.logprobs:
            self.logprobs += delta.logprobs
        if not delta.text:
            return
        last = self.parts[-1] if self.parts else None
        if not isinstance(last, _Text):
            last = _Text()
            self.parts.append(last)
        last.pieces.append(delta.text)

    def thinking(self, delta: ThinkingDelta) -> None:
        last = self.parts[-1] if self.parts else None
        if not isinstance(last, _Thinking) or last.signature:  # a signature closes its block
            last = _Thinking()
            self.parts.append(last)
        last.pieces.append(delta.text)
        last.signature = delta.signature

    def tool_use(self, delta: ToolUseDelta) -> None:
        call = self.tools.get(delta.index)
        if call is None:
            if delta.index != len(self.tools) or not delta.name:
                raise _disorder(f"tool call {delta.index} does not begin with its name, or not in its turn")
            call = self.tools[delta.index] = _ToolUse(delta.id, delta.name)
            self.parts.append(call)
        call.pieces.append(delta.arguments)

    def choice(self) -> Choice:
        assert self.finish is not None
        return Choice(
            content=tuple(part.freeze() for part in self.parts),
            reason=self.finish.reason,
            stop_sequence=self.finish.stop_sequence,
            logprobs=tuple(self.logprobs) or None,
        )


class _Text:
    __slots__ = ("pieces",)

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def freeze(self) -> TextPart:
        return TextPart("".join(self.pieces))


class _Thinking:
    __slots__ = ("pieces", "signature")

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.signature = ""

    def freeze(self) -> ThinkingPart:
        return ThinkingPart("".join(self.pieces), self.signature)


class _ToolUse:
    __slots__ = ("id", "name", "pieces")

    def __init__(self, id_: str, name: str) -> None:
        self.id = id_
        self.name = name
        self.pieces: list[str] = []

    def freeze(self) -> ToolUsePart:
        return ToolUsePart(self.id, self.name, "".join(self.pieces))


class Collector:
    """Takes the deltas of one answer in order. `completion` is None until its End: a cut answer never becomes one.

    Raises BackendFailed for deltas out of the order that `types.Delta` states, so that no muddled answer is ever learned.
    """

    __slots__ = ("_begin", "_choices", "completion")

    def __init__(self) -> None:
        self._begin: Begin | None = None
        self._choices: dict[int, _Draft] = {}
        self.completion: Completion | None = None

    def add(self, delta: Delta) -> None:
        if self.completion is not None:
            raise _disorder("a delta after End")
        if isinstance(delta, Raw):
            return
        if isinstance(delta, TextDelta) and (draft := self._choices.get(delta.choice)) is not None and draft.finish is None:
            draft.text(delta)  # nearly every one
            return
        if self._begin is None:
            if not isinstance(delta, Begin):
                raise _disorder(f"{type(delta).__name__} before Begin")
            self._begin = delta
            return
        if isinstance(delta, Begin):
            raise _disorder("a second Begin")
        if isinstance(delta, End):
            self.completion = self._complete(self._begin, delta)
            return
        self._add_to_choice(delta)

    def _add_to_choice(self, delta: TextDelta | ThinkingDelta | ToolUseDelta | Finish) -> None:
        draft = self._choices.get(delta.choice)
        if draft is None:
            draft = self._choices[delta.choice] = _Draft()
        if draft.finish is not None:
            raise _disorder(f"{type(delta).__name__} after Finish of choice {delta.choice}")
        if isinstance(delta, TextDelta):
            draft.text(delta)
        elif isinstance(delta, ThinkingDelta):
            draft.thinking(delta)
        elif isinstance(delta, ToolUseDelta):
            draft.tool_use(delta)
        else:
            draft.finish = delta

    def _complete(self, begin: Begin, end: End) -> Completion:
        if sorted(self._choices) != list(range(len(self._choices))) or not self._choices:
            raise _disorder(f"choices {sorted(self._choices)} at End")
        drafts = [self._choices[index] for index in range(len(self._choices))]
        if any(draft.finish is None for draft in drafts):
            raise _disorder("End before every choice was finished")
        choices = tuple(draft.choice() for draft in drafts)
        return Completion(begin.model, choices, end.usage, end.compute_s, end.faithful, begin.upstream)


def _disorder(what: str) -> BackendFailed:
    return BackendFailed(f"The backend broke the order of an answer: {what}.")


def collect(deltas: Iterable[Delta]) -> Completion | None:
    """The completion that `deltas` make, or None where they were cut before End."""
    collector = Collector()
    for delta in deltas:
        collector.add(delta)
    return collector.completion


def replay(completion: Completion) -> Iterator[Said]:
    """The deltas of a remembered answer: each text in several pieces, log-probabilities kept beside the text they belong to."""
    usage = completion.usage
    yield Begin(completion.model, input_side(usage), completion.upstream)
    for index, choice in enumerate(completion.choices):
        yield from _replay_choice(index, choice)
        yield Finish(index, choice.reason, choice.stop_sequence)
    yield End(usage, completion.compute_s, completion.faithful)


def _replay_choice(index: int, choice: Choice) -> Iterator[Said]:
    logprobs = choice.logprobs or ()
    if logprobs and len(choice.content) == 1 and _spells(logprobs, choice.content[0]):
        yield from _replay_tokens(index, logprobs)
        return
    if logprobs:  # they do not line up with the text (a stop string cut it, or a character spans tokens): all at the front
        yield TextDelta(index, "", logprobs)
    call = 0
    for part in choice.content:
        if isinstance(part, TextPart):
            for piece in _pieces(part.text):
                yield TextDelta(index, piece)
        elif isinstance(part, ThinkingPart):
            yield ThinkingDelta(index, part.text, part.signature)
        else:
            yield ToolUseDelta(index, call, "", part.id, part.name)
            yield ToolUseDelta(index, call, part.arguments)
            call += 1


def _spells(logprobs: tuple[TokenLogprob, ...], part: TextPart | ThinkingPart | ToolUsePart) -> bool:
    return isinstance(part, TextPart) and "".join(entry.token for entry in logprobs) == part.text


def _replay_tokens(index: int, logprobs: tuple[TokenLogprob, ...]) -> Iterator[Said]:
    step = max(8, -(-len(logprobs) // MAX_PIECES))
    for start in range(0, len(logprobs), step):
        group = logprobs[start : start + step]
        yield TextDelta(index, "".join(entry.token for entry in group), group)


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces that end after a space where one is near."""
    size = max(PIECE_CHARS, -(-len(text) // MAX_PIECES))
    start = 0
    while len(text) - start > size:
        end = text.find(" ", start + size, start + 2 * size) + 1 or start + size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def input_side(usage: Usage) -> Usage:
    """`usage` as it is known before the first token."""
    return msgspec.structs.replace(usage, output_tokens=0)
