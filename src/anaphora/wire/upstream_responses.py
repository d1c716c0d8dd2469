"""OpenAI's Responses as an upstream: how a `Request` is written for it.

Earlier thinking goes along where it is signed (`encrypted_content`), or where the client spoke this dialect itself. Nothing is
left with the provider: a translated request asks it to store no answer.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from anaphora.wire.upstream import Reader, UpstreamError, cannot_say, is_own, object_of, renamed
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
from anaphora.wire.upstream_responses_answer import ResponseReader, read_response

_SAMPLING = frozenset({"temperature", "top_p"})
_LOGPROBS = "message.output_text.logprobs"


class UpstreamResponses:
    name = "openai_responses"
    path = "/v1/responses"

    def __init__(self, *, extensions: bool = False) -> None:
        self._extensions = extensions

    def write(self, request: Request, *, model: str) -> Json:
        own = is_own(request, self.name)
        extensions = own or self._extensions
        if request.prompts:
            raise cannot_say("prompt", "this upstream takes messages, no raw prompts")
        body: Json = {"model": model, **_conversation(request, own=own, extensions=extensions)}
        if request.tools:
            body["tools"] = [_tool(function(tool, f"tools[{i}]", own=own)) for i, tool in enumerate(request.tools)]
        body |= tool_choice(request.tool_choice, {"name": request.tool_choice.name})
        body |= _limits(request, extensions=extensions)
        body |= _wishes(request.extra if own else own_words(request.extra, summaries=True))
        if not own:
            body["store"] = False
        if request.stream:
            body["stream"] = True
        return body

    def passed(self, native: bytes, *, model: str) -> Json:
        return renamed(native, model)

    def reader(self, body: Json) -> Reader:
        return ResponseReader()

    def read_whole(self, data: bytes) -> list[Delta]:
        return read_response(data)

    def read_error(self, status: int, data: bytes) -> UpstreamError:
        return read_error(status, data)


def _tool(fields: Json) -> Json:
    """`strict` is off in Chat where nothing is said, but not here."""
    return {"type": "function", "strict": False, **fields}


def _limits(request: Request, *, extensions: bool) -> Json:
    sampling = request.sampling
    if sampling.n > 1:
        raise cannot_say("n", "this upstream gives one answer for a request")
    fields = sampling_fields(sampling, native=_SAMPLING, extensions=extensions)
    if request.max_tokens == 0:
        fields["prompt_cache_options"] = {"prewarm": True}
    elif request.max_tokens is not None:
        fields["max_output_tokens"] = request.max_tokens
    if sampling.logprobs is not None:
        fields["include"] = [_LOGPROBS]
        if sampling.logprobs:
            fields["top_logprobs"] = sampling.logprobs
    if request.cache_salt is not None:
        if not extensions:
            raise cannot_say("cache_salt", "this upstream cannot keep prompts of one key apart")
        fields["cache_salt"] = request.cache_salt
    return fields


def _wishes(words: Json) -> Json:
    """Chat's words, where this dialect nests them."""
    fields = dict(words)
    text, reasoning = dict(object_of(fields.pop("text", None))), dict(object_of(fields.pop("reasoning", None)))
    if form := object_of(fields.pop("response_format", None)):
        text["format"] = {"type": "json_schema", **object_of(form.get("json_schema"))} if "json_schema" in form else form
    if (verbosity := fields.pop("verbosity", None)) is not None:
        text["verbosity"] = verbosity
    if (effort := fields.pop("reasoning_effort", None)) is not None:
        reasoning["effort"] = effort
    if text:
        fields["text"] = text
    if reasoning:
        fields["reasoning"] = reasoning
    return fields


# -- messages ----------------------------------------------------------------------------------------------------------------


def _conversation(request: Request, *, own: bool, extensions: bool) -> Json:
    messages = request.messages
    fields: Json = {}
    if messages and messages[-1].role == "assistant" and not own:
        raise cannot_say(f"messages[{len(messages) - 1}]", "this upstream does not go on with an answer that has begun")
    writer = _Items(own=own, extensions=extensions, ids=from_openai(request))
    items: list[Json] = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if message.name is not None:
            raise cannot_say(f"{path}.name", "this upstream's messages have no names")
        only = message.content[0] if len(message.content) == 1 else None
        if index == 0 and message.role == "system" and isinstance(only, TextPart):
            fields["instructions"] = only.text
        else:
            items += writer.answered(message, path) if message.role == "assistant" else writer.asked(message, path)
    return {**fields, "input": items}


class _Items:
    def __init__(self, *, own: bool, extensions: bool, ids: bool) -> None:
        self.own = own
        self.extensions = extensions
        self.ids = ids

    def asked(self, message: Message, path: str) -> Iterator[Json]:
        """A system's or user's message; results of tools are items of their own, in their place."""
        content: list[Json] = []
        for number, part in enumerate(message.content):
            if not isinstance(part, ToolResultPart):
                content.append(self._part(part, f"{path}.content[{number}]"))
                continue
            if content:
                yield {"role": message.role, "content": content}
                content = []
            result = [
                self._part(inner, f"{path}.content[{number}].content[{place}]")
                for place, inner in enumerate(result_content(part))
            ]
            plain = result[0]["text"] if len(result) == 1 and result[0]["type"] == "input_text" else result or ""
            yield {"type": "function_call_output", "call_id": part.tool_use_id, "output": plain}
        if content or not message.content:
            yield {"role": message.role, "content": content}

    def answered(self, message: Message, path: str) -> Iterator[Json]:
        if not message.content:
            yield {"role": "assistant", "content": ""}
        for number, part in enumerate(message.content):
            if isinstance(part, TextPart):
                yield {"role": "assistant", "content": part.text}
            elif isinstance(part, ToolUsePart):
                yield {"type": "function_call", "call_id": part.id, "name": part.name, "arguments": part.arguments}
            elif isinstance(part, ThinkingPart):
                if part.signature or self.own:
                    yield _reasoning(part)
            else:
                raise cannot_say(f"{path}.content[{number}]", "this upstream takes nothing but text in answers")

    def _part(self, part: Part, path: str) -> Json:
        if isinstance(part, TextPart):
            return {"type": "input_text", "text": part.text}
        if isinstance(part, ProviderPart):
            raise cannot_say(path, f"a block of the kind '{part.kind}' exists only at Anthropic's API")
        if not isinstance(part, MediaPart):
            raise cannot_say(path, "this upstream does not take it here")
        if part.kind == "document":
            return {"type": "input_file", **file_fields(part, path, own=self.own, ids=self.ids)}
        if part.kind == "audio":
            if not self.extensions:
                raise cannot_say(path, "this upstream takes no audio")
            audio = {"data": part.source["base64"], "format": part.media_type.removeprefix("audio/")}
            return {"type": "input_audio", "input_audio": audio}
        for option in part.options:
            if option != "detail":
                raise cannot_say(f"{path}.{option}", "this upstream does not have it")
        source = image_source(part, path, ids=self.ids)
        where = {"file_id": source["file_id"]} if "file_id" in source else {"image_url": source["url"]}
        return {"type": "input_image", **where, "detail": part.options.get("detail", "auto")}


def _reasoning(part: ThinkingPart) -> Json:
    """What was hidden comes back as its summary and the sealed rest; what was shown, as it was."""
    if not part.signature:
        return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": part.text}]}
    summary = [{"type": "summary_text", "text": part.text}] if part.text else []
    return {"type": "reasoning", "summary": summary, "encrypted_content": part.signature}
