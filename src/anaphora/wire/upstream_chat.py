"""OpenAI's Chat Completions as an upstream, and whatever else speaks it: how a `Request` is written for it.

Earlier thinking goes along as `reasoning_content` where the upstream is known to take it (`extensions`, or the client's own
dialect).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from anaphora.types import (
    Delta,
    MediaPart,
    Message,
    Part,
    ProviderPart,
    Request,
    TextPart,
    ThinkingPart,
    ToolResultPart,
    ToolUsePart,
)
from anaphora.wire.fields import Json
from anaphora.wire.upstream import Body, Reader, UpstreamError, cannot_say, is_own, json_object, object_of, renamed
from anaphora.wire.upstream_chat_answer import ChatReader, read_completion
from anaphora.wire.upstream_openai import (
    file_fields,
    from_openai,
    function,
    image_source,
    own_words,
    read_error,
    result_content,
    sampling_fields,
    tool_choice,
)

_SAMPLING = frozenset({"temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "stop"})


class UpstreamChat:
    """`limit`: the field for `max_tokens`. OpenAI's reasoning models know the newer one alone, some other servers the older."""

    name = "openai_chat"
    path = "/v1/chat/completions"

    def __init__(
        self, *, limit: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens", extensions: bool = False
    ) -> None:
        self._limit = limit
        self._extensions = extensions

    def write(self, request: Request, *, model: str) -> Json:
        own = is_own(request, self.name)
        writer = _Messages(own=own, extensions=own or self._extensions, ids=from_openai(request))
        if request.prompts:
            raise cannot_say("prompt", "this upstream takes messages, no raw prompts")
        body = Body({"model": model, "messages": writer.conversation(request.messages)})
        if request.tools:
            body["tools"] = [
                {"type": "function", "function": function(tool, f"tools[{index}]", own=own)}
                for index, tool in enumerate(request.tools)
            ]
        body |= tool_choice(request.tool_choice, {"function": {"name": request.tool_choice.name}})
        body |= self._limits(request, extensions=writer.extensions)
        body |= request.extra if own else own_words(request.extra, summaries=False)
        if request.stream:
            body["stream"] = True
            ask_usage(body, own_body(request, self.name))
        return body

    def _limits(self, request: Request, *, extensions: bool) -> Json:
        sampling = request.sampling
        fields = sampling_fields(sampling, native=_SAMPLING, extensions=extensions)
        if request.max_tokens is not None:
            if not request.max_tokens and not extensions:
                raise cannot_say("max_tokens", "this upstream cannot fill its cache without an answer")
            fields[self._limit] = request.max_tokens
        if sampling.n > 1:
            fields["n"] = sampling.n
        if sampling.logprobs is not None:
            fields["logprobs"] = True
            if sampling.logprobs:
                fields["top_logprobs"] = sampling.logprobs
        if request.cache_salt is not None:
            if not extensions:
                raise cannot_say("cache_salt", "this upstream cannot keep prompts of one key apart")
            fields["cache_salt"] = request.cache_salt
        return fields

    def passed(self, native: bytes, *, model: str) -> Json:
        body = renamed(native, model)
        if body.get("stream") is True:
            ask_usage(body, body)
        return body

    def reader(self, body: Json) -> Reader:
        return ChatReader(body)

    def read_whole(self, data: bytes) -> list[Delta]:
        return read_completion(data)

    def read_error(self, status: int, data: bytes) -> UpstreamError:
        return read_error(status, data)


def ask_usage(body: Body, own: Json | None) -> None:
    """Ask for usage at the end of a stream. A client that spoke this dialect itself, in the body `own`, sees it if it asked."""
    options = object_of(own.get("stream_options")) if own is not None else {}
    body.hide_usage = own is not None and options.get("include_usage") is not True
    body["stream_options"] = {**options, "include_usage": True}


def own_body(request: Request, dialect: str) -> Json | None:
    native = request.native
    return json_object(native.body) if native is not None and native.dialect == dialect else None


class _Messages:
    def __init__(self, *, own: bool, extensions: bool, ids: bool) -> None:
        self.own = own
        self.extensions = extensions
        self.ids = ids

    def conversation(self, messages: tuple[Message, ...]) -> list[Json]:
        if messages and messages[-1].role == "assistant" and not self.own:
            raise cannot_say(f"messages[{len(messages) - 1}]", "this upstream does not go on with an answer that has begun")
        written: list[Json] = []
        for index, message in enumerate(messages):
            path = f"messages[{index}]"
            named: Json = {} if message.name is None else {"name": message.name}
            if message.role == "assistant":
                written += [{**fields, **named} for fields in self._answers(message.content, path)]
            else:
                written += self._asked(message, named, path)
        return written

    def _asked(self, message: Message, named: Json, path: str) -> Iterator[Json]:
        """A system's or user's message; results of tools are messages of their own, in their place."""
        content: list[object] = []
        for number, part in enumerate(message.content):
            if not isinstance(part, ToolResultPart):
                content.append(self._part(part, f"{path}.content[{number}]"))
                continue
            if content:
                yield {"role": message.role, "content": _content(content), **named}
                content = []
            result = [
                self._text(inner, f"{path}.content[{number}].content[{place}]")
                for place, inner in enumerate(result_content(part))
            ]
            yield {"role": "tool", "tool_call_id": part.tool_use_id, "content": _content(result)}
        if content or not message.content:
            yield {"role": message.role, "content": _content(content), **named}

    def _answers(self, parts: tuple[Part, ...], path: str) -> Iterator[Json]:
        """A message of this dialect has its thinking before its text before its calls: another order takes several."""
        rank = -1
        fields: Json = {}
        texts: list[object] = []
        calls: list[object] = []
        placed = [(_rank(part), part, f"{path}.content[{number}]") for number, part in enumerate(parts)]
        kept = [entry for entry in placed if not isinstance(entry[1], ThinkingPart) or (self.extensions and entry[1].text)]
        for index, (part_rank, part, place) in enumerate(kept):
            if index and (part_rank < rank or part_rank == 0):
                yield _answer(fields, texts, calls)
                fields, texts, calls = {}, [], []
            rank = part_rank
            if isinstance(part, ThinkingPart):
                fields = {"reasoning_content": part.text}
            elif isinstance(part, ToolUsePart):
                call = {"name": part.name, "arguments": part.arguments}
                calls.append({"id": part.id, "type": "function", "function": call})
            else:
                texts.append(self._text(part, place))
        if kept or not parts:
            yield _answer(fields, texts, calls)

    def _text(self, part: Part, path: str) -> Json:
        if not isinstance(part, TextPart):
            raise cannot_say(path, "this upstream takes nothing but text here")
        return {"type": "text", "text": part.text}

    def _part(self, part: Part, path: str) -> Json:
        if not isinstance(part, MediaPart):
            if isinstance(part, ProviderPart):
                raise cannot_say(path, f"a block of the kind '{part.kind}' exists only at Anthropic's API")
            return self._text(part, path)
        if part.kind == "audio":
            audio = {"data": part.source["base64"], "format": part.media_type.removeprefix("audio/")}
            return {"type": "input_audio", "input_audio": audio}
        if part.kind == "document":
            file = file_fields(part, path, own=self.own, ids=self.ids)
            if "file_url" in file and not self.extensions:
                raise cannot_say(path, "this upstream takes no address of a document, only its bytes")
            return {"type": "file", "file": file}
        source = image_source(part, path, ids=self.ids)
        if "file_id" in source:
            raise cannot_say(path, "this upstream takes no ids of image files")
        for option in part.options:
            if option != "detail":
                raise cannot_say(f"{path}.{option}", "this upstream does not have it")
        return {"type": "image_url", "image_url": {**source, **part.options}}


def _rank(part: Part) -> int:
    return 0 if isinstance(part, ThinkingPart) else 2 if isinstance(part, ToolUsePart) else 1


def _answer(fields: Json, texts: Sequence[object], calls: Sequence[object]) -> Json:
    content = None if calls and not texts else _content(texts)
    return {"role": "assistant", "content": content, **fields, **({"tool_calls": calls} if calls else {})}


def _content(parts: Sequence[object]) -> object:
    """A string, as every server reads it, where there is no more than one text."""
    if not parts:
        return ""
    only = object_of(parts[0])
    return only["text"] if len(parts) == 1 and only.get("type") == "text" else list(parts)
