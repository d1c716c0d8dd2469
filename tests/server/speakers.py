"""One way to ask in every dialect, with the official SDKs: the same conversation, the same wishes, the same kind of answer."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal, Protocol

import anthropic
import msgspec
import openai

from anaphora.types import MediaPart, Message, Part, TextPart, ThinkingPart, Tool, ToolChoice, ToolResultPart, ToolUsePart

Reason = Literal["end", "limit", "calls", "refusal"]


class Wishes(msgspec.Struct, frozen=True):
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice()
    max_tokens: int = 100
    temperature: float | None = None
    stop: tuple[str, ...] = ()
    schema: dict[str, Any] | None = None
    headers: dict[str, str] = {}


NO_WISHES = Wishes()


class Failed(Exception):
    """A stream ended with a failure that its SDK does not raise."""


class Said(msgspec.Struct):
    """An answer, as an SDK read it."""

    text: str
    reason: Reason
    calls: list[tuple[str, Any]] = []
    """Name and arguments of each."""
    prompt: int = 0
    """All of the prompt's tokens."""
    read: int = 0
    written: int = 0
    output: int = 0
    model: str = ""


Spoken = Generator[str | Said, None, None]


class Speaker(Protocol):
    dialect: str

    def ask(self, model: str, talk: Sequence[Message], wishes: Wishes = NO_WISHES) -> Said: ...

    def stream(self, model: str, talk: Sequence[Message], wishes: Wishes = NO_WISHES) -> Spoken:
        """Its text as it comes, then the whole. Closing it closes the connection."""
        ...


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", (TextPart(text),)),)


def heard(pieces: Spoken) -> tuple[list[str], Said]:
    *texts, said = pieces
    assert isinstance(said, Said)
    return [text for text in texts if isinstance(text, str)], said


def _data_url(part: MediaPart) -> str:
    return part.source.get("url") or f"data:{part.media_type};base64,{part.source['base64']}"


class Messages:
    dialect = "anthropic"

    def __init__(self, client: anthropic.Anthropic) -> None:
        self._client = client

    def ask(self, model: str, talk: Sequence[Message], wishes: Wishes = NO_WISHES) -> Said:
        return self._said(self._client.messages.create(**self._fields(model, talk, wishes)))

    def stream(self, model: str, talk: Sequence[Message], wishes: Wishes = NO_WISHES) -> Spoken:
        with self._client.messages.stream(**self._fields(model, talk, wishes)) as stream:
            yield from stream.text_stream
            yield self._said(stream.get_final_message())

    def _fields(self, model: str, talk: Sequence[Message], wishes: Wishes) -> dict[str, Any]:
        fields: dict[str, Any] = {"model": model, "max_tokens": wishes.max_tokens, "extra_headers": wishes.headers}
        if talk[0].role == "system":
            fields["system"] = [self._block(part) for part in talk[0].content]
            talk = talk[1:]
        fields["messages"] = [{"role": turn.role, "content": [self._block(part) for part in turn.content]} for turn in talk]
        if wishes.tools:
            fields["tools"] = [
                {"name": tool.name, "description": tool.description, "input_schema": tool.parameters} for tool in wishes.tools
            ]
        if wishes.choice.mode != "auto":
            named = {"name": wishes.choice.name} if wishes.choice.name else {}
            fields["tool_choice"] = {"type": wishes.choice.mode, **named}
        if wishes.temperature is not None:
            fields["extra_body"] = {"temperature": wishes.temperature}
            fields["extra_headers"] = {**wishes.headers, "anthropic-version": "2023-06-01"}  # the latest has it no more
        if wishes.stop:
            fields["stop_sequences"] = list(wishes.stop)
        if wishes.schema is not None:
            fields["output_config"] = {"format": {"type": "json_schema", "schema": wishes.schema}}
        return fields

    def _block(self, part: Part) -> Any:
        match part:
            case TextPart(text):
                return {"type": "text", "text": text}
            case ThinkingPart(text, signature):
                return {"type": "thinking", "thinking": text, "signature": signature}
            case ToolUsePart(id, name, arguments):
                return {"type": "tool_use", "id": id, "name": name, "input": json.loads(arguments)}
            case ToolResultPart(id, content, is_error):
                blocks = [self._block(inner) for inner in content]
                return {"type": "tool_result", "tool_use_id": id, "content": blocks, "is_error": is_error}
            case MediaPart(kind, media_type, {"base64": data}):
                return {"type": kind, "source": {"type": "base64", "media_type": media_type, "data": data}}
            case MediaPart(kind, _, {"url": url}):
                return {"type": kind, "source": {"type": "url", "url": url}}
        raise AssertionError(part)

    def _said(self, answer: anthropic.types.Message) -> Said:
        usage = answer.usage
        read, written = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
        reasons: dict[str | None, Reason] = {"max_tokens": "limit", "tool_use": "calls", "refusal": "refusal"}
        return Said(
            "".join(block.text for block in answer.content if block.type == "text"),
            reasons.get(answer.stop_reason, "end"),
            [(block.name, block.input) for block in answer.content if block.type == "tool_use"],
            usage.input_tokens + read + written,
            read,
            written,
            usage.output_tokens,
            answer.model,
        )


class Chat:
    dialect = "openai_chat"

    def __init__(self, client: openai.OpenAI) -> None:
        self._client = client

    def ask(self, model: str, talk: Sequence[Message], wishes: Wishes = NO_WISHES) -> Said:
        answer = self._client.chat.completions.create(**self._fields(model, talk, wishes))
        choice = answer.choices[0]
        calls = [
            (call.function.name, call.function.arguments) for call in choice.message.tool_calls or [] if call.type == "function"
        ]
        return self._said(choice.message.content or "", choice.finish_reason, calls, answer.usage, answer.model)

    def stream(self, model: str, talk: Sequence[Message], wishes: Wishes = NO_WISHES) -> Spoken:
        options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        texts: list[str] = []
        calls: dict[int, tuple[str, str]] = {}
        reason, usage, name = "", None, ""
        with self._client.chat.completions.create(**self._fields(model, talk, wishes), **options) as stream:
            for chunk in stream:
                usage, name = chunk.usage or usage, chunk.model
                for choice in chunk.choices:
                    reason = choice.finish_reason or reason
                    if choice.delta.content:
                        texts.append(choice.delta.content)
                        yield choice.delta.content
                    for call in choice.delta.tool_calls or []:
                        called, arguments = calls.get(call.index, ("", ""))
                        piece = call.function
                        assert piece is not None
                        calls[call.index] = (called + (piece.name or ""), arguments + (piece.arguments or ""))
        yield self._said("".join(texts), reason, list(calls.values()), usage, name)

    def _fields(self, model: str, talk: Sequence[Message], wishes: Wishes) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "model": model,
            "max_completion_tokens": wishes.max_tokens,
            "messages": [message for turn in talk for message in self._messages(turn)],
            "extra_headers": wishes.headers,
        }
        if wishes.tools:
            fields["tools"] = [{"type": "function", "function": self._function(tool)} for tool in wishes.tools]
        if wishes.choice.mode == "tool":
            fields["tool_choice"] = {"type": "function", "function": {"name": wishes.choice.name}}
        if wishes.temperature is not None:
            fields["temperature"] = wishes.temperature
        if wishes.stop:
            fields["stop"] = list(wishes.stop)
        if wishes.schema is not None:
            schema = {"name": "answer", "strict": True, "schema": wishes.schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields

    def _function(self, tool: Tool) -> Any:
        return {"name": tool.name, "description": tool.description, "parameters": tool.parameters}

    def _messages(self, turn: Message) -> Iterator[Any]:
        calls = [
            {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}
            for part in turn.content
            if isinstance(part, ToolUsePart)
        ]
        for part in turn.content:
            if isinstance(part, ToolResultPart):
                texts = [inner.text for inner in part.content if isinstance(inner, TextPart)]
                yield {"role": "tool", "tool_call_id": part.tool_use_id, "content": "".join(texts)}
        rest = [self._part(part) for part in turn.content if not isinstance(part, ToolUsePart | ToolResultPart | ThinkingPart)]
        if rest or calls:
            yield {"role": turn.role, "content": rest or None, **({"tool_calls": calls} if calls else {})}

    def _part(self, part: Part) -> Any:
        match part:
            case TextPart(text):
                return {"type": "text", "text": text}
            case MediaPart("image"):
                return {"type": "image_url", "image_url": {"url": _data_url(part)}}
            case MediaPart("document"):
                return {"type": "file", "file": {"file_data": _data_url(part), "filename": "document.pdf"}}
        raise AssertionError(part)

    def _said(self, text: str, reason: str, calls: list[tuple[str, str]], usage: Any, model: str) -> Said:
        reasons: dict[str, Reason] = {"length": "limit", "tool_calls": "calls", "content_filter": "refusal"}
        details = usage.prompt_tokens_details
        return Said(
            text,
            reasons.get(reason, "end"),
            [(name, json.loads(arguments)) for name, arguments in calls],
            usage.prompt_tokens,
            0 if details is None else details.cached_tokens or 0,
            0 if details is None else getattr(details, "cache_write_tokens", None) or 0,
            usage.completion_tokens,
            model,
        )


class Responses:
    dialect = "openai_responses"

    def __init__(self, client: openai.OpenAI) -> None:
        self._client = client

    def ask(self, model: str, talk: Sequence[Message], wishes: Wishes = NO_WISHES) -> Said:
        return self._said(self._client.responses.create(**self._fields(model, talk, wishes)))

    def stream(self, model: str, talk: Sequence[Message], wishes: Wishes = NO_WISHES) -> Spoken:
        with self._client.responses.create(**self._fields(model, talk, wishes), stream=True) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    yield event.delta
                elif event.type in ("response.completed", "response.incomplete"):
                    yield self._said(event.response)
                elif event.type == "response.failed":
                    assert event.response.error is not None
                    raise Failed(event.response.error.message)

    def _fields(self, model: str, talk: Sequence[Message], wishes: Wishes) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "model": model,
            "max_output_tokens": wishes.max_tokens,
            "store": False,
            "input": [item for turn in talk for item in self._items(turn)],
            "extra_headers": wishes.headers,
        }
        if wishes.tools:
            fields["tools"] = [
                {"type": "function", "name": tool.name, "description": tool.description, "parameters": tool.parameters}
                for tool in wishes.tools
            ]
        if wishes.choice.mode == "tool":
            fields["tool_choice"] = {"type": "function", "name": wishes.choice.name}
        if wishes.temperature is not None:
            fields["temperature"] = wishes.temperature
        if wishes.schema is not None:
            form = {"type": "json_schema", "name": "answer", "strict": True, "schema": wishes.schema}
            fields["text"] = {"format": form}
        return fields

    def _items(self, turn: Message) -> Iterator[Any]:
        content = [self._part(part, turn.role) for part in turn.content if isinstance(part, TextPart | MediaPart)]
        for part in turn.content:
            if isinstance(part, ToolResultPart):
                texts = [inner.text for inner in part.content if isinstance(inner, TextPart)]
                yield {"type": "function_call_output", "call_id": part.tool_use_id, "output": "".join(texts)}
        if content:
            yield {"role": turn.role, "content": content}
        for part in turn.content:
            if isinstance(part, ToolUsePart):
                yield {"type": "function_call", "call_id": part.id, "name": part.name, "arguments": part.arguments}

    def _part(self, part: TextPart | MediaPart, role: str) -> Any:
        if isinstance(part, TextPart):
            return {"type": "output_text" if role == "assistant" else "input_text", "text": part.text}
        if part.kind == "image":
            return {"type": "input_image", "image_url": _data_url(part), "detail": "auto"}
        return {"type": "input_file", "file_data": _data_url(part), "filename": "document.pdf"}

    def _said(self, answer: openai.types.responses.Response) -> Said:
        usage = answer.usage
        assert usage is not None
        calls = [(item.name, json.loads(item.arguments)) for item in answer.output if item.type == "function_call"]
        details = usage.input_tokens_details
        return Said(
            answer.output_text,
            "limit" if answer.status == "incomplete" else "calls" if calls else "end",
            calls,
            usage.input_tokens,
            details.cached_tokens,
            getattr(details, "cache_write_tokens", None) or 0,
            usage.output_tokens,
            answer.model,
        )
