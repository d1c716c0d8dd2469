from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from anaphora.keys import derived_key, digest, digests, request_key
from anaphora.types import (
    Key,
    MediaPart,
    Message,
    Request,
    Sampling,
    Tenant,
    TextPart,
    ThinkingPart,
    Tool,
    ToolChoice,
    ToolResultPart,
    ToolUsePart,
)

replace: Callable[..., Any] = msgspec.structs.replace


def key_of(request: Request, fingerprint: str = "f") -> Key:
    return request_key(request, fingerprint=fingerprint)


BASE = Request(
    model="m",
    tenant=Tenant("a"),
    messages=(
        Message("system", (TextPart("Be brief."),)),
        Message("user", (TextPart("Look"), MediaPart("image", "image/png", {"base64": "AAAA"}, {"detail": "low"}))),
        Message("assistant", (ThinkingPart("hm", "signed"), ToolUsePart("id1", "look", '{"at": 1}'))),
        Message("user", (ToolResultPart("id1", (TextPart("a cat"),)),), "bob"),
    ),
    tools=(Tool("look", "Looks.", {"type": "object"}, {"strict": True}),),
    tool_choice=ToolChoice("tool", "look"),
    sampling=Sampling(temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=7, stop=("END",), n=2, logprobs=3),
    extra={"reasoning_effort": "low", "limits": [1, 2]},
)

CHANGES: dict[str, list[Any]] = {
    "model": ["n", ""],
    "tenant": [Tenant("b"), Tenant("")],
    "messages": [(), BASE.messages[:3], BASE.messages[::-1]],
    "prompts": [("x",), ((1, 2),), ((1,), (2,)), ("",)],
    "echo": [True],
    "tools": [(), BASE.tools * 2],
    "cache_salt": ["", "salt"],
    "exact_kv": [True],
    "variant": ["anthropic-beta: context-1m"],
    "extra": [{}, {**BASE.extra, "new": None}, {**BASE.extra, "limits": [2, 1]}],
}
SAMPLING_CHANGES: dict[str, list[Any]] = {
    "temperature": [None, 0.0, 0.51],
    "top_p": [None, 1.0],
    "top_k": [None, 0],
    "min_p": [None, 0.0],
    "seed": [None, 0, 2**70, 2**70 + 1],
    "frequency_penalty": [0.5],
    "presence_penalty": [0.5],
    "stop": [(), ("END", ""), ("EN", "D")],
    "n": [1],
    "logprobs": [None, 0],
}
CHOICE_CHANGES: dict[str, list[Any]] = {"mode": ["auto"], "name": [None, "other"], "parallel": [False]}
MESSAGE_CHANGES: list[tuple[int, Message]] = [
    (0, replace(BASE.messages[0], role="user")),
    (0, replace(BASE.messages[0], content=(TextPart("Be brief"),))),
    (0, replace(BASE.messages[0], content=(TextPart("Be "), TextPart("brief.")))),
    (0, replace(BASE.messages[0], content=(ThinkingPart("Be brief."),))),
    (1, replace(BASE.messages[1], content=(TextPart("Look"), MediaPart("image", "image/png", {"url": "AAAA"})))),
    (1, replace(BASE.messages[1], content=(TextPart("Look"), MediaPart("image", "image/gif", {"base64": "AAAA"})))),
    (2, replace(BASE.messages[2], content=(ThinkingPart("hm"), ToolUsePart("id1", "look", '{"at": 1}')))),
    (2, replace(BASE.messages[2], content=(ThinkingPart("hm", "signed"), ToolUsePart("id2", "look", '{"at": 1}')))),
    (2, replace(BASE.messages[2], content=(ThinkingPart("hm", "signed"), ToolUsePart("id1", "look", '{"at":1}')))),
    (3, replace(BASE.messages[3], name=None)),
    (3, replace(BASE.messages[3], content=(ToolResultPart("id1", (TextPart("a cat"),), True),))),
]
TOOL_CHANGES: list[dict[str, Any]] = [
    {"name": "lick"},
    {"description": ""},
    {"parameters": {"type": "object", "required": []}},
    {"extra": {"strict": False}},
    {"extra": {"strict": 1}},
]


def variants() -> list[Request]:
    found = [replace(BASE, **{name: value}) for name, values in CHANGES.items() for value in values]
    for name, values in SAMPLING_CHANGES.items():
        found += [replace(BASE, sampling=replace(BASE.sampling, **{name: value})) for value in values]
    for name, values in CHOICE_CHANGES.items():
        found += [replace(BASE, tool_choice=replace(BASE.tool_choice, **{name: value})) for value in values]
    for position, message in MESSAGE_CHANGES:
        messages = (*BASE.messages[:position], message, *BASE.messages[position + 1 :])
        found.append(replace(BASE, messages=messages))
    found += [replace(BASE, tools=(replace(BASE.tools[0], **change),)) for change in TOOL_CHANGES]
    return found


def test_every_change_of_any_field_is_another_question() -> None:
    requests = [BASE, *variants()]
    assert len({key_of(request) for request in requests}) == len(requests)


def test_no_field_was_overlooked_by_the_tests_above() -> None:
    assert {*CHANGES, "sampling", "tool_choice", "stream", "max_tokens", "keep", "native"} == set(Request.__struct_fields__)
    assert set(SAMPLING_CHANGES) == set(Sampling.__struct_fields__)
    assert set(CHOICE_CHANGES) == set(ToolChoice.__struct_fields__)


def test_streaming_and_the_token_limit_are_not_part_of_the_question() -> None:
    assert key_of(replace(BASE, stream=True)) == key_of(replace(BASE, max_tokens=5)) == key_of(BASE)


def with_call_ids(call: str, result: str) -> Request:
    asked = replace(BASE.messages[2], content=(ToolUsePart(call, "look", "{}"), ToolUsePart("other", "look", "{}")))
    told = replace(BASE.messages[3], content=(ToolResultPart(result, (TextPart("a cat"),)),))
    changed: Request = replace(BASE, messages=(*BASE.messages[:2], asked, told, *BASE.messages[4:]))
    return changed


def test_the_ids_of_tool_calls_are_names_only() -> None:
    assert key_of(with_call_ids("call_1", "call_1")) == key_of(with_call_ids("toolu_9", "toolu_9"))


def test_which_call_a_result_belongs_to_is_part_of_the_question() -> None:
    assert key_of(with_call_ids("call_1", "call_1")) != key_of(with_call_ids("call_1", "other"))


def test_changed_weights_are_another_question() -> None:
    assert key_of(BASE, "f") != key_of(BASE, "g")


def test_derived_keys_are_all_different() -> None:
    base, other = key_of(BASE), key_of(replace(BASE, model="n"))
    keys = {derived_key(key, name, number) for key in (base, other) for name in ("x", "y") for number in range(3)}
    assert len(keys | {base, other}) == 14


# -- properties --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc\u02ff", max_size=3), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text("abc", max_size=2), JSON, max_size=3)


def asking(extra: dict[str, Any]) -> Request:
    return Request("m", extra=extra, tools=(Tool("t", parameters=extra),))


def shuffled(value: Any, draw: random.Random) -> Any:
    """The same JSON value written otherwise: keys in another order, whole numbers as floats."""
    if isinstance(value, dict):
        items = [(name, shuffled(item, draw)) for name, item in value.items()]
        draw.shuffle(items)
        return dict(items)
    if isinstance(value, list):
        return [shuffled(item, draw) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value) if draw.random() < 0.5 else value
    if isinstance(value, int) and not isinstance(value, bool) and float(value) == value:
        return float(value) if draw.random() < 0.5 else value
    return value


def same_json(one: Any, other: Any) -> bool:
    """Equality of JSON values: as Python's, but true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(item, other[name]) for name, item in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return bool(one == other)


@given(OBJECTS, st.randoms(use_true_random=False))
@example({"a": 1.0}, random.Random(0))
@example({"a": -0.0}, random.Random(0))
@example({"a": 2**64}, random.Random(0))
@example({"a": 1e300}, random.Random(0))
def test_the_same_json_written_otherwise_is_the_same_question(extra: dict[str, Any], draw: random.Random) -> None:
    assert key_of(asking(extra)) == key_of(asking(shuffled(extra, draw)))


@given(OBJECTS, OBJECTS)
@example({"a": 1}, {"a": True})
@example({"a": 0}, {"a": None})
@example({"a": 2**64}, {"a": 2**64 + 1})
@example({"a": 10**400}, {"a": 10**400 + 1})
@example({"a": "1"}, {"a": 1})
@example({"a": [1, [2]]}, {"a": [[1], 2]})
@example({"a": 1.5, "b": b"x"}, {"a": 1.5, "b": base64.b64encode(b"x").decode()})
def test_different_json_is_another_question(one: dict[str, Any], other: dict[str, Any]) -> None:
    assume(not same_json(one, other))
    assert key_of(asking(one)) != key_of(asking(other))


@given(st.sampled_from([BASE, *variants()]))
def test_a_request_read_back_from_json_is_the_same_question(request: Request) -> None:
    assume(request.sampling.seed is None or request.sampling.seed < 2**63)
    copy = msgspec.json.decode(msgspec.json.encode(request), type=Request)
    assert key_of(copy) == key_of(request)


def test_a_default_that_was_spelled_out_is_the_same_question() -> None:
    fields = {"frequency_penalty": 0.0, "presence_penalty": -0.0, "n": 1, "stop": []}
    spelled = msgspec.convert({"model": "m", "sampling": fields, "tool_choice": {"mode": "auto"}, "extra": {}}, Request)
    assert key_of(spelled) == key_of(Request("m"))
    assert key_of(Request("m", sampling=Sampling(temperature=1))) == key_of(Request("m", sampling=Sampling(temperature=1.0)))


@given(st.text(max_size=5), st.text(max_size=5), st.text(max_size=5), st.text(max_size=5))
def test_two_tenants_never_share_a_key(tenant: str, other: str, model: str, fingerprint: str) -> None:
    assume(tenant != other)
    try:
        json.dumps([tenant, other, model, fingerprint], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        assume(False)
    assert key_of(Request(model, Tenant(tenant)), fingerprint) != key_of(Request(model, Tenant(other)), fingerprint)
    # Nor by moving characters between the fields next to each other.
    assert key_of(Request(model, Tenant(tenant)), other) != key_of(Request(model, Tenant(other)), tenant)
    if fingerprint:
        assert key_of(Request(model, Tenant(tenant + fingerprint)), "") != key_of(Request(model, Tenant(tenant)), fingerprint)


@pytest.mark.parametrize("text", ["\u02ff", "e\u0301", "\u00e9", " ", "\x00", "\U0001f600"])
def test_strings_are_taken_as_they_are(text: str) -> None:
    others = ["", "e", "\u02fe", "\u00e9", "e\u0301"]
    keys = {key_of(Request("m", prompts=(other,))) for other in others if other != text}
    assert key_of(Request("m", prompts=(text,))) not in keys


@given(st.binary(max_size=80), st.lists(st.binary(max_size=80)))
def test_digests_of_many_contents_are_those_of_each(seed: bytes, contents: list[bytes]) -> None:
    assert digests(seed, contents) == [digest((seed, content)) for content in contents]
