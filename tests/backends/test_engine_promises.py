"""Promises of prompt caching over a real engine: kept for their lifetime, within the quota, and never claimed when broken."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("torch")

from anaphora.accounting import Asked
from anaphora.answer import Live
from anaphora.backends.engine import Engine
from anaphora.build import build
from anaphora.config import CacheConfig, Config, EngineConfig
from anaphora.gateway import Gateway
from anaphora.types import Tenant, Usage
from anaphora.wire.anthropic import Anthropic

WORDS = ("fox", "dog", "wood", "cache", "number", "question", "answer", "keeps", "brown", "lazy")


class Desk:
    """A gateway over an engine whose cache holds some 2,000 tokens, half of them for promises to one tenant."""

    def __init__(self, runner: asyncio.Runner, gateway: Gateway) -> None:
        self.runner, self.gateway = runner, gateway
        self.reason: str | None = None
        self._num_asked = 0

    def ask(self, word: str, *, mark: bool = True, tenant: str = "us") -> Usage:
        """About a text of some 600 tokens, marked or not."""
        text = {"type": "text", "text": f"{word} " * 600, **({"cache_control": {"type": "ephemeral"}} if mark else {})}
        body = {"model": "tiny", "max_tokens": 1, "system": [text], "messages": [{"role": "user", "content": "So?"}]}
        return self.runner.run(self._ask(msgspec.json.encode(body), Tenant(tenant)))

    async def _ask(self, body: bytes, tenant: Tenant) -> Usage:
        parsed = Anthropic().parse(body, tenant=tenant)
        self._num_asked += 1
        asked = Asked(lambda: parsed.prompt, f"msg_{self._num_asked}")
        answer = await self.gateway.complete(parsed.request, asked=asked)
        assert isinstance(answer, Live)
        try:
            completion = await answer.whole()
        finally:
            answer.leave()
        assert completion is not None
        assert answer.bill is not None
        self.reason = None if answer.bill.charge.miss is None else answer.bill.charge.miss.reason
        return completion.usage

    def press(self) -> None:
        """Have another tenant fill the cache."""
        for word in WORDS:
            self.ask(word, mark=False, tenant="others")

    def stats(self) -> dict[str, int]:
        return self.runner.run(self.gateway.stats())


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def down() -> asyncio.Event:
    """Set when the engine is not ready any more."""
    return asyncio.Event()


@pytest.fixture(scope="module")
def gateway(
    runner: asyncio.Runner, down: asyncio.Event, endless: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    engine = EngineConfig(
        model=str(endless),
        served_name="tiny",
        dtype="float32",
        device="cpu",
        kv_memory=2 << 20,
        kv_disk=0,  # what was evicted, or the process took with it, does not come back
        pin_quota=0.5,
        threads=1,
    )
    cache = CacheConfig(enabled=False, dir=str(tmp_path_factory.mktemp("cache")))
    gateway = build(Config(engine=engine, cache=cache), on_status=lambda status: None if status.ready else down.set())
    runner.run(gateway.start())
    yield gateway
    runner.run(gateway.aclose())


@pytest.fixture
def desk(runner: asyncio.Runner, gateway: Gateway) -> Desk:
    return Desk(runner, gateway)


def claimed(usage: Usage) -> tuple[int, int]:
    """Read, written."""
    return usage.cache_read_input_tokens, usage.cache_creation_input_tokens


def test_a_promise_is_kept_while_others_fill_the_cache(desk: Desk) -> None:
    written = claimed(desk.ask("fox"))
    assert written[0] == 0
    assert written[1] > 512
    desk.ask("brown", mark=False)
    desk.press()
    again = desk.ask("fox")
    assert claimed(again) == (written[1], 0)
    assert again.kv_reused_tokens > written[1] - 16
    assert desk.ask("brown", mark=False).kv_reused_tokens < 512  # that nobody had promised
    assert desk.stats()["kv_pins"] > 0


def test_beyond_the_quota_the_oldest_promise_is_dropped_and_its_reader_is_told_the_truth(desk: Desk) -> None:
    dropped = desk.stats()["kv_pins_dropped"]
    written = claimed(desk.ask("dog"))
    assert desk.ask("wood").cache_read_input_tokens == 0
    assert desk.stats()["kv_pins_dropped"] > dropped
    desk.press()
    assert desk.ask("wood").cache_read_input_tokens > 512
    assert claimed(desk.ask("dog")) == written
    assert desk.reason == "recomputed"
    assert claimed(desk.ask("dog")) == (written[1], 0)


def test_what_a_killed_engine_had_promised_is_written_again(desk: Desk, gateway: Gateway, down: asyncio.Event) -> None:
    written = claimed(desk.ask("lazy"))
    assert claimed(desk.ask("lazy")) == (written[1], 0)
    engine = gateway._backend
    assert isinstance(engine, Engine)
    assert engine.supervisor.pid is not None
    down.clear()
    os.kill(engine.supervisor.pid, signal.SIGKILL)
    desk.runner.run(asyncio.wait_for(down.wait(), 60))
    assert claimed(desk.ask("lazy")) == written  # waits for the new engine
    assert desk.reason == "recomputed"
    assert claimed(desk.ask("lazy")) == (written[1], 0)
