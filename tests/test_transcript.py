"""Deltas to a completion and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anaphora.errors import BackendFailed
from anaphora.transcript import Collector, collect, replay
from anaphora.types import (
    Begin,
    Choice,
    Completion,
    Delta,
    End,
    Finish,
    FinishReason,
    TextDelta,
    TextPart,
    ThinkingDelta,
    ThinkingPart,
    TokenLogprob,
    ToolUseDelta,
    ToolUsePart,
    Usage,
)

BEGIN = Begin("m", Usage(input_tokens=3))
END = End(Usage(input_tokens=3, output_tokens=2), 0.5)


def test_deltas_become_the_parts_of_a_completion_in_their_order() -> None:
    deltas: list[Delta] = [
        BEGIN,
        ThinkingDelta(0, "hm"),
        ThinkingDelta(0, "m", "sig"),
        TextDelta(0, "a"),
        TextDelta(0, "b"),
        ToolUseDelta(0, 0, "", "id0", "f"),
        ToolUseDelta(0, 1, "", "id1", "g"),
        ToolUseDelta(0, 0, '{"x":'),
        ToolUseDelta(0, 1, "{}"),
        ToolUseDelta(0, 0, "1}"),
        Finish(0, "tool_use"),
        END,
    ]
    content = (
        ThinkingPart("hmm", "sig"),
        TextPart("ab"),
        ToolUsePart("id0", "f", '{"x":1}'),
        ToolUsePart("id1", "g", "{}"),
    )
    assert collect(deltas) == Completion("m", (Choice(content, "tool_use"),), END.usage, 0.5)


def test_interleaved_choices_are_kept_apart() -> None:
    deltas: list[Delta] = [
        BEGIN,
        TextDelta(1, "b1"),
        TextDelta(0, "a1"),
        TextDelta(1, "b2"),
        Finish(1, "max_tokens"),
        Finish(0, "stop_sequence", "x"),
        END,
    ]
    completion = collect(deltas)
    assert completion is not None
    assert completion.choices == (
        Choice((TextPart("a1"),), "stop_sequence", "x"),
        Choice((TextPart("b1b2"),), "max_tokens"),
    )


def test_a_cut_answer_is_no_completion() -> None:
    assert collect([BEGIN, TextDelta(0, "a"), Finish(0, "end_turn")]) is None


@pytest.mark.parametrize(
    "deltas",
    [
        [TextDelta(0, "before Begin")],
        [BEGIN, BEGIN],
        [BEGIN, END],
        [BEGIN, TextDelta(0, "unfinished"), END],
        [BEGIN, Finish(0, "end_turn"), TextDelta(0, "late")],
        [BEGIN, Finish(0, "end_turn"), END, END],
        [BEGIN, Finish(1, "end_turn"), END],
        [BEGIN, ToolUseDelta(0, 0, "{}")],
        [BEGIN, ToolUseDelta(0, 1, "", "id", "skipped one")],
    ],
)
def test_a_disorderly_answer_is_refused(deltas: list[Delta]) -> None:
    with pytest.raises(BackendFailed, match="order"):
        collect(deltas)


def test_a_long_text_is_replayed_in_several_deltas() -> None:
    text = "many words " * 500
    deltas = list(replay(Completion("m", (Choice((TextPart(text),), "end_turn"),), Usage(output_tokens=1000))))
    pieces = [delta.text for delta in deltas if isinstance(delta, TextDelta)]
    assert "".join(pieces) == text
    assert 8 < len(pieces) <= 40
    assert deltas[0] == Begin("m", Usage())


def test_logprobs_are_replayed_beside_their_own_text() -> None:
    logprobs = tuple(TokenLogprob(f"w{i} ", -0.1) for i in range(100))
    text = "".join(entry.token for entry in logprobs)
    deltas = replay(Completion("m", (Choice((TextPart(text),), "end_turn", None, logprobs),), Usage()))
    texts = [delta for delta in deltas if isinstance(delta, TextDelta)]
    assert len(texts) > 1
    assert all(delta.text == "".join(entry.token for entry in delta.logprobs) for delta in texts)


words = st.text("ab é\n", max_size=120)
logprobs = st.lists(st.builds(TokenLogprob, st.text("ab ", max_size=3), st.just(-1.0)), max_size=20).map(tuple)
reasons: st.SearchStrategy[FinishReason] = st.sampled_from(["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"])


@st.composite
def answers(draw: st.DrawFn) -> list[Delta]:
    deltas: list[Delta] = [Begin("m", Usage(input_tokens=1))]
    for choice in range(draw(st.integers(1, 3))):
        call = 0
        for kind in draw(st.lists(st.sampled_from(["text", "thinking", "tool"]), max_size=5)):
            if kind == "text":
                deltas.append(TextDelta(choice, draw(words), draw(st.just(()) | logprobs)))
            elif kind == "thinking":
                deltas.append(ThinkingDelta(choice, draw(words), draw(st.sampled_from(["", "s"]))))
            else:
                deltas += [ToolUseDelta(choice, call, "", "i", "f"), ToolUseDelta(choice, call, draw(words))]
                call += 1
        deltas.append(Finish(choice, draw(reasons)))
    return [*deltas, End(Usage(input_tokens=1, output_tokens=9), 1.5)]


@given(answers())
def test_what_was_collected_is_collected_again_from_its_replay(deltas: list[Delta]) -> None:
    completion = collect(deltas)
    assert completion is not None
    assert collect(replay(completion)) == completion


@given(answers(), st.data())
def test_no_prefix_of_an_answer_is_a_completion(deltas: list[Delta], data: st.DataObject) -> None:
    collector = Collector()
    for delta in deltas[: data.draw(st.integers(0, len(deltas) - 1))]:
        collector.add(delta)
    assert collector.completion is None
