"""OpenAI's Embeddings as bytes: what is read is what was written, and only what is understood is taken apart."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.errors import InvalidRequest
from anaphora.wire import openai_embeddings as wire

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
matrices = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(floats, min_size=width, max_size=width), min_size=1, max_size=5)
)


def packed(row: list[float]) -> bytes:
    return struct.pack(f"<{len(row)}f", *row)


@given(matrices, st.booleans())
def test_an_answer_that_was_rendered_is_read_as_it_was(rows: list[list[float]], as_base64: bool) -> None:
    asked = wire.EmbeddingsAsked("m", ("a",) * len(rows), base64=as_base64)
    found, num_tokens = wire.read(wire.render([packed(row) for row in rows], 7, asked), len(rows))
    assert ([list(struct.unpack(f"<{len(row) // 4}f", row)) for row in found], num_tokens) == (rows, 7)


@given(matrices, st.randoms())
def test_vectors_are_put_in_the_order_of_the_texts(rows: list[list[float]], rng: Any) -> None:
    asked = wire.EmbeddingsAsked("m", ("a",) * len(rows))
    answer = json.loads(wire.render([packed(row) for row in rows], 1, asked))
    rng.shuffle(answer["data"])
    assert wire.read(json.dumps(answer).encode(), len(rows))[0] == [packed(row) for row in rows]


@given(texts, st.none() | st.integers(1, 384), st.sampled_from([None, "float", "base64"]), st.none() | st.text(max_size=5))
def test_a_plain_body_is_read_and_written_with_other_texts(
    given_texts: list[str], dimensions: int | None, form: str | None, user: str | None
) -> None:
    body: dict[str, Any] = {"model": "m", "input": given_texts, "dimensions": dimensions, "encoding_format": form, "user": user}
    encoded = json.dumps(body).encode()
    asked = wire.parse_plain(encoded)
    assert asked == wire.EmbeddingsAsked("m", tuple(given_texts), form == "base64", dimensions)
    assert json.loads(wire.write(encoded, ["x"])) == {**body, "input": ["x"]}


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m", "input": "a", "truncate": "END"},
        {"model": "m", "input": "a", "input_type": "query"},
        {"model": "m", "input": [1]},
        {"model": "m", "input": [[1]]},
        {"model": "m", "input": [{"image": "x"}]},
        {"model": "m", "input": ""},
        {"model": "m", "input": []},
        {"model": "m", "input": ["a"] * 2049},
        {"model": "m", "input": "a", "encoding_format": "bits"},
        {"model": "m", "input": "a", "dimensions": 0},
        {"model": 1, "input": "a"},
        {"input": "a"},
        [],
    ],
)
def test_what_only_a_provider_may_understand_is_not_taken_apart(body: Any) -> None:
    assert wire.parse_plain(json.dumps(body).encode()) is None


def test_a_field_that_is_null_says_nothing() -> None:
    assert wire.parse_plain(b'{"model": "m", "input": "a", "truncate": null}') is not None
    assert wire.parse(b'{"model": "m", "input": "a", "truncate": null}', dimensions=8).texts == ("a",)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"input": "a"}', b'{"model": ""}', b'{"model": 1}'])
def test_a_body_whose_model_cannot_be_read_names_none_and_is_refused(body: bytes) -> None:
    assert wire.model_of(body) == ""
    with pytest.raises(InvalidRequest):
        wire.parse(body, dimensions=8)


def vectors(*rows: object, **item: object) -> dict[str, Any]:
    return {"data": [{"embedding": row, "index": index, **item} for index, row in enumerate(rows)]}


@pytest.mark.parametrize(
    "answer",
    [
        vectors([1.0]),
        vectors([1.0], [1.0], [1.0]),
        vectors([1.0], [1.0, 2.0]),
        vectors([], []),
        vectors([1.0], [1.0], index=0),
        vectors({"sparse": 1}, {"sparse": 1}),
        vectors("no base64!", "no base64!"),
        vectors(base64.b64encode(b"abc").decode(), base64.b64encode(b"abc").decode()),
        {"data": "none"},
        {},
    ],
)
def test_what_is_no_answer_to_two_texts_is_refused(answer: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (msgspec's is one)
        wire.read(json.dumps(answer).encode(), 2)


def test_an_answer_may_leave_out_places_and_usage() -> None:
    assert wire.read(b'{"data": [{"embedding": [1.0]}, {"embedding": [2]}]}', 2) == ([packed([1.0]), packed([2.0])], 0)
