"""What adapters and salts keep apart in a replica's cache is kept apart in what the router believes of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import msgspec
import pytest
from tests.fleet.test_listening import MODEL, TEXT, Listened, Publisher, Watched, removed, request, stored, tokens_of

from anaphora.backends.upstream import Upstream as Asked
from anaphora.backends.upstream import UpstreamOptions
from anaphora.config import GatewayConfig, UpstreamConfig
from anaphora.fleet import Fleet
from anaphora.routing.base import BlocksRemoved, BlocksStored, CacheEvent
from anaphora.routing.questions import of_request
from anaphora.testing.upstream import Upstream
from anaphora.types import LOCAL_TENANT, Native, Request
from anaphora.wire.base import encode
from anaphora.wire.openai_chat import OpenAIChat
from anaphora.wire.upstream_chat import UpstreamChat

POET = "gpt-5.5"
"""An adapter, as far as the replica is asked."""
MODELS = {  # of vLLM with `--lora-modules poet=...`
    "object": "list",
    "data": [
        {"id": MODEL, "object": "model", "owned_by": "vllm", "parent": None, "max_model_len": 2048},
        {"id": POET, "object": "model", "owned_by": "vllm", "parent": MODEL, "max_model_len": None},
    ],
}


class WithAdapter(Watched):
    async def adapters(self, request: Request) -> frozenset[str]:
        return frozenset({POET})


@pytest.fixture
def provider() -> Iterator[Upstream]:
    with Upstream("vllm") as one:
        yield one


def poem(event: dict[str, Any]) -> dict[str, Any]:
    """The same for the adapter: with its name, and hashes of its own."""
    apart = {**event, "block_hashes": [b"poet" + name for name in event["block_hashes"]]}
    return {**apart, "lora_id": 1, "lora_name": POET} if "token_ids" in event else apart


def salted(event: dict[str, Any]) -> dict[str, Any]:
    names = [b"salt" + name for name in event["block_hashes"]]
    keys = [["pepper"], *[None] * (len(names) - 1)]
    return {**event, "block_hashes": names, "extra_keys": keys}


def test_of_the_same_words_the_model_an_adapter_and_a_salt_have_blocks_of_their_own(provider: Upstream) -> None:
    plain, told = request(), []
    stats: dict[str, Any] = {}
    for_poet = msgspec.structs.replace(plain, model=POET)
    body = encode({"model": MODEL, "messages": [{"role": "user", "content": TEXT}], "max_tokens": 5, "cache_salt": "pepper"})
    parsed = OpenAIChat().parse(body, tenant=LOCAL_TENANT).request
    with_salt = msgspec.structs.replace(parsed, native=Native("openai_chat", body))
    questions = [of_request(one) for one in (plain, for_poet, with_salt)]

    async def run() -> None:
        publisher = Publisher()
        models = (MODEL, POET)
        configs = (
            UpstreamConfig(name="speaks", base_url=provider.url, models=models, kv_events=publisher.address),
            UpstreamConfig(name="silent", base_url=provider.url, models=models),
        )
        strategy, made = Listened(), []

        def make(one: UpstreamConfig) -> Watched:
            made.append(WithAdapter(one))
            return made[-1]

        async def heard() -> CacheEvent:
            async with asyncio.timeout(30):
                return (await strategy.told.get())[1]

        fleet = Fleet(GatewayConfig(upstreams=configs), make, strategy)
        await fleet.start()
        try:
            assert await asyncio.to_thread(publisher.heard) == b"\x01"
            fleet.drain("silent")
            for asking in (plain, for_poet, with_salt):
                async for _ in fleet.bursts(asking):
                    pass
            whole = stored(tokens_of())
            publisher.publish(whole)
            told.append(await heard())
            for _ in questions:
                await made[0].tokenized.get()
            publisher.publish(poem(whole))
            told.append(await heard())
            publisher.publish(salted(whole))
            told.append(await heard())
            gone = removed(tokens_of())
            publisher.publish(poem(gone))
            told.append(await heard())
            assert strategy.told.empty()
            stats.update(await fleet.stats())
        finally:
            await fleet.aclose()
            publisher.close()

    asyncio.run(run())
    for event, question in zip(told, questions, strict=False):
        assert isinstance(event, BlocksStored)
        assert event.blocks == question.blocks
    assert isinstance(told[3], BlocksRemoved)
    assert set(told[3].blocks) == set(questions[1].blocks)
    num_pieces = len(questions[0].blocks)
    found = [stats[f"upstream_speaks_num_{name}"] for name in ("event_batches", "pieces_stored", "pieces_dropped")]
    assert found == [4, 3 * num_pieces, num_pieces]


class Listing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path == "/v1/models" and self.headers["authorization"] == "Bearer ours"
        body = msgspec.json.encode(MODELS if known else {"error": "Unauthorized"})
        self.send_response(200 if known else 401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize(("key", "found"), [("ours", {POET}), ("wrong", set())])
def test_a_replica_tells_which_of_its_models_are_adapters(key: str, found: set[str]) -> None:
    server = HTTPServer(("127.0.0.1", 0), Listing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    async def run() -> None:
        options = UpstreamOptions("one", f"http://127.0.0.1:{server.server_port}/v1", key=key)
        one = Asked(options, {"openai_chat": UpstreamChat()})
        await one.start()
        assert await one.adapters(request()) == found
        await one.aclose()

    try:
        asyncio.run(run())
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
