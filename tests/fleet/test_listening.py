"""Replicas that say what their caches hold, as vLLM does, and a gateway that knows texts: real sockets, a real `/tokenize`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from tests.server.gateways import gateway, upstream

from anaphora.backends.upstream import Upstream as Asked
from anaphora.backends.upstream import UpstreamOptions
from anaphora.clock import SystemClock
from anaphora.config import GatewayConfig, UpstreamConfig, check_upstream
from anaphora.errors import ConfigError
from anaphora.fleet import Fleet
from anaphora.routing.base import BlocksCleared, BlocksRemoved, BlocksStored, CacheEvent, Choice
from anaphora.routing.expected import Expected
from anaphora.routing.questions import of_request
from anaphora.testing.upstream import Match, Upstream
from anaphora.testing.upstream.tokens import prompt_of, tokens
from anaphora.types import LOCAL_TENANT, End, MediaPart, Message, Native, Part, Request, TextPart
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import encode
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.openai_completions import OpenAICompletions
from anaphora.wire.openai_responses import OpenAIResponses
from anaphora.wire.upstream import UpstreamDialect
from anaphora.wire.upstream_chat import UpstreamChat
from anaphora.wire.upstream_completions import UpstreamCompletions

zmq = pytest.importorskip("zmq")

MODEL = "gpt-5.6-sol"
BLOCK = 16
TEXT = "Of what was said before, this is the part that comes again. " * 200


class Publisher:
    """The cache of a replica as vLLM tells of it."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)  # as PUB, and it tells who subscribes
        self._socket.bind("tcp://127.0.0.1:0")
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._number = 0

    def heard(self) -> bytes:
        """Returns when somebody has subscribed (1) or has left (0)."""
        assert self._socket.poll(30_000)
        said: bytes = self._socket.recv()
        return said

    def publish(self, *events: dict[str, Any]) -> None:
        payload = msgspec.msgpack.encode([1.5, list(events), 0])
        self._socket.send_multipart((b"", self._number.to_bytes(8, "big"), payload))
        self._number += 1

    def restart(self) -> None:
        self._number = 0

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


def stored(ids: Sequence[int], first: int = 0) -> dict[str, Any]:
    """The whole blocks of a prompt, from the `first` on."""
    last = len(ids) // BLOCK
    parent = names(ids, first)[-1] if first else None
    part = list(ids[first * BLOCK : last * BLOCK])
    event = {"block_hashes": names(ids, last)[first:], "parent_block_hash": parent, "token_ids": part, "block_size": BLOCK}
    return {"type": "BlockStored", **event, "lora_id": None, "medium": "GPU", "lora_name": None}


def removed(ids: Sequence[int], first: int = 0) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": names(ids, len(ids) // BLOCK)[first:], "medium": "GPU"}


CLEARED = {"type": "AllBlocksCleared"}


def names(ids: Sequence[int], end: int) -> list[bytes]:
    """What the replica calls its blocks."""
    return [str(hash(tuple(ids[: (number + 1) * BLOCK]))).encode() for number in range(end)]


class Listened(Expected):
    """Tells what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: asyncio.Queue[tuple[str, CacheEvent]] = asyncio.Queue()

    def events(self, replica: str, events: Sequence[CacheEvent], now_s: float) -> None:
        super().events(replica, events, now_s)
        for event in events:
            self.told.put_nowait((replica, event))


class Watched(Asked):
    """Tells when it was asked for tokens."""

    def __init__(self, one: UpstreamConfig) -> None:
        super().__init__(UpstreamOptions(one.name, one.base_url, models=one.models), {"openai_chat": UpstreamChat()})
        self.tokenized: asyncio.Queue[list[int] | Exception] = asyncio.Queue()
        self.num_at_once = self.most_at_once = 0

    async def tokenize(self, request: Request) -> list[int]:
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        try:
            found = await super().tokenize(request)
        except Exception as error:
            self.tokenized.put_nowait(error)
            raise
        finally:
            self.num_at_once -= 1
        self.tokenized.put_nowait(found)
        return found


class Stage:
    def __init__(self, fleet: Fleet, strategy: Listened, made: dict[str, Watched]) -> None:
        self.fleet = fleet
        self.strategy = strategy
        self.made = made

    async def ask(self, asking: Request) -> None:
        bursts = [burst async for burst in self.fleet.bursts(asking)]
        assert isinstance(bursts[-1][-1], End)

    def choice(self, asking: Request, name: str) -> Choice:
        routed = [replica for replica in self.fleet._router.replicas if replica.name == name]
        choice = self.strategy.pick(of_request(asking), routed, SystemClock().monotonic_s())
        assert choice is not None
        return choice

    async def told(self) -> tuple[str, CacheEvent]:
        async with asyncio.timeout(30):
            return await self.strategy.told.get()


@pytest.fixture
def provider() -> Iterator[Upstream]:
    with Upstream("vllm") as one:
        yield one


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher()
    yield publisher
    publisher.close()


@asynccontextmanager
async def stage(provider: Upstream, publisher: Publisher, *, draining: str = "silent") -> AsyncIterator[Stage]:
    """Two replicas, of whom one speaks; the other is not asked."""
    configs = tuple(
        UpstreamConfig(name=name, base_url=provider.url, models=(MODEL,), pool="vllm", kv_events=address)
        for name, address in (("speaks", publisher.address), ("silent", ""))
    )
    strategy, made = Listened(), {}

    def make(one: UpstreamConfig) -> Watched:
        made[one.name] = Watched(one)
        return made[one.name]

    fleet = Fleet(GatewayConfig(upstreams=configs), make, strategy)
    await fleet.start()
    try:
        assert await asyncio.to_thread(publisher.heard) == b"\x01"
        fleet.drain(draining)
        yield Stage(fleet, strategy, made)
    finally:
        await fleet.aclose()


def request(text: str = TEXT, *parts: Part) -> Request:
    return Request(model=MODEL, messages=(Message("user", (TextPart(text), *parts)),), max_tokens=5)


def tokens_of(text: str = TEXT) -> list[int]:
    body = {"messages": [{"role": "user", "content": text}]}
    return tokens(prompt_of(msgspec.json.encode(body)))


def all_but_the_last(asking: Request) -> int:
    """Of a prompt whose end is the end of a piece: the last token is always computed."""
    pieces = of_request(asking)
    assert pieces.ends[-1] == pieces.num_tokens
    return pieces.num_tokens - 1


def test_what_a_replica_says_of_its_tokens_corrects_what_is_believed_of_texts(provider: Upstream, publisher: Publisher) -> None:
    async def run() -> None:
        async with stage(provider, publisher) as on:
            ids, asking = tokens_of(), request()
            pieces = of_request(asking)
            sizes = tuple(end - begin for begin, end in zip((0, *pieces.ends), pieces.ends, strict=False))
            await on.ask(asking)
            publisher.publish(stored(ids))
            assert await on.told() == ("speaks", BlocksStored(pieces.blocks, sizes))
            assert on.choice(asking, "speaks").cached_tokens == all_but_the_last(asking)
            assert await on.made["speaks"].tokenized.get() == ids

            half = len(ids) // BLOCK // 2
            publisher.publish(removed(ids, half))
            _, gone = await on.told()
            assert isinstance(gone, BlocksRemoved)
            left = on.choice(asking, "speaks").cached_tokens
            assert abs(left - pieces.num_tokens / 2) <= 256  # of what it covers, a piece may lose its last block
            publisher.publish(stored(ids, half))
            assert isinstance((await on.told())[1], BlocksStored)
            assert on.choice(asking, "speaks").cached_tokens == all_but_the_last(asking)

            publisher.publish(CLEARED)
            assert await on.told() == ("speaks", BlocksCleared())
            assert on.choice(asking, "speaks").cached_tokens == 0
            publisher.publish(stored(ids))
            assert isinstance((await on.told())[1], BlocksStored)
            publisher.restart()
            publisher.publish(stored(tokens_of("something else " * 50)))
            assert await on.told() == ("speaks", BlocksCleared())
            assert on.choice(asking, "speaks").cached_tokens == 0
            await on.ask(asking)  # is known already
            await on.ask(request(TEXT + "And what of it?" * 100))
            assert await on.made["speaks"].tokenized.get() == tokens_of(TEXT + "And what of it?" * 100)
            assert on.made["speaks"].tokenized.empty()
            assert on.made["speaks"].most_at_once == 1

    asyncio.run(run())
    assert len(provider.requests("/tokenize")) == 2


def test_a_replica_without_tokenize_is_asked_once_and_routed_to_as_before(provider: Upstream, publisher: Publisher) -> None:
    provider.fault("404", match=Match(path="/tokenize"), count=None)

    async def run() -> None:
        async with stage(provider, publisher) as on:
            publisher.publish(stored(tokens_of()))
            await on.ask(request())
            assert "no /tokenize" in str(await on.made["speaks"].tokenized.get())
            await on.ask(request("another " * 1000))
            publisher.publish(removed(tokens_of()), CLEARED)  # what is cleared needs no tokens to be understood
            assert await on.told() == ("speaks", BlocksCleared())
            await on.ask(request())
            assert on.choice(request(), "speaks").cached_tokens == all_but_the_last(request())

    asyncio.run(run())
    assert len(provider.requests("/tokenize")) == 1


def test_nothing_is_asked_of_a_replica_that_publishes_nothing(provider: Upstream, publisher: Publisher) -> None:
    async def run() -> None:
        async with stage(provider, publisher, draining="speaks") as on:
            publisher.publish(stored(tokens_of()))
            await on.ask(request())
            assert on.choice(request(), "silent").cached_tokens == all_but_the_last(request())

    asyncio.run(run())
    assert provider.requests("/tokenize") == []
    assert len(provider.requests("/v1/chat/completions")) == 1


def test_what_is_more_than_words_is_not_tokenized_and_a_salt_changes_no_token(provider: Upstream) -> None:
    picture = MediaPart("image", "image/png", {"base64": "AAAA"})
    salted = msgspec.structs.replace(request(), cache_salt="mine")

    async def run() -> None:
        one = Watched(UpstreamConfig(name="one", base_url=provider.url))
        await one.start()
        assert await one.tokenize(request(TEXT, picture)) == []
        assert await one.tokenize(request()) == await one.tokenize(salted) == tokens_of()
        await one.aclose()

    asyncio.run(run())
    assert all("cache_salt" not in record.body for record in provider.requests("/tokenize"))
    assert len(provider.requests("/tokenize")) == 2


# -- as it is configured ----------------------------------------------------------------------------------------------------


def test_a_server_listens_to_replicas_it_began_with_and_to_those_that_join(
    provider: Upstream, publisher: Publisher, tmp_path: Path
) -> None:
    other = Publisher()
    toml = upstream("first", provider, MODEL, kv_events=publisher.address, kv_events_replay="tcp://127.0.0.1:1")
    with gateway(toml, tmp_path) as served:
        assert publisher.heard() == b"\x01"
        replicas = f"{served.url}/anaphora/replicas"
        more = {"name": "second", "base_url": provider.url, "models": [MODEL], "kv_events": other.address}
        httpx2.post(replicas, json={"add": more}).raise_for_status()
        assert other.heard() == b"\x01"
        again = httpx2.post(replicas, json={"add": more})
        assert again.status_code == 400
        httpx2.post(replicas, json={"remove": "second"}).raise_for_status()
        assert other.heard() == b"\x00"
        wrong = httpx2.post(replicas, json={"add": {**more, "kv_events": "http://here"}})
        assert "add.kv_events: an address such as tcp://10.0.0.7:5557" in wrong.text
        assert "upstream_first_num_event_batches_missed" in httpx2.get(f"{served.url}/anaphora/stats").text
    assert publisher.heard() == b"\x00"
    other.close()


def test_a_replay_is_of_use_only_beside_events() -> None:
    with pytest.raises(ConfigError, match="only beside kv_events"):
        check_upstream(UpstreamConfig(name="one", base_url="http://one", kv_events_replay="tcp://one:5558"), "upstream")


CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": TEXT}],
    "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
    "chat_template_kwargs": {"enable_thinking": False},
    "temperature": 0.5,
    "stream": True,
}


def test_a_prompt_is_tokenized_as_it_was_asked_whatever_the_dialect(provider: Upstream) -> None:
    options = UpstreamOptions("one", provider.url, rename={MODEL: "theirs"})
    dialects: list[UpstreamDialect] = [UpstreamChat(), UpstreamCompletions()]
    bodies = {
        "openai_chat": (OpenAIChat(), CHAT),
        "openai_completions": (OpenAICompletions(), {"model": MODEL, "prompt": TEXT, "max_tokens": 3}),
        "openai_responses": (OpenAIResponses(), {"model": MODEL, "input": TEXT}),
        "anthropic": (Anthropic(), {"model": MODEL, "max_tokens": 3, "messages": CHAT["messages"]}),
    }

    async def run() -> None:
        one = Asked(options, {dialect.name: dialect for dialect in dialects})
        await one.start()
        for name, (dialect, body) in bodies.items():
            native = encode(body)
            asking = dialect.parse(native, tenant=LOCAL_TENANT).request
            assert await one.tokenize(msgspec.structs.replace(asking, native=Native(name, native)))
        await one.aclose()

    asyncio.run(run())
    chat, completions, *others = [record.body for record in provider.requests("/tokenize")]
    kept = ("messages", "tools", "chat_template_kwargs")
    assert chat == {"model": "theirs", **{name: CHAT[name] for name in kept}}
    assert completions == {"model": "theirs", "prompt": TEXT}
    assert others == [{"model": "theirs", "messages": CHAT["messages"]}] * 2
