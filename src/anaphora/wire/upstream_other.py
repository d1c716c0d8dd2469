"""What can be told of requests and answers that are only passed on: the model, and the usage that is stated. Pure."""

from __future__ import annotations

import msgspec

from anaphora.types import Usage
from anaphora.wire import upstream_anthropic_answer, upstream_openai
from anaphora.wire.fields import Json
from anaphora.wire.upstream import UNREADABLE, count_of, object_of, text_of

MAX_NAME = 256
_LOOK_BYTES = 1 << 16
"""Of a form: its beginning and its end, where its fields are; between them lies a file."""
_FIELD = b'name="model"\r\n\r\n'


class _Named(msgspec.Struct, frozen=True):
    model: str = ""


class _Stated(msgspec.Struct, frozen=True):
    model: object = None
    usage: object = None


_decode_named, _decode_stated = msgspec.json.Decoder(_Named).decode, msgspec.json.Decoder(_Stated).decode


def asked_model(body: bytes, content_type: str) -> str:
    """The model that a request names, in JSON or in a form; empty where it names none."""
    if content_type.startswith("multipart/form-data"):
        return _form_model(body[:_LOOK_BYTES]) or _form_model(body[-_LOOK_BYTES:])
    try:
        return _decode_named(body).model[:MAX_NAME]
    except UNREADABLE:
        return ""


def _form_model(part: bytes) -> str:
    _, found, rest = part.partition(_FIELD)
    name, end, _ = rest[: MAX_NAME + 2].partition(b"\r\n")
    return name.decode("utf-8", "replace") if found and end else ""


def stated(answer: bytes, *, anthropic: bool) -> tuple[str, Usage | None]:
    """The model that an answer in JSON names, or nothing, and its usage. None: it says none in tokens."""
    try:
        found = _decode_stated(answer)
    except UNREADABLE:
        return "", None
    return text_of(found.model)[:MAX_NAME], _usage(object_of(found.usage), anthropic=anthropic)


def _usage(usage: Json, *, anthropic: bool) -> Usage | None:
    if anthropic:
        read = upstream_anthropic_answer.read_usage(usage)
    elif "input_tokens" in usage or "prompt_tokens" in usage:
        details = usage.get("input_token_details")  # the spelling of transcriptions
        read = upstream_openai.read_usage({**usage, "input_tokens_details": details} if details else usage)
    else:  # of a ranking, say, where nothing is written
        read = Usage(input_tokens=count_of(usage.get("total_tokens")))
    return read if read.prompt_tokens or read.output_tokens else None
