"""Time is real: a cold prompt is slow, a cached one is not, and tokens come one after the other."""

from __future__ import annotations

import time
from typing import Any

import anthropic
import openai
import pytest

from anaphora.testing.upstream import Record, Upstream
from anaphora.testing.upstream.backend import Pace

RULES = " ".join(["rule"] * 4000)
OTHER_RULES = " ".join(["other"] * 4000)


def first_s(request: Record) -> float:
    assert request.first_s is not None
    return request.first_s


def test_the_formula() -> None:
    pace = Pace(0.5, prefill_tokens_per_s=1000, decode_tokens_per_s=10)
    assert pace.first_s(2000) == 2.5
    assert (pace.decode_s(1), pace.decode_s(11)) == (0, 1)
    assert (Pace().first_s(10**6), Pace().decode_s(10**6)) == (0, 0)


def test_a_cached_prompt_is_answered_sooner_by_what_was_read() -> None:
    with Upstream(prefill_tokens_per_s=4000) as upstream:
        system: Any = [{"type": "text", "text": RULES, "cache_control": {"type": "ephemeral"}}]
        with anthropic.Anthropic(base_url=upstream.url, api_key="a", max_retries=0) as claude:
            answers = [
                claude.messages.create(
                    model="claude-opus-5", max_tokens=5, system=system, messages=[{"role": "user", "content": question}]
                )
                for question in ("one", "two")
            ]
        assert [answer.usage.cache_read_input_tokens for answer in answers] == [0, 4000]
        cold, warm = map(first_s, upstream.requests())
        assert cold >= 1.0
        assert warm < 0.5


def test_openai_reads_without_marks_and_is_sooner_too() -> None:
    with (
        Upstream(prefill_tokens_per_s=4000) as upstream,
        openai.OpenAI(base_url=upstream.openai_base_url, api_key="a", max_retries=0) as gpt,
    ):
        for question in ("one", "two"):
            gpt.chat.completions.create(
                model="gpt-4.1", messages=[{"role": "system", "content": RULES}, {"role": "user", "content": question}]
            )
        cold, warm = map(first_s, upstream.requests())
        assert cold >= 1.0
        assert warm < 0.5


def test_each_token_is_an_event_of_its_own_time() -> None:
    with (
        Upstream(base_latency_s=0.2, decode_tokens_per_s=20) as upstream,
        openai.OpenAI(base_url=upstream.openai_base_url, api_key="a", max_retries=0) as gpt,
    ):
        body: Any = {"model": "gpt-4.1", "messages": [{"role": "user", "content": "one two three four five"}]}
        chunks = gpt.chat.completions.create(**body, stream=True)
        arrived = [(chunk.choices[0].delta.content, time.monotonic()) for chunk in chunks]
        arrived = [(text, at_s) for text, at_s in arrived if text]
        assert [text for text, _ in arrived] == ["one ", "two ", "three ", "four ", "five"]
        assert arrived[-1][1] - arrived[0][1] >= 0.15
        gpt.chat.completions.create(**body)
        streamed, whole = upstream.requests()
        assert 0.2 <= first_s(streamed) < 0.4 <= (streamed.over_s or 0)
        assert first_s(whole) >= 0.4


def test_a_client_that_leaves_ends_the_computation() -> None:
    with Upstream(decode_tokens_per_s=5) as upstream:
        upstream.answer(num_tokens=1000)
        with anthropic.Anthropic(base_url=upstream.url, api_key="a", max_retries=0) as claude:
            with claude.messages.stream(
                model="claude-opus-5", max_tokens=1000, messages=[{"role": "user", "content": "go on"}]
            ) as stream:
                next(iter(stream.text_stream))
            [request] = upstream.requests()
    assert request.outcome == "left"
    assert request.left_s is not None
    assert request.over_s is not None
    assert request.num_events < 100


@pytest.mark.parametrize(("kv_tokens", "read"), [(0, 4000), (9000, 4000), (6000, 0)])
def test_what_does_not_fit_its_memory_is_not_read(kv_tokens: int, read: int) -> None:
    with (
        Upstream(kv_tokens=kv_tokens, virtual_clock=True) as upstream,
        anthropic.Anthropic(base_url=upstream.url, api_key="a", max_retries=0) as claude,
    ):

        def ask(rules: str) -> int:
            system: Any = [{"type": "text", "text": rules, "cache_control": {"type": "ephemeral"}}]
            message: Any = {"role": "user", "content": "What now?"}
            usage = claude.messages.create(model="claude-opus-5", max_tokens=5, system=system, messages=[message]).usage
            return usage.cache_read_input_tokens or 0

        ask(RULES)
        assert ask(RULES) == 4000
        ask(OTHER_RULES)
        assert ask(RULES) == read


def test_lifetimes_follow_the_virtual_clock() -> None:
    with (
        Upstream(virtual_clock=True) as upstream,
        anthropic.Anthropic(base_url=upstream.url, api_key="a", max_retries=0) as claude,
    ):

        def read() -> int:
            system: Any = [{"type": "text", "text": RULES, "cache_control": {"type": "ephemeral"}}]
            message: Any = {"role": "user", "content": "What now?"}
            usage = claude.messages.create(model="claude-opus-5", max_tokens=5, system=system, messages=[message]).usage
            return usage.cache_read_input_tokens or 0

        assert (read(), read()) == (0, 4000)
        upstream.advance(301)
        assert read() == 0
