"""How answers of Chat Completions are read, as OpenAI and the many servers that speak its dialect write them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from anaphora.errors import BackendFailed, UpstreamFailed
from anaphora.types import Begin, Delta, End, Finish, FinishReason, Raw, Said, TextDelta, ThinkingDelta, Usage
from anaphora.wire.fields import Json
from anaphora.wire.sse import Event
from anaphora.wire.upstream import (
    UNREADABLE,
    Body,
    EventReader,
    before_answer,
    json_object,
    malformed,
    object_of,
    objects_of,
    says_more,
    stream_failure,
    text_of,
)
from anaphora.wire.upstream_choice import ChoiceOrder
from anaphora.wire.upstream_openai import error_in, read_logprobs, read_usage

_REASONS: dict[str, FinishReason] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
_BROKEN = frozenset({"error", "abort", "insufficient_system_resource"})
"""Words with which servers end an answer that they could not finish."""

_MESSAGE_FIELDS = frozenset({"role", "content", "tool_calls", "reasoning_content", "reasoning"})
_CALL_FIELDS = frozenset({"index", "id", "type", "function"})


class ChatChoice:
    """One choice of an answer, streamed or whole."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._order = ChoiceOrder(index)
        self._keys: dict[int, tuple[int, str]] = {}  # of the upstream's place for a call: what tells it from later ones there
        self._refused = False
        self._faithful = True
        self.finished = False

    @property
    def faithful(self) -> bool:
        return self._faithful and self._order.faithful

    def read(self, choice: Json, message: Json) -> Iterator[Said]:
        """`message`: its next piece, or all of it."""
        if self.finished:
            # Some servers repeat an empty piece with what else they have to say.
            self._faithful = self._faithful and not says_more(message, frozenset({"role"}))
            return
        yield from self._message(message, object_of(choice.get("logprobs")))
        if (reason := choice.get("finish_reason")) is not None:
            yield from self._finish(text_of(reason), choice)

    def piece(self, thinking: str | None, text: str | None) -> list[Said]:
        """`read` of a message with nothing else, and not the last one."""
        said: list[Said] = []
        if thinking:
            said += self._order.text(ThinkingDelta(self._index, thinking))
        if text:
            said += self._order.text(TextDelta(self._index, text))
        return said

    def _message(self, message: Json, logprobs: Json) -> Iterator[Said]:
        if says_more(message, _MESSAGE_FIELDS) or logprobs.get("refusal"):
            self._faithful = False
        if thinking := text_of(message.get("reasoning_content")) or text_of(message.get("reasoning")):
            yield from self._order.text(ThinkingDelta(self._index, thinking))
        content = message.get("content")
        if isinstance(content, list):
            yield from self._parts(content)
        text = text_of(content)
        tokens, faithful = read_logprobs(logprobs.get("content"))
        self._faithful = self._faithful and faithful
        if text or tokens:
            yield from self._order.text(TextDelta(self._index, text, tokens))
        if refusal := text_of(message.get("refusal")):
            self._refused = True
            yield from self._order.text(TextDelta(self._index, refusal))
        for place, call in enumerate(objects_of(message.get("tool_calls"))):
            yield from self._call(call, place)

    def _parts(self, parts: list[object]) -> Iterator[Said]:
        """Content as a list, as Mistral's reasoning models write it."""
        for part in objects_of(parts):
            if part.get("type") == "text":
                yield from self._order.text(TextDelta(self._index, text_of(part.get("text"))))
            elif part.get("type") == "thinking":
                pieces = part.get("thinking")
                texts = [pieces] if isinstance(pieces, str) else [piece.get("text") for piece in objects_of(pieces)]
                for text in texts:
                    yield from self._order.text(ThinkingDelta(self._index, text_of(text)))
            else:
                self._faithful = False

    def _call(self, call: Json, position: int) -> Iterator[Said]:
        function = object_of(call.get("function"))
        if says_more(call, _CALL_FIELDS) or call.get("type") not in (None, "", "function"):
            self._faithful = False
        given = call.get("index")
        place = given if isinstance(given, int) else position
        call_id, name = text_of(call.get("id")), text_of(function.get("name"))
        number, known_id = self._keys.get(place, (0, call_id))
        if call_id and known_id and call_id != known_id and name:
            number, known_id = number + 1, ""  # another call in the same place: this server does not count them
        self._keys[place] = (number, known_id or call_id)
        yield from self._order.call((place, number), text_of(function.get("arguments")), call_id=call_id, name=name)

    def _finish(self, word: str, choice: Json) -> Iterator[Said]:
        if word in _BROKEN:
            raise UpstreamFailed(f"The upstream gave its answer up: {word}.", 502, code="upstream_error", elsewhere=True)
        yield from self._order.finish()
        reason = _REASONS.get(word)
        if reason is None:
            self._faithful = False
            reason = "end_turn"
        stop = choice.get("stop_reason") or choice.get("matched_stop")  # vLLM's word, and SGLang's
        if reason == "end_turn":
            # A demanded call ends in "stop", too; deltas have no word for a refusal in text apart from the reason.
            reason = "refusal" if self._refused else "tool_use" if self._order.num_calls else reason
            if isinstance(stop, str) and reason == "end_turn":
                reason = "stop_sequence"
        self._faithful = self._faithful and not self._refused
        self.finished = True
        yield Finish(self._index, reason, stop if reason == "stop_sequence" and isinstance(stop, str) else None)


class _PieceDelta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: None = None


class _PieceChoice(msgspec.Struct, frozen=True):
    delta: _PieceDelta
    index: int = 0
    logprobs: None = None
    finish_reason: None = None


class _Piece(msgspec.Struct, frozen=True):
    """A chunk with a piece of one choice's text and nothing more: nearly every one. Any other does not have this shape."""

    choices: tuple[_PieceChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: dict[str, Any] | None = None
    error: None = None
    moderation: None = None
    x_groq: None = None


_decode_piece = msgspec.json.Decoder(_Piece).decode


class ChatReader(EventReader):
    dialect = "openai_chat"

    def __init__(self, body: Json) -> None:
        super().__init__()
        self._model = text_of(body.get("model"))
        self._hide_usage = isinstance(body, Body) and body.hide_usage
        self._begun = False
        self._usage: object = None
        self._choices: dict[int, ChatChoice] = {}

    def read(self, event: Event, data: bytes) -> list[Said]:
        try:
            piece = _decode_piece(data)
        except UNREADABLE:
            return list(self._read(data))
        (choice,) = piece.choices
        known = self._choices.get(choice.index)
        if known is None or known.finished:
            return list(self._read(data))
        self._usage = piece.usage or self._usage
        return known.piece(choice.delta.reasoning_content, choice.delta.content)

    def _read(self, data: bytes) -> Iterator[Said]:
        if data.strip() == b"[DONE]":
            yield from self._end()
            return
        chunk = json_object(data)
        if (error := error_in(chunk)) is not None:
            raise stream_failure(error, self.dialect, data)
        choices = objects_of(chunk.get("choices"))
        usage = chunk.get("usage") or object_of(chunk.get("x_groq")).get("usage")
        if usage:
            self._usage = usage
            self.hidden = self._hide_usage and not choices
        if chunk.get("moderation"):
            self.faithful = False
        if not self._begun and (choices or usage):
            self._begun = True
            yield Begin(text_of(chunk.get("model")) or self._model, Usage(), answer_id=text_of(chunk.get("id")))
        for choice in choices:
            index = choice.get("index") or 0
            if not isinstance(index, int):
                raise malformed(f"choice {index!r}")
            yield from self.read_choice(index, choice)

    def read_choice(self, index: int, choice: Json) -> Iterator[Said]:
        yield from self.choice(index).read(choice, object_of(choice.get("delta")))

    def choice(self, index: int) -> ChatChoice:
        found = self._choices.get(index)
        if found is None:
            found = self._choices[index] = ChatChoice(index)
        return found

    def _end(self) -> Iterator[Said]:
        check_choices(self._choices)
        faithful = self.faithful and all(choice.faithful for choice in self._choices.values())
        yield End(read_usage(self._usage), faithful=faithful)
        self.ended = True


def check_choices(choices: dict[int, ChatChoice]) -> None:
    if not choices or sorted(choices) != list(range(len(choices))):
        raise malformed(f"it has the choices {sorted(choices)}")
    if unfinished := [index for index, choice in choices.items() if not choice.finished]:
        raise BackendFailed(f"The upstream ended its answer without a reason (choice {unfinished[0]}).")


def read_completion(data: bytes) -> list[Delta]:
    body = whole_answer(data, ChatReader.dialect)
    choices: dict[int, ChatChoice] = {}
    said: list[Said] = []
    for index, choice in enumerate(objects_of(body.get("choices"))):
        choices[index] = ChatChoice(index)
        said += choices[index].read(choice, object_of(choice.get("message")))
    check_choices(choices)
    usage = read_usage(body.get("usage"))
    faithful = all(choice.faithful for choice in choices.values()) and not body.get("moderation")
    return [
        Raw(ChatReader.dialect, data),
        Begin(text_of(body.get("model")), before_answer(usage), answer_id=text_of(body.get("id"))),
        *said,
        End(usage, faithful=faithful),
    ]


def whole_answer(data: bytes, dialect: str) -> Json:
    body = json_object(data)
    if (error := error_in(body)) is not None:
        raise stream_failure(error, dialect, data)
    return body
