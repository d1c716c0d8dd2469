"""Answers of upstreams: what our own servers write is read as it was meant, however it was cut, in every dialect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.test_same_question import name, value
from tests.wire.test_sse import cut

from anaphora.transcript import collect, replay
from anaphora.types import (
    Choice,
    Completion,
    Delta,
    FinishReason,
    Raw,
    Said,
    TextPart,
    ThinkingPart,
    TokenLogprob,
    ToolUsePart,
    TopLogprob,
    Usage,
)
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Dialect, Ids, Rendering
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_completions import OpenAICompletions
from anaphora.wire.openai_responses import OpenAIResponses
from anaphora.wire.upstream import UpstreamDialect
from anaphora.wire.upstream_anthropic import UpstreamAnthropic
from anaphora.wire.upstream_chat import UpstreamChat
from anaphora.wire.upstream_completions import UpstreamCompletions
from anaphora.wire.upstream_responses import UpstreamResponses

PAIRS: dict[str, tuple[Dialect, UpstreamDialect]] = {
    "anthropic": (Anthropic(), UpstreamAnthropic()),
    "openai_chat": (OpenAIChat(), UpstreamChat()),
    "openai_responses": (OpenAIResponses(), UpstreamResponses()),
    "openai_completions": (OpenAICompletions(), UpstreamCompletions()),
}
IDS = Ids("0123456789abcdef01234567", 1_700_000_000)
LIFETIMES = {"anthropic": ("5m", "1h"), "openai_responses": ("30m", "12h")}

words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)
places = st.lists(st.integers(0, 1 << 20), max_size=30)
logprob = st.floats(-20, 0)
logprobs = st.lists(
    st.builds(
        TokenLogprob,
        words,
        logprob,
        st.lists(st.builds(TopLogprob, words, logprob), max_size=2, unique_by=lambda top: top.token).map(tuple),
    ),
    min_size=1,
    max_size=4,
).map(tuple)
arguments = st.dictionaries(name, value, max_size=3).map(lambda fields: msgspec.json.encode(fields).decode())


@st.composite
def usages(draw: st.DrawFn, dialect: str) -> Usage:
    written = {ttl: draw(st.integers(1, 99)) for ttl in LIFETIMES.get(dialect, ()) if draw(st.booleans())}
    counts = st.integers(0, 10_000)
    return Usage(
        input_tokens=draw(counts),
        output_tokens=draw(counts),
        cache_read_input_tokens=draw(counts),
        cache_creation_input_tokens=sum(written.values()) if dialect in LIFETIMES else draw(counts),
        written=written,
    )


@st.composite
def choices(draw: st.DrawFn, dialect: str) -> Choice:
    """What an answer may be that the dialect can say."""
    content: list[TextPart | ThinkingPart | ToolUsePart] = []
    told = dialect in ("openai_chat", "openai_completions")
    if dialect != "openai_completions" and draw(st.booleans()):
        signature = "" if dialect == "openai_chat" else draw(st.just("") | name)
        content.append(ThinkingPart(draw(words), signature))
    if draw(st.booleans()):
        content.append(TextPart(draw(words)))
        told = told or dialect == "openai_responses"
    entries = draw(st.none() | logprobs) if told else None
    calls = [] if dialect == "openai_completions" else draw(st.lists(st.builds(ToolUsePart, name, name, arguments), max_size=3))
    content += calls
    if dialect == "anthropic" and draw(st.booleans()):
        content += [TextPart(draw(words))] if calls else []
    ends: list[FinishReason] = ["tool_use" if calls else "end_turn", "max_tokens", "refusal"]
    if dialect == "anthropic":
        ends.append("stop_sequence")
    reason = draw(st.sampled_from(ends))
    stop = draw(words) if reason == "stop_sequence" else None
    return Choice(tuple(content), reason, stop, entries)


def completions(dialect: str) -> st.SearchStrategy[Completion]:
    num_choices = 3 if dialect in ("openai_chat", "openai_completions") else 1
    many = st.lists(choices(dialect), min_size=1, max_size=num_choices).map(tuple)
    return st.builds(Completion, st.just("m"), many, usages(dialect))


def rendering_of(completion: Completion) -> Rendering:
    return Rendering(
        "m",
        stream=True,
        include_usage=True,
        num_choices=len(completion.choices),
        logprobs=any(choice.logprobs for choice in completion.choices),
        writes_billed=True,
    )


def nameless(completion: Completion | None) -> Completion:
    """Without the ids of calls, which every rendering makes anew; and without what only we count."""
    assert completion is not None
    choices = []
    for choice in completion.choices:
        content = tuple(
            msgspec.structs.replace(part, id="") if isinstance(part, ToolUsePart) else part for part in choice.content
        )
        choices.append(msgspec.structs.replace(choice, content=content))
    return msgspec.structs.replace(completion, choices=tuple(choices), compute_s=0.0)


def taking_turns(deltas: list[Said], num_choices: int) -> list[Said]:
    """The deltas of several choices, mixed as a server computes them."""
    begin, *middle, end = deltas
    rows = [[delta for delta in middle if getattr(delta, "choice", 0) == index] for index in range(num_choices)]
    mixed: list[Said] = []
    while any(rows):
        mixed += [row.pop(0) for row in rows if row]
    return [begin, *mixed, end]


def stream_of(dialect: str, deltas: list[Said], rendering: Rendering) -> bytes:
    return b"".join(PAIRS[dialect][0].replay_stream(deltas, rendering, IDS))


def read_stream(dialect: str, body: bytes, places: list[int]) -> list[Delta]:
    reader = PAIRS[dialect][1].reader({"model": "m", "stream": True})
    return [delta for chunk in cut(body, places) for delta in reader.feed(chunk)]


def said(deltas: list[Delta]) -> list[Said]:
    return [delta for delta in deltas if not isinstance(delta, Raw)]


@given(st.data())
def test_a_streamed_answer_is_read_as_it_was_meant_however_it_was_cut(data: st.DataObject) -> None:
    for dialect in PAIRS:
        completion = data.draw(completions(dialect), dialect)
        deltas = taking_turns(list(replay(completion)), len(completion.choices))
        body = stream_of(dialect, deltas, rendering_of(completion))
        found = read_stream(dialect, body, data.draw(places))
        assert nameless(collect(found)) == nameless(completion)
        assert b"".join(delta.data for delta in found if isinstance(delta, Raw)) == body


@given(st.data())
def test_a_whole_answer_is_read_as_it_was_meant(data: st.DataObject) -> None:
    for dialect, (server, upstream) in PAIRS.items():
        completion = data.draw(completions(dialect), dialect)
        body = server.render(completion, rendering_of(completion), IDS)
        found = upstream.read_whole(body)
        assert found[0] == Raw(dialect, body)
        assert nameless(collect(found)) == nameless(completion)


@given(st.data(), st.permutations(["anthropic", "openai_chat", "openai_responses"]), places)
def test_an_answer_keeps_its_meaning_through_all_dialects(data: st.DataObject, route: list[str], places: list[int]) -> None:
    completion = data.draw(completions("openai_chat").filter(lambda drawn: len(drawn.choices) == 1))
    choice = msgspec.structs.replace(completion.choices[0], logprobs=None)
    usage = msgspec.structs.replace(completion.usage, cache_creation_input_tokens=0)
    completion = Completion("m", (choice,), usage)
    deltas = list(replay(completion))
    for dialect in route:
        deltas = said(read_stream(dialect, stream_of(dialect, deltas, rendering_of(completion)), places))
    assert nameless(collect(deltas)) == nameless(completion)


def test_a_long_event_in_small_pieces_is_read_in_reasonable_time() -> None:
    """Each piece is looked at once: were it all of them each time, this would take minutes."""
    completion = Completion("m", (Choice((TextPart("x" * 2_000_000),), "end_turn"),), Usage())
    body = b"".join(line for line in pieces_of_one_event(completion))
    reader = PAIRS["openai_responses"][1].reader({})
    found = [delta for start in range(0, len(body), 64) for delta in reader.feed(body[start : start + 64])]
    assert nameless(collect(found)) == completion


def pieces_of_one_event(completion: Completion) -> Iterator[bytes]:
    """A stream whose text comes in its last events only."""
    body = json.loads(PAIRS["openai_responses"][0].render(completion, Rendering("m"), IDS))
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {**body, "output": [], "status": "in_progress"}},
        {"type": "response.completed", "response": body},
    ]
    for event in events:
        yield b"data: " + json.dumps(event).encode() + b"\n\n"
