"""Golden transcripts: the bytes of one answer in every dialect, whole and streamed, against the files in `golden/`.

The files are read by people in review; a change of a byte is a change of the interface. To write them anew, run this file
with ANAPHORA_WRITE_GOLDEN=1 and read the difference.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from anaphora.errors import EngineDied
from anaphora.types import (
    LOCAL_TENANT,
    Begin,
    Choice,
    Completion,
    End,
    Finish,
    Said,
    TextDelta,
    TextPart,
    ThinkingDelta,
    ThinkingPart,
    TokenLogprob,
    ToolUseDelta,
    ToolUsePart,
    TopLogprob,
    Usage,
)
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Dialect, Ids, Rendering
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_completions import OpenAICompletions
from anaphora.wire.openai_responses import OpenAIResponses

GOLDEN = Path(__file__).parent / "golden"
IDS = Ids("0123456789abcdef01234567", 1_700_000_000)
DIALECTS: list[Dialect] = [Anthropic(), OpenAIChat(), OpenAICompletions(), OpenAIResponses()]

PROMPT = Usage(input_tokens=10, cache_read_input_tokens=32)
USAGE = Usage(input_tokens=10, output_tokens=7, cache_read_input_tokens=32)
HELLO = (TokenLogprob("Hel", -0.25, (TopLogprob("Hel", -0.25),)),)
LO = (TokenLogprob("lo\u2019", -0.5, (TopLogprob("lo\u2019", -0.5),)),)

TALK = Completion("m", (Choice((TextPart("Hello\u2019\n"),), "stop_sequence", "END"),), USAGE)
TALK_DELTAS = (
    Begin("m", PROMPT),
    TextDelta(0, "Hel"),
    TextDelta(0, ""),
    TextDelta(0, "lo\u2019\n"),
    Finish(0, "stop_sequence", "END"),
    End(USAGE),
)
WORK = Completion(
    "m",
    (
        Choice(
            (
                ThinkingPart("Which city?", "c2ln"),
                TextPart("Let me look."),
                ToolUsePart("a", "weather", '{"city":"Oslo"}'),
                ToolUsePart("b", "now", ""),
            ),
            "tool_use",
        ),
    ),
    USAGE,
)
WORK_DELTAS = (
    Begin("m", PROMPT),
    ThinkingDelta(0, "Which city?"),
    ThinkingDelta(0, "", "c2ln"),
    TextDelta(0, "Let me look."),
    ToolUseDelta(0, 0, "", "a", "weather"),
    ToolUseDelta(0, 0, '{"city"'),
    ToolUseDelta(0, 0, ':"Oslo"}'),
    ToolUseDelta(0, 1, "", "b", "now"),
    Finish(0, "tool_use"),
    End(USAGE),
)
NOTHING = Completion("m", (Choice((), "max_tokens"),), PROMPT)
NOTHING_DELTAS = (Begin("m", PROMPT), Finish(0, "max_tokens"), End(PROMPT))
TWO = Completion(
    "m",
    (Choice((TextPart("Hel"),), "end_turn", logprobs=HELLO), Choice((TextPart("lo\u2019"),), "refusal", logprobs=LO)),
    USAGE,
)
TWO_DELTAS = (
    Begin("m", PROMPT),
    TextDelta(0, "Hel", HELLO),
    TextDelta(1, "lo\u2019", LO),
    Finish(1, "refusal"),
    Finish(0, "end_turn"),
    End(USAGE),
)
PLAIN = Rendering("m")
ANSWERS: dict[str, tuple[Completion, tuple[Said, ...], Rendering]] = {
    "talk": (TALK, TALK_DELTAS, PLAIN),
    "work": (WORK, WORK_DELTAS, PLAIN),
    "nothing": (NOTHING, NOTHING_DELTAS, PLAIN),
    "two": (TWO, TWO_DELTAS, Rendering("m", include_usage=True, num_choices=2, logprobs=True)),
}
ONE_CHOICE_ONLY = {"anthropic", "openai_responses"}
CASES = [
    pytest.param(dialect, answer, id=f"{dialect.name}-{answer}")
    for dialect in DIALECTS
    for answer in ANSWERS
    if not (answer == "two" and dialect.name in ONE_CHOICE_ONLY)
]


def check(name: str, content: bytes) -> None:
    path = GOLDEN / name
    if os.environ.get("ANAPHORA_WRITE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert content.decode() == path.read_text()


def asked_responses() -> Rendering:
    """A rendering that repeats what was asked."""
    body = b'{"model":"m","input":"?","instructions":"Be brief.","temperature":0,"max_output_tokens":9,"metadata":{"a":"b"}}'
    return OpenAIResponses().parse(body, tenant=LOCAL_TENANT).rendering


async def flow(deltas: tuple[Said, ...], error: EngineDied | None = None) -> AsyncIterator[Said]:
    for delta in deltas:
        yield delta
    if error is not None:
        raise error


async def gather(events: AsyncIterator[bytes]) -> bytes:
    return b"".join([event async for event in events])


@pytest.mark.parametrize(("dialect", "answer"), CASES)
def test_a_whole_answer_is_written_like_this(dialect: Dialect, answer: str) -> None:
    completion, _, rendering = ANSWERS[answer]
    if isinstance(dialect, OpenAIResponses):
        rendering = asked_responses()
    check(f"{dialect.name}-{answer}.json", dialect.render(completion, rendering, IDS) + b"\n")


@pytest.mark.parametrize(("dialect", "answer"), CASES)
def test_a_streamed_answer_is_written_like_this(dialect: Dialect, answer: str) -> None:
    _, deltas, rendering = ANSWERS[answer]
    check(f"{dialect.name}-{answer}.sse", asyncio.run(gather(dialect.render_stream(flow(deltas), rendering, IDS))))


@pytest.mark.parametrize(("dialect", "answer"), CASES)
def test_a_replay_is_the_stream_byte_for_byte(dialect: Dialect, answer: str) -> None:
    _, deltas, rendering = ANSWERS[answer]
    live = asyncio.run(gather(dialect.render_stream(flow(deltas), rendering, IDS)))
    assert b"".join(dialect.replay_stream(deltas, rendering, IDS)) == live


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_a_failure_in_the_middle_is_written_like_this(dialect: Dialect) -> None:
    deltas = flow(TALK_DELTAS[:2], EngineDied("The engine is restarting; retry."))
    check(f"{dialect.name}-failure.sse", asyncio.run(gather(dialect.render_stream(deltas, PLAIN, IDS))))


TERMINATORS = (b"[DONE]", b"message_stop", b"response.completed")


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_a_cut_stream_ends_in_an_error_and_without_the_terminator(dialect: Dialect) -> None:
    events = asyncio.run(gather(dialect.render_stream(flow(TALK_DELTAS[:-1]), PLAIN, IDS)))
    assert b"The answer was cut off." in events
    assert not any(terminator in events for terminator in TERMINATORS)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_closing_the_stream_closes_the_computation(dialect: Dialect) -> None:
    closed = []

    async def endless() -> AsyncIterator[Said]:
        try:
            yield Begin("m", PROMPT)
            while True:
                yield TextDelta(0, "more")
        finally:
            closed.append(True)

    async def leave() -> None:
        stream = dialect.render_stream(endless(), PLAIN, IDS)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]  # what a server does when its client goes away

    asyncio.run(leave())
    assert closed == [True]


def test_a_second_rendering_has_other_ids_everywhere() -> None:
    other = Ids("f" * 24, 1_800_000_000)
    for dialect in DIALECTS:
        for body in (dialect.render(WORK, PLAIN, other), b"".join(dialect.replay_stream(WORK_DELTAS, PLAIN, other))):
            assert IDS.id.encode() not in body
            assert other.id.encode() in body


def test_arguments_that_are_no_json_object_are_still_shown_to_anthropics_clients() -> None:
    broken = Completion("m", (Choice((ToolUsePart("a", "weather", '{"city'),), "max_tokens"),), USAGE)
    assert rb'"input":{"INVALID_JSON":"{\"city"}' in Anthropic().render(broken, PLAIN, IDS)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_an_event_is_one_line_even_for_clients_that_break_lines_at_every_separator(dialect: Dialect) -> None:
    text = "a\nb\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029c"
    deltas = (Begin("m", PROMPT), TextDelta(0, text), Finish(0, "end_turn"), End(USAGE))
    for line in b"".join(dialect.replay_stream(deltas, PLAIN, IDS)).decode().splitlines():
        assert line == "" or line.startswith(("data: {", "data: [DONE]", "event: "))
