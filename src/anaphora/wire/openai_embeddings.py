"""OpenAI's Embeddings: texts to vectors. Vectors come and go as the bytes of their 32-bit floats, the lowest byte first."""

from __future__ import annotations

import sys
from array import array
from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Literal

import msgspec

from anaphora.errors import InvalidRequest
from anaphora.wire.base import encode
from anaphora.wire.fields import FieldError, Json, bad_value, decode_object, named, opt_int, opt_string, wrong_type
from anaphora.wire.openai_common import refusal
from anaphora.wire.openai_prompt import one_of

PATH = "/v1/embeddings"
MAX_TEXTS = 2048

Kind = Literal["", "query", "passage"]
_KINDS: dict[str, Kind] = {"query": "query", "passage": "passage", "document": "passage"}
_FIELDS = frozenset({"model", "input", "encoding_format", "dimensions", "user"})
"""What every provider knows. With anything else an upstream's vectors are not remembered, for it may change them."""
_OUR_FIELDS = _FIELDS | {"input_type"}


class EmbeddingsAsked(msgspec.Struct, frozen=True):
    """A body, read."""

    model: str
    texts: tuple[str, ...]
    base64: bool = False
    dimensions: int | None = None
    kind: Kind = ""
    """What the texts are for. Empty: it was not said."""


def model_of(body: bytes) -> str:
    """The model that is asked for; empty where that cannot be read."""
    try:
        return named(decode_object(body), "model")
    except (FieldError, InvalidRequest):
        return ""


def parse(body: bytes, *, dimensions: int) -> EmbeddingsAsked:
    """For a model of ours, which has so many dimensions. Raises InvalidRequest."""
    fields = decode_object(body)
    try:
        for name, value in fields.items():
            if name not in _OUR_FIELDS and value is not None:
                raise FieldError("unknown", name)
        return _read(fields, dimensions)
    except FieldError as error:
        raise refusal(error) from error


def parse_plain(body: bytes) -> EmbeddingsAsked | None:
    """For an upstream's model: None where only the upstream can know what the body means."""
    try:
        fields = decode_object(body)
        if any(value is not None and name not in _FIELDS for name, value in fields.items()):
            return None
        return _read(fields, None)
    except (FieldError, InvalidRequest):
        return None


def _read(fields: Json, dimensions: int | None) -> EmbeddingsAsked:
    form = opt_string(fields, "encoding_format")
    if form not in (None, "float", "base64"):
        raise bad_value(one_of(form or "", "float", "base64"), "encoding_format")
    opt_string(fields, "user")
    kind = opt_string(fields, "input_type")
    if kind is not None and kind not in _KINDS:
        raise bad_value(one_of(kind, *_KINDS), "input_type")
    return EmbeddingsAsked(
        model=named(fields, "model"),
        texts=_texts(fields),
        base64=form == "base64",
        dimensions=opt_int(fields, "dimensions", 1, dimensions),
        kind=_KINDS[kind] if kind else "",
    )


def _texts(fields: Json) -> tuple[str, ...]:
    given = fields.get("input")
    if given is None:
        raise FieldError("missing", "input")
    if isinstance(given, str):
        if not given:
            raise bad_value("must not be empty", "input")
        return (given,)
    if not isinstance(given, list):
        raise wrong_type("string", given, "input")
    if not given:
        raise bad_value("must not be empty", "input")
    if all(isinstance(item, int | list) for item in given):
        raise bad_value("tokens are not taken, only texts", "input")
    if len(given) > MAX_TEXTS:
        raise bad_value(f"{len(given)} texts are too many: at most {MAX_TEXTS} are taken at once", "input")
    for index, item in enumerate(given):
        if not isinstance(item, str):
            raise wrong_type("string", item, "input", index)
        if not item:
            raise bad_value("must not be empty", "input", index)
    return tuple(given)


def render(rows: Sequence[bytes], num_tokens: int, asked: EmbeddingsAsked) -> bytes:
    """The answer: a vector for each text, and the tokens of all of them."""
    written = [b'"%b"' % b64encode(row) if asked.base64 else encode(_floats(row).tolist()) for row in rows]
    data = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, vector) for index, vector in enumerate(written)
    )
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (num_tokens, num_tokens)
    return b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (data, encode(asked.model), usage)


# -- as a client of an upstream ----------------------------------------------------------------------------------------


def write(body: bytes, texts: Sequence[str]) -> bytes:
    """`body` with other texts."""
    return encode({**decode_object(body), "input": list(texts)})


class _Vector(msgspec.Struct, frozen=True):
    embedding: str | list[float]
    index: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0


class _Answer(msgspec.Struct, frozen=True):
    data: list[_Vector]
    usage: _Usage | None = None


_decode = msgspec.json.Decoder(_Answer).decode


def read(body: bytes, num_texts: int) -> tuple[list[bytes], int]:
    """The vectors of an upstream's answer, in the order of the texts, and the tokens of all of them. Raises ValueError where
    it is no such answer."""
    answer = _decode(body)
    places = [place if vector.index is None else vector.index for place, vector in enumerate(answer.data)]
    if sorted(places) != list(range(num_texts)):
        raise ValueError(f"there are {num_texts} texts and vectors for {places}")
    rows = [b""] * num_texts
    for place, vector in zip(places, answer.data, strict=True):
        rows[place] = _bytes(vector.embedding)
    if len({len(row) for row in rows}) > 1 or any(not row or len(row) % 4 for row in rows):
        raise ValueError("the vectors are not alike")
    return rows, 0 if answer.usage is None else max(0, answer.usage.prompt_tokens)


def _bytes(vector: str | list[float]) -> bytes:
    return b64decode(vector, validate=True) if isinstance(vector, str) else _turned(array("f", vector)).tobytes()


def _floats(row: bytes) -> array[float]:
    floats = array("f")
    floats.frombytes(row)
    return _turned(floats)


def _turned(floats: array[float]) -> array[float]:
    if sys.byteorder == "big":
        floats.byteswap()
    return floats
