"""The ledger in front of providers: their own usage is what is written down, in every dialect and both forms of an answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import anthropic
import pytest
from tests.ledger.entries import rows_of
from tests.server.gateways import CLAUDE, GPT, Gateway, gateway, upstream

from anaphora.ledger.entry import Entry, usd
from anaphora.testing.upstream import Upstream

LONG = "word " * 3000
_numbers = itertools.count()


@pytest.fixture(scope="module")
def providers() -> Iterator[tuple[Upstream, Upstream]]:
    with Upstream("anthropic") as one, Upstream("openai") as other:
        yield one, other


class Kept:
    """A gateway, and what its ledger holds when it has ended."""

    def __init__(self, providers: tuple[Upstream, Upstream], folder: Path) -> None:
        one, other = providers
        self._toml = upstream("claude", one, "claude-*") + upstream("gpt", other, "gpt-*")
        self._folder = folder

    def entries(self, ask: Callable[[Gateway], None]) -> list[Entry]:
        with gateway(self._toml, self._folder) as served:
            ask(served)
        return rows_of(self._folder / "cache" / "ledger.db")


@pytest.fixture
def kept(providers: tuple[Upstream, Upstream], tmp_path: Path) -> Kept:
    return Kept(providers, tmp_path)


def fresh() -> str:
    return f"question {next(_numbers)}"


def test_messages_are_charged_as_the_provider_counts_them_whoever_answers(kept: Kept) -> None:
    told: list[tuple[int, int]] = []

    def ask(served: Gateway) -> None:
        system: Any = [{"type": "text", "text": LONG + fresh(), "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
        with served.claude() as client:
            for model, stream in itertools.product((CLAUDE, GPT), (False, True)):
                say: Any = [{"role": "user", "content": fresh()}]
                asked: Any = {"model": model, "max_tokens": 50, "system": system if model == CLAUDE else LONG, "messages": say}
                if stream:
                    with client.messages.stream(**asked) as streaming:
                        message = streaming.get_final_message()
                else:
                    message = client.messages.create(**asked)
                usage = message.usage
                prompt = usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
                told.append((prompt, usage.output_tokens))

    entries = kept.entries(ask)
    assert [(entry.prompt, entry.output) for entry in entries] == told
    assert [entry.upstream for entry in entries] == ["claude", "claude", "gpt", "gpt"]
    wrote, read = entries[:2]
    assert wrote.write_1h > 3000
    assert read.cache_read == wrote.write_1h
    assert all(entry.priced and entry.paid and entry.first_us for entry in entries)
    assert usd(read.paid) == (read.input * 2 + read.cache_read * Decimal("0.2") + read.output * 10) / 10**6
    assert usd(read.paid + read.saved_prompts) == Decimal(read.prompt * 2 + read.output * 10) / 10**6


@pytest.mark.parametrize("model", [GPT, CLAUDE])
def test_chat_and_responses_are_charged_as_the_provider_counts_them(kept: Kept, model: str) -> None:
    """Also streams whose client did not ask for the usage."""
    told: list[tuple[int, int]] = []

    def ask(served: Gateway) -> None:
        say: Any = [{"role": "user", "content": LONG + fresh()}]
        with served.gpt() as client:
            whole = client.chat.completions.create(model=model, messages=say)
            assert whole.usage is not None
            told.append((whole.usage.prompt_tokens, whole.usage.completion_tokens))
            with client.chat.completions.create(model=model, messages=[*say, *say], stream=True) as stream:
                assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
            answer = client.responses.create(model=model, input=fresh())
            assert answer.usage is not None
            told.append((answer.usage.input_tokens, answer.usage.output_tokens))

    whole, streamed, response = kept.entries(ask)
    assert [(entry.prompt, entry.output) for entry in (whole, response)] == told
    assert streamed.prompt > whole.prompt
    assert streamed.output > 0
    assert streamed.estimated == 0
    assert all(entry.priced and entry.paid for entry in (whole, streamed, response))


def test_what_is_remembered_of_a_provider_saves_what_that_provider_charged(kept: Kept) -> None:
    question = fresh()

    def ask(served: Gateway) -> None:
        with served.claude() as client:
            for _ in range(3):
                client.messages.create(model=CLAUDE, max_tokens=20, messages=[{"role": "user", "content": question}])

    first, *again = kept.entries(ask)
    assert {(entry.level, entry.upstream, entry.paid, entry.saved_answers) for entry in again} == {
        ("exact", "claude", 0, first.paid)
    }


def test_a_failure_is_a_row_and_costs_nothing(kept: Kept, providers: tuple[Upstream, Upstream]) -> None:
    providers[0].fault("529")

    def ask(served: Gateway) -> None:
        with served.claude() as client, pytest.raises(anthropic.APIStatusError):
            client.messages.create(model=CLAUDE, max_tokens=20, messages=[{"role": "user", "content": fresh()}])

    (entry,) = kept.entries(ask)
    assert (entry.outcome, entry.paid, entry.tokens) == ("failed", 0, 0)


def test_a_stream_that_is_cut_is_charged_as_far_as_it_came(kept: Kept, providers: tuple[Upstream, Upstream]) -> None:
    providers[0].fault("cut", after_events=5)

    def ask(served: Gateway) -> None:
        asked: Any = {"model": CLAUDE, "max_tokens": 50, "messages": [{"role": "user", "content": LONG + fresh()}]}
        with served.claude() as client, pytest.raises(anthropic.APIError), client.messages.stream(**asked) as stream:
            stream.get_final_message()

    (entry,) = kept.entries(ask)
    assert (entry.outcome, entry.estimated) == ("failed", 1)
    assert entry.prompt > 3000
    assert entry.paid > 0
