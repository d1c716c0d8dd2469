"""What the echo backend says. The contract of all backends is checked in test_contract."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from anaphora.backends import echo_lengths
from anaphora.backends.echo import EchoBackend, Options, fail_at
from anaphora.errors import BackendFailed, ConfigError, ContextTooLong
from anaphora.transcript import Collector
from anaphora.types import (
    LOCAL_TENANT,
    Completion,
    Delta,
    Message,
    Request,
    Sampling,
    TextPart,
    Tool,
    ToolChoice,
    ToolUsePart,
)
from anaphora.wire.openai_chat import OpenAIChat


def ask(text: str, **fields: object) -> Request:
    return Request("echo", messages=(Message("user", (TextPart(text),)),), **fields)  # type: ignore[arg-type]


def answer(request: Request, backend: EchoBackend | None = None) -> Completion:
    async def run() -> Completion:
        collector = Collector()
        async for delta in (backend or EchoBackend()).run(request):
            collector.add(delta)
        assert collector.completion is not None
        return collector.completion

    return asyncio.run(run())


def said(completion: Completion) -> list[str]:
    return ["".join(part.text for part in choice.content if isinstance(part, TextPart)) for choice in completion.choices]


def test_it_says_the_last_user_text_word_by_word() -> None:
    completion = answer(ask("to be  or\nnot"))
    assert said(completion) == ["to be  or\nnot"]
    assert completion.usage.output_tokens == 4
    assert completion.usage.input_tokens == 4
    assert completion.choices[0].reason == "end_turn"


def test_max_tokens_cuts_it() -> None:
    completion = answer(ask("one two three", max_tokens=2))
    assert said(completion) == ["one two "]
    assert completion.choices[0].reason == "max_tokens"
    assert answer(ask("one two", max_tokens=2)).choices[0].reason == "end_turn"


def test_max_tokens_0_only_reads_the_prompt() -> None:
    completion = answer(ask("one two three", max_tokens=0))
    assert completion.choices[0].content == ()
    assert completion.choices[0].reason == "max_tokens"
    assert completion.usage.output_tokens == 0


def test_a_stop_string_cuts_it_and_is_named() -> None:
    completion = answer(ask("one two three", sampling=Sampling(stop=("three", "two"))))
    assert said(completion) == ["one "]
    assert completion.choices[0].reason == "stop_sequence"
    assert completion.choices[0].stop_sequence == "two"


def test_raw_prompts_give_n_choices_each() -> None:
    completion = answer(Request("echo", prompts=("a b", (1, 2)), echo=True, sampling=Sampling(n=2)))
    assert said(completion) == ["a ba b"] * 2 + ["1 21 2"] * 2


def test_logprobs_spell_the_text() -> None:
    choice = answer(ask("one two", sampling=Sampling(logprobs=1))).choices[0]
    assert choice.logprobs is not None
    assert "".join(entry.token for entry in choice.logprobs) == "one two"


def test_a_forced_tool_is_called_with_the_text() -> None:
    completion = answer(ask("hi", tools=(Tool("f"), Tool("g")), tool_choice=ToolChoice("tool", "g")))
    assert completion.choices[0].content == (ToolUsePart("call_0", "g", '{"text": "hi"}'),)
    assert completion.choices[0].reason == "tool_use"


def test_too_long_a_prompt_is_refused() -> None:
    backend = EchoBackend(Options(max_input_tokens=3))
    with pytest.raises(ContextTooLong):
        answer(ask("one two three four"), backend)
    with pytest.raises(ContextTooLong):
        answer(ask("one two", max_tokens=2), backend)


def test_it_fails_where_it_is_told_to() -> None:
    backend = EchoBackend(gate=fail_at(2))
    with pytest.raises(BackendFailed):
        answer(ask("one two three"), backend)
    assert (backend.runs, backend.finished, backend.closed) == (1, 0, 1)


def test_a_whole_answer_is_said_at_once_and_is_the_same() -> None:
    async def deltas(request: Request) -> list[Delta]:
        return [delta async for delta in EchoBackend().run(request)]

    for fields in ({}, {"max_tokens": 2}, {"sampling": Sampling(n=2)}, {"sampling": Sampling(stop=("three",))}):
        whole, streamed = (ask("one two three", stream=stream, **fields) for stream in (False, True))
        assert len(asyncio.run(deltas(whole))) < len(asyncio.run(deltas(streamed)))
        one, other = answer(whole), answer(streamed)
        assert (one.choices, one.usage) == (other.choices, other.usage)


def test_prompts_are_counted_with_a_models_own_tokenizer_if_there_is_one(tiny_llama: Path) -> None:
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    backend = EchoBackend(Options(tokenizer=str(tiny_llama / "tokenizer.json")))
    for text in ("nobody knows what is cached", "the lazy dog, internationally " * 40):
        num_tokens = len(tokenizer.encode(text).ids)
        assert num_tokens != len(echo_lengths.tokens(text))
        body = {"model": "echo", "messages": [{"role": "user", "content": text}]}
        parsed = OpenAIChat().parse(msgspec.json.encode(body), tenant=LOCAL_TENANT)
        lengths = asyncio.run(backend.measure(parsed.request, parsed.prompt))
        assert lengths is not None
        assert (lengths.ends, lengths.total, len(lengths.steps)) == ((num_tokens,), num_tokens, num_tokens // 128)
        assert asyncio.run(backend.count_tokens(parsed.request)) == num_tokens


def test_a_tokenizer_that_cannot_be_read_is_an_error_in_the_configuration(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"engine\.tokenizer: .*tokenizer\.json cannot be read"):
        EchoBackend(Options(tokenizer=str(file)))
