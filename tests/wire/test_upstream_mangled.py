"""Answers in which anything may be anything: they are read or refused, and nothing else happens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.providers import (
    ANTHROPIC,
    CHAT,
    CHAT_USAGE,
    COMPLETIONS,
    DONE,
    MESSAGE,
    REASONING,
    RESPONSES,
    RESPONSES_USAGE,
    TALK,
    THINKING_AND_CALLS,
    Json,
    call_piece,
    chunk,
    message_start,
    response,
    responses_stream,
    stream,
)
from tests.wire.providers import CALL as FUNCTION_CALL

from anaphora.errors import ServiceError
from anaphora.transcript import Collector
from anaphora.types import Delta, End
from anaphora.wire.upstream import UpstreamDialect

values = st.recursive(
    st.sampled_from([None, True, False, 0, 1, -1, 2.5, 1e300, 2**70, "", "x", "text", "tool_use", "stop", "length"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "index", "text", "id"]), inner, max_size=2)
    ),
    max_leaves=4,
)

CALLS = stream(call_piece(0, '{"a":', "call_a", "f"), call_piece(1, "{}", "call_b", "g"), chunk({}, "tool_calls"), DONE)
STREAMS: list[tuple[UpstreamDialect, bytes]] = [
    (ANTHROPIC, THINKING_AND_CALLS),
    (CHAT, TALK),
    (CHAT, CALLS),
    (COMPLETIONS, TALK),
    (RESPONSES, responses_stream()),
]

CHOICE: Json = {
    "index": 0,
    "message": {
        "role": "assistant",
        "content": "Hi",
        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}],
    },
    "logprobs": {"content": [{"token": "Hi", "logprob": -1.0, "bytes": [72, 105], "top_logprobs": []}]},
    "finish_reason": "stop",
}
COLUMNS: Json = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}], "text_offset": [0]}
BLOCKS = [
    {"type": "thinking", "thinking": "hm", "signature": "s"},
    {"type": "text", "text": "Hi"},
    {"type": "tool_use", "id": "t", "name": "f", "input": {}},
]
WHOLES: list[tuple[UpstreamDialect, Json]] = [
    (ANTHROPIC, message_start()["message"] | {"content": BLOCKS, "stop_reason": "tool_use"}),
    (CHAT, {"model": "m", "choices": [CHOICE], "usage": CHAT_USAGE}),
    (
        COMPLETIONS,
        {"model": "m", "choices": [{"text": "a", "logprobs": COLUMNS, "finish_reason": "stop"}], "usage": CHAT_USAGE},
    ),
    (RESPONSES, response("completed", [REASONING, MESSAGE, FUNCTION_CALL], usage=RESPONSES_USAGE)),
]


def places_in(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places_in(item, (*path, key)))]


def mangled(draw: st.DrawFn, value: Any) -> Any:
    """`value` with something else in one of its places."""
    copy = json.loads(json.dumps(value))
    path = draw(st.sampled_from(places_in(copy)))
    other = draw(values)
    if not path:
        return other
    owner = copy
    for step in path[:-1]:
        owner = owner[step]
    owner[path[-1]] = other
    return copy


@st.composite
def mangled_streams(draw: st.DrawFn) -> tuple[UpstreamDialect, bytes]:
    """Some events of a good stream: one of them altered, others left out or repeated."""
    upstream, body = draw(st.sampled_from(STREAMS))
    events = [event for event in body.decode().split("\n\n") if event]
    picked = draw(st.lists(st.sampled_from(range(len(events))), max_size=3))
    order = sorted([*range(len(events)), *picked]) if draw(st.booleans()) else list(range(len(events)))
    altered = draw(st.sampled_from(order))
    out = []
    for number in order:
        head, found, data = events[number].rpartition("data: ")
        if number == altered and found and data.startswith("{"):
            data = json.dumps(mangled(draw, json.loads(data)))
        out.append(f"{head}{found}{data}\n\n")
    return upstream, "".join(out).encode()


def check(deltas: list[Delta]) -> None:
    """In the order that deltas must have, as far as they go."""
    collector = Collector()
    for delta in deltas:
        collector.add(delta)
    assert [isinstance(delta, End) for delta in deltas].count(True) <= 1


@given(mangled_streams())
def test_a_mangled_stream_is_read_in_order_or_refused(case: tuple[UpstreamDialect, bytes]) -> None:
    upstream, body = case
    try:
        deltas = upstream.reader({"model": "m"}).feed(body)
    except ServiceError:
        return
    check(deltas)


@given(st.data())
def test_a_mangled_answer_is_read_in_order_or_refused(data: st.DataObject) -> None:
    upstream, body = data.draw(st.sampled_from(WHOLES))
    altered = json.dumps(data.draw(st.composite(mangled)(body))).encode()
    try:
        deltas = upstream.read_whole(altered)
    except ServiceError:
        return
    check(deltas)


@pytest.mark.parametrize("upstream", [ANTHROPIC, CHAT, RESPONSES, COMPLETIONS], ids=lambda upstream: upstream.name)
@given(data=st.binary(max_size=40) | values.map(lambda value: json.dumps({"error": value, "detail": value}).encode()))
def test_an_error_is_always_read(upstream: UpstreamDialect, data: bytes) -> None:
    assert upstream.read_error(500, data).message
