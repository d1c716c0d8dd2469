"""How answers of OpenAI's Responses are read.

Reasoning that is only summarised or sealed makes an answer unfaithful: a replay could not give the same items back.
"""

from __future__ import annotations

from collections.abc import Iterator

from anaphora.errors import BackendFailed
from anaphora.types import (
    Begin,
    Delta,
    End,
    Finish,
    FinishReason,
    Raw,
    Said,
    TextDelta,
    ThinkingDelta,
    TokenLogprob,
    Usage,
)
from anaphora.wire.fields import Json
from anaphora.wire.sse import Event
from anaphora.wire.upstream import (
    EventReader,
    UpstreamError,
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

_DIALECT = "openai_responses"

_INCOMPLETE: dict[str, FinishReason] = {"max_output_tokens": "max_tokens", "content_filter": "refusal"}
_ITEM_FIELDS = {
    "message": frozenset({"type", "id", "status", "role", "content"}),
    "function_call": frozenset({"type", "id", "status", "call_id", "name", "arguments", "caller"}),
    "reasoning": frozenset({"type", "id", "status", "content", "summary", "encrypted_content"}),
}
_TEXT_FIELDS = frozenset({"type", "text", "logprobs"})
_SILENT = frozenset(
    {
        "response.in_progress",
        "response.queued",
        "response.content_part.added",
        "response.content_part.done",  # as the item's end says again
        "response.output_text.done",
        "response.refusal.done",
        "response.reasoning_text.done",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_part.done",
        "response.reasoning_summary_text.done",
        "response.function_call_arguments.done",
        "response.output_text.annotation.added",
        "keepalive",
    }
)
_SUMMARY_GAP = "\n\n"


class _Output:
    """The items of an answer, in their order."""

    def __init__(self) -> None:
        self.order = ChoiceOrder(0)
        self.refused = False
        self._faithful = True
        self._last = ""  # kind of the newest part of text or thinking, until something else comes between

    @property
    def faithful(self) -> bool:
        return self._faithful and self.order.faithful

    def unfaithful(self) -> None:
        self._faithful = False

    def text(self, text: str, logprobs: object = None) -> Iterator[Said]:
        tokens: tuple[TokenLogprob, ...] = ()
        if logprobs:
            tokens, faithful = read_logprobs(logprobs)
            self._faithful = self._faithful and faithful
        if text or tokens:
            yield from self.order.text(TextDelta(0, text, tokens))

    def refusal(self, text: str) -> Iterator[Said]:
        self.refused, self._faithful = True, False
        yield from self.text(text)

    def thinking(self, text: str, signature: str = "") -> Iterator[Said]:
        if text or signature:
            yield from self.order.text(ThinkingDelta(0, text, signature))

    def part_begins(self, kind: str) -> None:
        if kind == self._last:
            self._faithful = False  # deltas would make one of the two
        self._last = kind

    def item(self, item: Json, key: str, said: frozenset[str]) -> Iterator[Said]:
        """A whole item; of what is in `said` its deltas were there already."""
        kind = text_of(item.get("type"))
        if kind not in _ITEM_FIELDS or says_more(item, _ITEM_FIELDS[kind]):
            self._faithful = False
        if kind == "message":
            yield from self._message(item, said)
        elif kind == "reasoning":
            yield from self._reasoning(item, said)
        elif kind == "function_call":
            self._last = ""
            if object_of(item.get("caller")).get("type", "direct") != "direct":
                self._faithful = False
            arguments = "" if "arguments" in said else text_of(item.get("arguments"))
            call_id, name = text_of(item.get("call_id")), text_of(item.get("name"))
            yield from self.order.call(key, arguments, call_id=call_id, name=name)
            yield from self.order.close(key)

    def _message(self, item: Json, said: frozenset[str]) -> Iterator[Said]:
        for part in objects_of(item.get("content")):
            if part.get("type") == "output_text":
                self.part_begins("text")
                if says_more(part, _TEXT_FIELDS):
                    self._faithful = False
                if "text" not in said:
                    yield from self.text(text_of(part.get("text")), part.get("logprobs"))
            elif part.get("type") == "refusal":
                if "refusal" not in said:
                    yield from self.refusal(text_of(part.get("refusal")))
            else:
                self._faithful = False

    def _reasoning(self, item: Json, said: frozenset[str]) -> Iterator[Said]:
        self.part_begins("thinking")
        content, summary = objects_of(item.get("content")), objects_of(item.get("summary"))
        signature = text_of(item.get("encrypted_content"))
        if summary or (signature and not content):
            self._faithful = False
        if "thinking" not in said:
            pieces = [text_of(part.get("text")) for part in content or summary]
            yield from self.thinking(("" if content else _SUMMARY_GAP).join(pieces))
        if signature:
            yield from self.thinking("", signature)
            self._last = ""

    def finish(self, response: Json) -> Iterator[Said]:
        yield from self.order.finish()
        reason: FinishReason = "tool_use" if self.order.num_calls else "end_turn"
        if response.get("status") == "incomplete":
            word = text_of(object_of(response.get("incomplete_details")).get("reason"))
            if word not in _INCOMPLETE:
                self._faithful = False
            reason = _INCOMPLETE.get(word, reason)
        elif self.refused:
            reason = "refusal"
        yield Finish(0, reason)


class ResponseReader(EventReader):
    dialect = _DIALECT

    def __init__(self) -> None:
        super().__init__()
        self._output = _Output()
        self._begun = False
        self._said: dict[str, set[str]] = {}  # of which item deltas were there, by its place
        self._any_done = False  # an item's end was told
        self._summary: object = None  # place of the summary's part that is being written

    def read(self, event: Event, data: bytes) -> list[Said]:
        return list(self._read(event, data))

    def _read(self, event: Event, data: bytes) -> Iterator[Said]:
        if data.strip() == b"[DONE]":
            return
        fields = json_object(data)
        kind = text_of(fields.get("type")) or event.name
        if kind == "error" or (not kind and fields.get("error")):
            raise stream_failure(_stream_error(fields), _DIALECT, b"")
        response = object_of(fields.get("response"))
        if kind in ("response.failed", "response.cancelled"):
            raise stream_failure(_response_error(response), _DIALECT, b"")
        if not self._begun:
            if not kind.startswith("response."):
                raise malformed(f"{kind!r} at its beginning")
            self._begun = True
            yield Begin(text_of(response.get("model")), Usage(), answer_id=text_of(response.get("id")))
        place = str(fields.get("output_index"))
        if kind in ("response.completed", "response.incomplete"):
            yield from self._end(response)
        elif kind == "response.output_item.added":
            yield from self._added(object_of(fields.get("item")), place)
        elif kind == "response.output_item.done":
            self._any_done = True
            said = frozenset(self._said.get(place, ()))
            yield from self._output.item(object_of(fields.get("item")), place, said)
        elif kind in _DELTAS:
            yield from self._delta(_DELTAS[kind], fields, place)
        elif kind != "response.created" and kind not in _SILENT:
            self._output.unfaithful()

    def _added(self, item: Json, place: str) -> Iterator[Said]:
        if item.get("type") == "function_call":
            call_id, name = text_of(item.get("call_id")), text_of(item.get("name"))
            yield from self._output.order.call(place, call_id=call_id, name=name)

    def _delta(self, kind: str, fields: Json, place: str) -> Iterator[Said]:
        said = self._said.setdefault(place, set())
        text = text_of(fields.get("delta"))
        if kind == "arguments":
            yield from self._output.order.call(place, text)
        elif kind == "text":
            yield from self._output.text(text, fields.get("logprobs"))
        elif kind == "refusal":
            yield from self._output.refusal(text)
        elif kind == "thinking":
            yield from self._output.thinking(text)
        else:
            part, kind = (place, fields.get("summary_index")), "thinking"
            gap = _SUMMARY_GAP if "thinking" in said and part != self._summary else ""
            self._summary = part
            yield from self._output.thinking(gap + text)
        said.add(kind)

    def _end(self, response: Json) -> Iterator[Said]:
        if not self._said and not self._any_done:  # this server streams nothing but the whole
            for place, item in enumerate(objects_of(response.get("output"))):
                yield from self._output.item(item, str(place), frozenset())
        yield from self._output.finish(response)
        yield End(read_usage(response.get("usage")), faithful=self._output.faithful)
        self.ended = True


_DELTAS = {
    "response.output_text.delta": "text",
    "response.refusal.delta": "refusal",
    "response.reasoning_text.delta": "thinking",
    "response.reasoning_summary_text.delta": "summary",
    "response.function_call_arguments.delta": "arguments",
}


def read_response(data: bytes) -> list[Delta]:
    response = json_object(data)
    if response.get("status") in ("failed", "cancelled") or response.get("error"):
        raise stream_failure(_response_error(response), _DIALECT, b"")
    if response.get("status") in ("queued", "in_progress") or not isinstance(response.get("output"), list):
        raise BackendFailed("The upstream answered with a response that is not finished.")
    output = _Output()
    said: list[Said] = []
    for place, item in enumerate(objects_of(response.get("output"))):
        said += output.item(item, str(place), frozenset())
    said += output.finish(response)
    usage = read_usage(response.get("usage"))
    begin = Begin(text_of(response.get("model")), before_answer(usage), answer_id=text_of(response.get("id")))
    return [Raw(_DIALECT, data), begin, *said, End(usage, faithful=output.faithful)]


def _stream_error(fields: Json) -> UpstreamError:
    """An `error` event has its fields at its top; other servers nest them."""
    nested: Json = fields if object_of(fields.get("error")) else {"error": {**fields, "type": ""}}
    return error_in(nested) or UpstreamError(500, "The upstream's answer failed.")


def _response_error(response: Json) -> UpstreamError:
    return error_in(response) or UpstreamError(500, f"The upstream's answer {response.get('status') or 'failed'}.")
