"""OpenAI's Completions: `POST /v1/completions`, raw text (or token ids) in, raw text out.

`max_tokens` is 16 where the body does not say, as the API defines it. Extensions: `top_k`, `min_p`, `cache_salt`, up to 20
log-probabilities. The answer's text begins with the prompt if `echo` is set: the backend puts it there.
"""

from __future__ import annotations

from functools import partial

from anaphora.errors import ServiceError
from anaphora.types import Choice, Completion, End, Finish, Request, Said, Tenant, TextDelta, TextPart, TokenLogprob
from anaphora.wire import sse
from anaphora.wire.base import (
    NEUTRAL,
    SAMPLING_FIELDS,
    Ids,
    Parsed,
    Rendering,
    cache_salt,
    encode,
    extra_fields,
    read_stop,
)
from anaphora.wire.fields import FieldError, Json, bad_value, named, opt_bool, opt_int, opt_string, unsupported, wrong_type
from anaphora.wire.openai_common import (
    FINISH_REASONS,
    OpenAIDialect,
    chat_usage,
    check_neutral,
    error_object,
    openai_sampling,
    read_n,
    read_stream,
)
from anaphora.wire.openai_prompt import read_completion

DEFAULT_MAX_TOKENS = 16

Prompt = str | tuple[int, ...]

_KNOWN = (
    NEUTRAL
    | SAMPLING_FIELDS
    | {"model", "prompt", "max_tokens", "n", "best_of", "stop", "logprobs", "echo", "suffix", "cache_salt"}
)


class OpenAICompletions(OpenAIDialect):
    name = "openai_completions"
    answer_prefix = "cmpl-"

    def _read(self, body: Json, tenant: Tenant) -> Parsed:
        model = named(body, "model")
        prompts = _prompts(body)
        n = read_n(body)
        if opt_int(body, "best_of", 1) not in (None, n):
            raise unsupported("'best_of' is only supported where it equals 'n'.", "best_of")
        if opt_string(body, "suffix"):
            raise unsupported("'suffix' is not supported.", "suffix")
        stream, include_usage = read_stream(body)
        check_neutral(body)
        logprobs, max_tokens = opt_int(body, "logprobs", 0, 20), opt_int(body, "max_tokens", 0)
        request = Request(
            model=model,
            tenant=tenant,
            prompts=prompts,
            echo=opt_bool(body, "echo", False),
            sampling=openai_sampling(body, stop=read_stop(body, "stop"), n=n, logprobs=logprobs),
            max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
            stream=stream,
            cache_salt=cache_salt(body),
            extra=extra_fields(body, _KNOWN),
        )
        num_choices = len(prompts) * n
        rendering = Rendering(model, stream, include_usage, num_choices, logprobs=logprobs is not None)
        return Parsed(request, rendering, partial(read_completion, body))

    def render(self, completion: Completion, rendering: Rendering, ids: Ids) -> bytes:
        return encode(
            {
                "id": f"cmpl-{ids.id}",
                "object": "text_completion",
                "created": ids.created_s,
                "model": rendering.model,
                "choices": [_choice(i, choice, rendering) for i, choice in enumerate(completion.choices)],
                "usage": chat_usage(completion.usage, rendering),
            }
        )

    def writer(self, rendering: Rendering, ids: Ids) -> _Writer:
        return _Writer(rendering, ids)


def _prompts(body: Json) -> tuple[Prompt, ...]:
    """The four forms of `prompt`: a text, texts, token ids, lists of token ids."""
    value = body.get("prompt")
    if value is None:
        raise FieldError("missing", "prompt")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise wrong_type("string", value, "prompt")
    if not value:
        raise bad_value("Invalid 'prompt': empty array. Expected an array with minimum length 1.", "prompt")
    if isinstance(value[0], int):
        return (_tokens(value, "prompt"),)
    return tuple(item if isinstance(item, str) else _tokens(item, "prompt", index) for index, item in enumerate(value))


def _tokens(value: object, *path: str | int) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise wrong_type("string", value, *path)
    if not value:
        raise bad_value("must not be empty", *path)
    for index, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int):
            raise wrong_type("integer", token, *path, index)
        if token < 0:
            raise FieldError("below", *path, index, detail="0", got=token)
    return tuple(value)


def _choice(index: int, choice: Choice, rendering: Rendering) -> Json:
    return {
        "index": index,
        "text": "".join(part.text for part in choice.content if isinstance(part, TextPart)),
        "logprobs": _logprobs(choice.logprobs or (), 0)[0] if rendering.logprobs else None,
        "finish_reason": _finish(choice),
    }


def _finish(choice: Choice | Finish) -> str:
    return "stop" if choice.reason == "tool_use" else FINISH_REASONS[choice.reason]


def _logprobs(entries: tuple[TokenLogprob, ...], offset: int) -> tuple[Json, int]:
    """The legacy format, and the offset (in characters) at which the next token begins."""
    offsets: list[int] = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.token)
    columns: Json = {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{top.token: top.logprob for top in entry.top} for entry in entries],
        "text_offset": offsets,
    }
    return columns, offset


class _Writer:
    """One chunk for each piece of text; the chunk with `finish_reason` has none."""

    def __init__(self, rendering: Rendering, ids: Ids) -> None:
        self._rendering = rendering
        self._head = b'data: {"id":"cmpl-%b","object":"text_completion","created":%d,"model":%b,"choices":[' % (
            ids.id.encode(),
            ids.created_s,
            sse.line(encode(rendering.model)),
        )
        self._tail = b'],"usage":null}\n\n' if rendering.include_usage else b"]}\n\n"
        self._offsets = [0] * rendering.num_choices

    def feed(self, delta: Said) -> bytes:
        if isinstance(delta, TextDelta):
            return self._text(delta) if delta.text or delta.logprobs else b""
        if isinstance(delta, Finish):
            return self._chunk(delta.choice, b'""', finish=b'"%b"' % _finish(delta).encode())
        if isinstance(delta, End):
            if not self._rendering.include_usage:
                return sse.DONE
            return self._head + b'],"usage":%b}\n\n' % encode(chat_usage(delta.usage, self._rendering)) + sse.DONE
        # Begin has nothing to say here; tools and thinking have no place in this dialect.
        return b""

    def fail(self, error: ServiceError, passed: bytes = b"") -> bytes:
        return sse.data(encode({"error": error_object(error)}))

    def _text(self, delta: TextDelta) -> bytes:
        if not self._rendering.logprobs:
            return self._chunk(delta.choice, encode(delta.text))
        columns, self._offsets[delta.choice] = _logprobs(delta.logprobs, self._offsets[delta.choice])
        return self._chunk(delta.choice, encode(delta.text), encode(columns))

    def _chunk(self, choice: int, text: bytes, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
        body = b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}' % (choice, text, logprobs, finish)
        return self._head + sse.line(body) + self._tail
