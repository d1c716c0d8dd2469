"""OpenAI's Completions as an upstream: raw text (or token ids) in, raw text out."""

from __future__ import annotations

from collections.abc import Iterator

from anaphora.types import Begin, Delta, End, Raw, Request, Said
from anaphora.wire.fields import Json
from anaphora.wire.upstream import (
    Body,
    Reader,
    UpstreamError,
    before_answer,
    cannot_say,
    object_of,
    objects_of,
    renamed,
    text_of,
)
from anaphora.wire.upstream_chat import ask_usage, own_body
from anaphora.wire.upstream_chat_answer import ChatChoice, ChatReader, check_choices, whole_answer
from anaphora.wire.upstream_openai import read_error, read_usage, sampling_fields

_SAMPLING = frozenset({"temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "stop"})
_DIALECT = "openai_completions"


class UpstreamCompletions:
    """Raw prompts come in no other dialect, so nothing is translated."""

    name = _DIALECT
    path = "/v1/completions"

    def write(self, request: Request, *, model: str) -> Json:
        if not request.prompts:
            raise cannot_say("messages", "this upstream takes raw prompts, no messages")
        prompts = [list(prompt) if isinstance(prompt, tuple) else prompt for prompt in request.prompts]
        body = Body({"model": model, "prompt": prompts[0] if len(prompts) == 1 else prompts})
        body |= sampling_fields(request.sampling, native=_SAMPLING, extensions=True)
        if request.max_tokens is not None:
            body["max_tokens"] = request.max_tokens
        if request.sampling.n > 1:
            body["n"] = request.sampling.n
        if request.sampling.logprobs is not None:
            body["logprobs"] = request.sampling.logprobs
        if request.echo:
            body["echo"] = True
        if request.cache_salt is not None:
            body["cache_salt"] = request.cache_salt
        body |= request.extra
        if request.stream:
            body["stream"] = True
            ask_usage(body, own_body(request, self.name))
        return body

    def passed(self, native: bytes, *, model: str) -> Json:
        body = renamed(native, model)
        if body.get("stream") is True:
            ask_usage(body, body)
        return body

    def reader(self, body: Json) -> Reader:
        return _Reader(body)

    def read_whole(self, data: bytes) -> list[Delta]:
        body = whole_answer(data, _DIALECT)
        choices: dict[int, ChatChoice] = {}
        said: list[Said] = []
        for index, choice in enumerate(objects_of(body.get("choices"))):
            choices[index] = ChatChoice(index)
            said += choices[index].read(*_as_in_chat(choice))
        check_choices(choices)
        usage = read_usage(body.get("usage"))
        faithful = all(choice.faithful for choice in choices.values())
        begin = Begin(text_of(body.get("model")), before_answer(usage), answer_id=text_of(body.get("id")))
        return [Raw(_DIALECT, data), begin, *said, End(usage, faithful=faithful)]

    def read_error(self, status: int, data: bytes) -> UpstreamError:
        return read_error(status, data)


def _as_in_chat(choice: Json) -> tuple[Json, Json]:
    """A choice, and its piece of text, as Chat has them: log-probabilities are rows there, here they are columns."""
    columns = object_of(choice.get("logprobs"))
    tokens, logprobs, tops = (_column(columns, name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    rows: list[Json] = []
    for place, token in enumerate(tokens):
        top = object_of(tops[place]) if place < len(tops) else {}
        alternatives = [{"token": other, "logprob": value} for other, value in top.items()]
        logprob = logprobs[place] if place < len(logprobs) else None
        rows.append({"token": token, "logprob": logprob, "top_logprobs": alternatives})
    return {**choice, "logprobs": {"content": rows}}, {"content": choice.get("text")}


def _column(columns: Json, name: str) -> list[object]:
    column = columns.get(name)
    return column if isinstance(column, list) else []


class _Reader(ChatReader):
    dialect = _DIALECT

    def read_choice(self, index: int, choice: Json) -> Iterator[Said]:
        yield from self.choice(index).read(*_as_in_chat(choice))
