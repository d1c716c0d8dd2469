"""What is only passed on says what it cost, in whatever shape; what says nothing of it is not made up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.types import Usage
from anaphora.wire.upstream_other import MAX_NAME, asked_model, stated

PICTURE = {
    "total_tokens": 4210,
    "input_tokens": 50,
    "output_tokens": 4160,
    "input_tokens_details": {"text_tokens": 10, "image_tokens": 40},
}
SPEECH = {
    "type": "tokens",
    "input_tokens": 14,
    "input_token_details": {"text_tokens": 0, "audio_tokens": 14},
    "output_tokens": 45,
    "total_tokens": 59,
}
CACHED = {"input_tokens": 3, "output_tokens": 4, "cache_read_input_tokens": 5}


@pytest.mark.parametrize(
    ("usage", "found"),
    [
        (PICTURE, Usage(50, 4160, details={"image_input": 40}, reads_unsaid=True)),
        (SPEECH, Usage(14, 45, details={"audio_input": 14}, reads_unsaid=True)),
        ({"prompt_tokens": 7, "total_tokens": 7}, Usage(7, reads_unsaid=True)),
        ({"total_tokens": 56}, Usage(56)),
        ({"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}, Usage(5, 2, 4)),
        ({"type": "duration", "seconds": 9}, None),
        ({}, None),
        (None, None),
        ([1], None),
        ("many", None),
    ],
)
def test_usage_is_read_in_every_shape_that_providers_have(usage: Any, found: Usage | None) -> None:
    answer = json.dumps({"data": [{"b64_json": "AAAA"}], "usage": usage, "model": "m"}).encode()
    assert stated(answer, anthropic=False) == ("m", found)


def test_anthropics_words_are_read_as_anthropic_means_them() -> None:
    answer = json.dumps({"usage": CACHED}).encode()
    assert stated(answer, anthropic=True) == ("", Usage(3, 4, 5))


@given(
    st.binary(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_what_is_no_such_answer_says_nothing(answer: bytes) -> None:
    assert stated(answer, anthropic=False) == ("", None)
    assert asked_model(answer, "application/json") == ""


def test_the_model_is_found_in_json_and_in_either_end_of_a_form() -> None:
    assert asked_model(b'{"prompt": "a cat", "model": "gpt-image-1"}', "application/json") == "gpt-image-1"
    field, kind = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n', "multipart/form-data; boundary=x"
    file = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + bytes(1 << 20) + b"\r\n"
    assert asked_model(field + file + b"--x--\r\n", kind) == "whisper-1"
    assert asked_model(file + field + b"--x--\r\n", kind) == "whisper-1"
    assert asked_model(file + b"--x--\r\n", kind) == ""
    assert asked_model(file + field + file, kind) == ""  # as deep in it as nobody looks
    assert len(asked_model(json.dumps({"model": "m" * 5000}).encode(), "")) == MAX_NAME
