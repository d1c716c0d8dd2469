"""Accounting between a gateway and the books: whose usage an answer carries, and when what it wrote can be read."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from anaphora.accounting import Accounting, Asked
from anaphora.answer import Live
from anaphora.backends import echo_lengths
from anaphora.backends.base import Measuring
from anaphora.backends.echo import EchoBackend, Gate, Options, fail_at
from anaphora.build import build
from anaphora.catalogue import Catalogue
from anaphora.clock import ManualClock
from anaphora.config import CacheConfig, Config, EngineConfig
from anaphora.errors import BackendFailed, ConfigError, InvalidRequest
from anaphora.forgets import Forgets
from anaphora.gateway import Gateway
from anaphora.memory import Memory
from anaphora.promises import Books
from anaphora.prompt import Block, Prompt
from anaphora.types import Begin, Delta, Keep, Request, Scope, Tenant, Usage
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.openai_chat import OpenAIChat

WIRE = Anthropic()


def body(rules: int = 1000, question: int = 50) -> bytes:
    system = [{"type": "text", "text": " ".join(["rule"] * rules), "cache_control": {"type": "ephemeral"}}]
    messages = [{"role": "user", "content": " ".join(["word"] * question)}]
    return msgspec.json.encode({"model": "claude-opus-5", "max_tokens": 2, "system": system, "messages": messages})


class Reusing(EchoBackend):
    """Says that it reused so many tokens."""

    reused = 0

    async def run(self, request: Request) -> AsyncIterator[Delta]:
        async for delta in super().run(request):
            if isinstance(delta, Begin):
                yield Begin(delta.model, Usage(input_tokens=delta.usage.input_tokens, kv_reused_tokens=self.reused))
            else:
                yield delta


class Bench:
    def __init__(self, *, gate: Gate | None = None, block_size: int | None = None, forgets: Forgets | None = None) -> None:
        self.clock = ManualClock(0.0)
        self.backend = Reusing(Options(emulates=True), gate=gate, clock=self.clock)
        self.books = Books(self.clock)
        accounting = Accounting(self.backend, self.books, block_size=block_size)
        catalogue = Catalogue(self.backend, further=self.backend.model)
        memory = Memory([], fingerprint=catalogue.fingerprint)
        self.gateway = Gateway(self.backend, memory, catalogue, accounting=accounting, forgets=forgets, clock=self.clock)

    async def begin(self, raw: bytes | None = None) -> Live:
        parsed = WIRE.parse(raw or body(), tenant=Tenant("alice"))
        answer = await self.gateway.complete(parsed.request, asked=Asked(lambda: parsed.prompt, "msg_1"))
        assert isinstance(answer, Live)
        return answer

    async def ask(self, raw: bytes | None = None) -> Usage:
        return await usage(await self.begin(raw))


async def usage(answer: Live) -> Usage:
    try:
        completion = await answer.whole()
    finally:
        answer.leave()
    assert completion is not None
    return completion.usage


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(main())


def written(tokens: int) -> Usage:
    return Usage(50, 2, 0, tokens, {"5m": tokens} if tokens else {})


def test_what_a_client_wants_kept_is_kept_beside_what_is_promised() -> None:
    async def test() -> None:
        bench = Bench()
        parsed = WIRE.parse(body(), tenant=Tenant("alice"))
        wish = Keep(1 << 40, 60.0)
        request = msgspec.structs.replace(parsed.request, keep=(wish,))
        answer = await bench.gateway.complete(request, asked=Asked(lambda: parsed.prompt, "msg_1"))
        assert isinstance(answer, Live)
        assert answer.bill is not None
        assert answer.bill.charge.keep
        assert answer.bill.keeping(request).keep == (wish, *answer.bill.charge.keep)
        await usage(answer)

    run(test)


def test_the_answers_usage_is_that_of_the_rules() -> None:
    async def test() -> None:
        bench = Bench()
        assert await bench.ask() == written(1000)
        assert await bench.ask() == Usage(50, 2, 1000)

    run(test)


def test_v16_two_that_write_at_once_both_pay_and_the_first_makes_it_readable() -> None:
    async def test() -> None:
        opened = asyncio.Event()

        async def gate(index: int) -> None:
            if index == 0:
                await opened.wait()

        bench = Bench(gate=gate)
        one = await bench.begin()
        bench.clock.advance(1)
        two = await bench.begin()
        bench.clock.advance(1)
        opened.set()
        assert [await usage(one), await usage(two)] == [written(1000)] * 2
        bench.clock.advance(0.5)
        assert await bench.ask() == Usage(50, 2, 1000)

    run(test)


def test_what_fails_before_it_begins_leaves_no_promise() -> None:
    async def test() -> None:
        bench = Bench(gate=fail_at(0))
        with pytest.raises(BackendFailed):
            await bench.ask()
        bench.backend.gate = None
        assert await bench.ask() == written(1000)

    run(test)


def test_a_client_that_leaves_before_the_answer_begins_leaves_no_promise() -> None:
    async def test() -> None:
        bench = Bench()
        (await bench.begin()).leave()
        assert await bench.ask() == written(1000)

    run(test)


def test_a_read_that_the_engine_had_to_compute_again_is_a_write() -> None:
    async def test() -> None:
        bench = Bench(block_size=16)
        await bench.ask()
        assert await bench.ask() == written(1000)
        bench.backend.reused = 992
        kept = await bench.ask()  # whole blocks of 16
        assert (kept.input_tokens, kept.cache_read_input_tokens) == (50, 1000)

    run(test)


def test_forgetting_in_another_process_forgets_the_promises_here(tmp_path: Path) -> None:
    async def test() -> None:
        here, there = (Bench(forgets=Forgets(tmp_path / "forgets")) for _ in range(2))
        assert [await here.ask(), await here.ask()] == [written(1000), Usage(50, 2, 1000)]
        await there.gateway.forget(Scope(tenant=Tenant("alice")))
        assert await here.ask() == written(1000)
        under_way = await here.begin(body(rules=2000))  # it has its bill, and has not begun to answer
        await there.gateway.forget(Scope(tenant=Tenant("alice")))
        assert await usage(under_way) == written(2000)
        assert await here.ask(body(rules=2000)) == written(2000)

    run(test)


def test_forgetting_a_tenant_forgets_its_promises() -> None:
    async def test() -> None:
        bench = Bench()
        await bench.ask()
        assert (await bench.gateway.forget(Scope(tenant=Tenant("bob")))).promises == 0
        assert (await bench.gateway.forget(Scope(tenant=Tenant("alice")))).promises == 1
        assert await bench.ask() == written(1000)

    run(test)


def test_a_field_that_the_model_does_not_have_is_refused_before_anything_is_computed() -> None:
    async def test() -> None:
        bench = Bench()
        raw = {"model": "gpt-4.1", "messages": [{"role": "user", "content": "x"}], "prompt_cache_options": {"mode": "explicit"}}
        parsed = OpenAIChat().parse(msgspec.json.encode(raw), tenant=Tenant("alice"))
        with pytest.raises(InvalidRequest) as error:
            await bench.gateway.complete(parsed.request, asked=Asked(lambda: parsed.prompt, "chatcmpl-1"))
        assert error.value.param == "prompt_cache_options"
        assert bench.backend.runs == 0

    run(test)


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        ("mistral-large", "engine.profile: no caching profile"),
        ("gpt5.6-sol", "Did you mean 'gpt-5.6-sol'?"),
        (("claude-opus-5", "claude-haiku-4-5"), "these are of the same: claude-opus-5, claude-haiku-4-5"),
    ],
)
def test_a_profile_that_nobody_knows_is_an_error_in_the_configuration(profile: str | tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        build(Config(engine=EngineConfig(kind="echo", profile=profile), cache=CacheConfig(enabled=False)))


@pytest.mark.parametrize(("profile", "written"), [("", 600), ("claude-opus-5-5", 600), (("claude-haiku-4-5", "gpt-4.1"), 0)])
def test_a_local_model_behaves_as_the_profile_says(profile: str | tuple[str, ...], written: int) -> None:
    async def test() -> None:
        gateway = build(Config(engine=EngineConfig(kind="echo", profile=profile), cache=CacheConfig(enabled=False)))
        raw = {**msgspec.json.decode(body(600)), "model": "echo"}
        parsed = WIRE.parse(msgspec.json.encode(raw), tenant=Tenant("alice"))
        answer = await gateway.complete(parsed.request, asked=Asked(lambda: parsed.prompt, "msg_1"))
        assert isinstance(answer, Live)
        assert (await usage(answer)).cache_creation_input_tokens == written

    run(test)


# -- the emulator's count ----------------------------------------------------------------------------------------------


def test_the_echo_engine_measures() -> None:
    assert isinstance(EchoBackend(), Measuring)


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("a word", 2), ("  a\n\nword  ", 3), ("seventy-seven", 3), ("internationally", 3), ("a (b).", 4)],
)
def test_a_token_is_a_short_piece_with_the_space_before_it(text: str, count: int) -> None:
    tokens = echo_lengths.tokens(text)
    assert "".join(tokens) == text
    assert len(tokens) == count


def measured(*contents: object) -> tuple[tuple[int, ...], int]:
    blocks = tuple(Block("messages", "text", msgspec.json.encode(content), "m", "user") for content in contents)
    found = echo_lengths.Counter().lengths(Prompt(dialect="anthropic", model="m", blocks=blocks))
    return found.ends, found.total


def test_blocks_add_up_and_pictures_have_a_size_of_their_own() -> None:
    picture = ["user", {"type": "image", "source": {"sha256": "0" * 64}}]
    assert measured(["user", {"text": "one two", "type": "text"}], picture, ["user", {"text": "", "type": "text"}]) == (
        (2, 1602, 1602),
        1602,
    )
    assert measured() == ((), 1)


def test_the_same_words_in_another_role_are_another_prompt() -> None:
    content = msgspec.json.encode(["x", {"text": " ".join(["word"] * 256), "type": "text"}])
    prompts = [
        Prompt(dialect="openai", model="m", blocks=(Block("messages", "text", content, "m", role),))
        for role in ("user", "system")
    ]
    one, two = (echo_lengths.Counter().lengths(prompt).steps for prompt in prompts)
    assert len(one) == len(two) == 2
    assert set(one).isdisjoint(two)


def test_a_model_of_ones_own_keeps_its_sampling_whatever_it_is_accounted_for_like() -> None:
    async def test() -> None:
        bench = Bench()
        sampled = msgspec.json.encode({**msgspec.json.decode(body()), "temperature": 0.5})
        assert await bench.ask(sampled) == written(1000)

    run(test)
