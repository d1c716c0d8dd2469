from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.levels.semantic.scope import Asked, asked
from anaphora.types import MediaPart, Message, Request, Sampling, Tenant, TextPart, Tool, ToolResultPart

IMAGE = MediaPart("image", "image/png", {"base64": "aGVsbG8="})
HELLO = (Message("user", (TextPart("Hi"),)), Message("assistant", (TextPart("Hello!"),)))
texts = st.text(min_size=1, max_size=50).filter(lambda text: bool(text.strip()))


def request(text: str = "Why?", **fields: Any) -> Request:
    before = fields.pop("before", ())
    content = fields.pop("content", (TextPart(text),))
    return Request("m", Tenant("a"), (*before, Message("user", content)), **fields)


def place(asking: Request, *, fingerprint: str = "f", shared: bool = False) -> Asked | None:
    return asked(asking, fingerprint=fingerprint, max_chars=100, shared=shared)


def space(asking: Request, **fields: Any) -> bytes:
    found = place(asking, **fields)
    assert found is not None
    return found.space


@given(texts, texts)
def test_only_the_words_of_the_last_message_do_not_matter(first: str, second: str) -> None:
    assert space(request(first)) == space(request(second))


OTHERS: dict[str, Request] = {
    "model": msgspec.structs.replace(request(), model="n"),
    "tenant": msgspec.structs.replace(request(), tenant=Tenant("b")),
    "system prompt": request(before=(Message("system", (TextPart("Be brief."),)),)),
    "conversation": request(before=HELLO),
    "tools": request(tools=(Tool("look"),)),
    "temperature": request(sampling=Sampling(temperature=0.5)),
    "format": request(extra={"response_format": {"type": "json_object"}}),
    "picture": request(content=(IMAGE, TextPart("Why?"))),
    "place of the picture": request(content=(TextPart("Why?"), IMAGE)),
    "number of texts": request(content=(TextPart("Why"), TextPart("not?"))),
    "salt": request(cache_salt="s"),
    "headers": request(variant="anthropic-beta: x"),
    "name": msgspec.structs.replace(request(), messages=(Message("user", (TextPart("Why?"),), name="Ann"),)),
}


def test_everything_else_does_each_in_its_own_way() -> None:
    spaces = [space(request()), space(request(), fingerprint="g"), *map(space, OTHERS.values())]
    assert len(set(spaces)) == len(OTHERS) + 2


def test_a_shared_space_is_the_same_for_all_tenants_and_no_tenants_own() -> None:
    other = msgspec.structs.replace(request(), tenant=Tenant("b"))
    assert space(request(), shared=True) == space(other, shared=True)
    assert space(request(), shared=True) not in (space(request()), space(other))


@pytest.mark.parametrize(
    "asking",
    [
        request(" \n"),
        request("long " * 30),
        request(content=(ToolResultPart("1", (TextPart("a"),)),)),
        request(content=(ToolResultPart("1", (TextPart("a"),)), TextPart("Why?"))),
        msgspec.structs.replace(request(), messages=(*HELLO,)),
        Request("m", prompts=("Why?",)),
        request(sampling=Sampling(n=2)),
        request(sampling=Sampling(logprobs=1)),
        request(max_tokens=0),
    ],
)
def test_what_cannot_be_compared_by_words_has_no_place(asking: Request) -> None:
    assert place(asking) is None


def test_the_text_is_that_of_all_parts() -> None:
    found = place(request(content=(TextPart("Look: "), IMAGE, TextPart("why?"))))
    assert found is not None
    assert found.text == "Look: \nwhy?"
