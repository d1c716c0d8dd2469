"""The official SDKs send what the optimiser made of their requests, and the emulator charges what the books foretell."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest
from tests.optimiser.traffic import ON, Json, body, says, text, user

from anaphora.backends.echo_lengths import Counter
from anaphora.clock import ManualClock
from anaphora.optimiser import History, apply, plan
from anaphora.profiles import find
from anaphora.promises import Books
from anaphora.testing.plugin import Emulator
from anaphora.types import LOCAL_TENANT
from anaphora.wire.anthropic_prompt import read_prompt
from anaphora.wire.openai_prompt import read_chat, read_responses

READERS = {"messages": read_prompt, "chat": read_chat, "responses": read_responses}


def words(count: int, word: str) -> str:
    """A text of exactly so many tokens of the emulator."""
    return " ".join([word] * count)


Wired = Callable[..., "Wire"]


@pytest.fixture
def wired(anaphora_emulator: Emulator) -> Iterator[Wired]:
    """`wired("chat")`: a client of the emulator, as somebody who has no cache yet."""
    with contextlib.ExitStack() as clients:

        def make(api: str) -> Wire:
            key, base = anaphora_emulator.new_key(), anaphora_emulator
            one = clients.enter_context(anthropic.Anthropic(base_url=base.anthropic_base_url, api_key=key, max_retries=0))
            other = clients.enter_context(openai.OpenAI(base_url=base.openai_base_url, api_key=key, max_retries=0))
            return Wire(anaphora_emulator, api, one, other)

        yield make


class Wire:
    """One client, with the optimiser in between and books beside it."""

    def __init__(self, emulator: Emulator, api: str, anthropic: anthropic.Anthropic, openai: openai.OpenAI) -> None:
        self.emulator, self.api, self.anthropic, self.openai = emulator, api, anthropic, openai
        self.profile = find("claude-opus-5", "anthropic") if api == "messages" else find("gpt-5.6-sol", "openai")
        self.history, self.books, self.counter, self.now_s = History(), Books(ManualClock()), Counter(), 0.0

    def ask(self, request: Json, after_s: float) -> tuple[tuple[int, int], tuple[int, int]]:
        """Tokens read and written: by the emulator, and by our books."""
        self.emulator.advance(after_s)
        self.now_s += after_s
        prompt = READERS[self.api](request)
        lengths = self.counter.lengths(prompt)
        known = self.history.know(prompt, self.profile, self.now_s)
        found = plan(prompt, lengths, self.profile, self.history, self.now_s, ON, known)
        self.history.learn(prompt, lengths, self.profile, known, self.now_s, found)
        sent = apply(request, found)
        charge = self.books.charge(LOCAL_TENANT, READERS[self.api](sent), self.profile, lengths, self.now_s)
        self.books.visible(charge, self.now_s)
        return self._send(sent), (charge.usage.read, sum(charge.usage.written.values()))

    def _send(self, sent: Any) -> tuple[int, int]:
        if self.api == "messages":
            usage = self.anthropic.messages.create(**sent).usage
            return usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
        if self.api == "chat":
            details = self.openai.chat.completions.create(**sent).usage.prompt_tokens_details
            return details.cached_tokens or 0, details.cache_write_tokens or 0
        more = self.openai.responses.create(**sent).usage.input_tokens_details
        return more.cached_tokens, more.cache_write_tokens


SYSTEM = words(1500, "rule")


def conversation(api: str, number: int, turns: int, *, question: str = "") -> Json:
    said: list[Json] = [user(text(words(300, f"ask{number}")))]
    for turn in range(turns):
        said += [says(text(words(40, f"say{number}x{turn}"))), user(text(words(60, question or f"more{number}x{turn}")))]
    if api == "messages":
        return body(*said, system=SYSTEM)
    for one in said:
        one["content"] = one["content"][0]["text"]
    if api == "chat":
        return {"model": "gpt-5.6-sol", "messages": [{"role": "system", "content": SYSTEM}, *said], "max_completion_tokens": 4}
    return {"model": "gpt-5.6-sol", "input": [{"role": "developer", "content": SYSTEM}, *said], "max_output_tokens": 16}


@pytest.mark.parametrize("api", ["messages", "chat", "responses"])
def test_a_conversation_is_charged_as_foretold_and_reads_what_it_wrote(wired: Wired, api: str) -> None:
    wire = wired(api)
    read = []
    for turn in range(4):
        charged, foretold = wire.ask(conversation(api, 1, turn), after_s=30.0)
        assert charged == foretold
        read.append(charged[0])
    assert read[-1] == 1500 + 300 + 2 * 100


@pytest.mark.parametrize("api", ["messages", "chat", "responses"])
def test_one_shot_questions_only_ever_pay_for_the_system_prompt_once(wired: Wired, api: str) -> None:
    wire = wired(api)
    for number in range(12):
        charged, foretold = wire.ask(conversation(api, number, 0), after_s=60.0)
        assert charged == foretold
    assert charged == (1500, 0)


def test_a_wide_turn_reads_what_the_turn_before_wrote(wired: Wired) -> None:
    wire = wired("messages")
    first = conversation("messages", 1, 1)
    wire.ask(first, after_s=10.0)
    wide = user(*(text(words(20, f"part{number}")) for number in range(40)))
    messages = [*first["messages"], says("so"), wide]
    charged, foretold = wire.ask({**first, "messages": messages}, after_s=10.0)
    assert charged == foretold
    assert charged[0] == 1500 + 300 + 40 + 60
