"""The plug-in as a user's tests have it, with both SDKs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from anaphora.testing.plugin import Emulator, anaphora_emulator, assert_cached

emulator = anaphora_emulator
RULES = " ".join(["rule"] * 2000)


@pytest.fixture
def claude(emulator: Emulator) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=emulator.anthropic_base_url, api_key=emulator.new_key(), max_retries=0) as client:
        yield client


def ask(claude: anthropic.Anthropic, question: str) -> Any:
    return claude.messages.create(
        model="claude-sonnet-5",
        max_tokens=5,
        system=[{"type": "text", "text": RULES, "cache_control": {"type": "ephemeral"}}],
        messages=[{"role": "user", "content": question}],
    )


def test_a_second_question_is_cached_until_the_lifetime_is_over(emulator: Emulator, claude: anthropic.Anthropic) -> None:
    with pytest.raises(AssertionError, match="0 of 2001 prompt tokens"):
        assert_cached(ask(claude, "one"))
    assert_cached(ask(claude, "two"), min_tokens=2000)
    with pytest.raises(AssertionError, match="fewer than 2001"):
        assert_cached(ask(claude, "three"), min_tokens=2001)
    emulator.advance(301)
    with pytest.raises(AssertionError):
        assert_cached(ask(claude, "four"))


def test_both_apis_of_openai(emulator: Emulator) -> None:
    with openai.OpenAI(base_url=emulator.openai_base_url, api_key=emulator.new_key(), max_retries=0) as gpt:
        gpt.chat.completions.create(model="gpt-5.6-sol", messages=[{"role": "user", "content": RULES}])
        chat = gpt.chat.completions.create(model="gpt-5.6-sol", messages=[{"role": "user", "content": RULES}])
        assert_cached(chat, min_tokens=2000)
        assert_cached(gpt.responses.create(model="gpt-5.6-sol", input=RULES), min_tokens=2000)


def test_what_has_no_usage_is_an_error() -> None:
    with pytest.raises(TypeError, match="int carries no usage"):
        assert_cached(3)


def test_time_does_not_go_back(emulator: Emulator) -> None:
    with pytest.raises(ValueError, match="does not go back"):
        emulator.advance(-1)
