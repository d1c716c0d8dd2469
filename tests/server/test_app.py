"""The HTTP surface on a real socket, in this process, so that gates can force what happens between two bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx2
import openai
import pytest
import uvicorn

from anaphora.backends.echo import EchoBackend, Gate, fail_at
from anaphora.catalogue import Catalogue
from anaphora.clock import SystemClock
from anaphora.errors import EngineDied, QueueFull
from anaphora.events import Event, Miss, Stored
from anaphora.explain import Explanations
from anaphora.gateway import Gateway
from anaphora.ledger.accounts import Ledger
from anaphora.levels.exact import ExactLevel, ExactOptions
from anaphora.memory import Memory
from anaphora.policies.lru import LRU
from anaphora.server.app import App
from anaphora.server.auth import Keyring
from anaphora.server.endpoint import Api
from anaphora.server.metrics import Metrics
from anaphora.server.run import listen
from anaphora.store import Store
from anaphora.tiers.ram import RamOptions, RamTier
from anaphora.types import Key, Owner, Tenant

MAX_BODY = 10_000


class Site:
    """A running server and a client of it."""

    def __init__(
        self, client: httpx2.AsyncClient, backend: EchoBackend, host: str, port: int, events: asyncio.Queue[Event]
    ) -> None:
        self.client = client
        self._events = events
        self.backend = backend
        self.host = host
        self.port = port

    async def until(self, kind: type[Event], count: int = 1) -> None:
        """Return when `count` events of `kind` have happened that no earlier call has waited for."""
        while count:
            count -= isinstance(await self._events.get(), kind)

    async def ask(self, text: str = "to be or not", **fields: object) -> httpx2.Response:
        return await self.client.post("/v1/chat/completions", json=chat(text, **fields))


def chat(text: str, **fields: object) -> dict[str, object]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


@asynccontextmanager
async def site(gate: Gate | None = None, keys: dict[str, Tenant] | None = None, start: bool = True) -> AsyncIterator[Site]:
    backend, clock = EchoBackend(gate=gate), SystemClock()
    metrics, ledger = Metrics(), Ledger()
    events: asyncio.Queue[Event] = asyncio.Queue()

    def emit(event: Event) -> None:
        metrics.record(event)
        ledger.record(event)
        events.put_nowait(event)

    policy: LRU[Key] = LRU()
    store = Store([RamTier(RamOptions(), policy=policy, clock=clock, emit=emit)], clock=clock, emit=emit)
    level = ExactLevel(ExactOptions(), store=store, clock=clock)
    catalogue = Catalogue(backend)
    memory = Memory([level], fingerprint=catalogue.fingerprint, emit=emit)
    gateway = Gateway(backend, memory, catalogue, clock=clock, emit=emit)
    app = App(
        Api(
            gateway,
            Keyring({key: Owner(tenant) for key, tenant in (keys or {}).items()}),
            metrics,
            ledger,
            clock,
            MAX_BODY,
            Explanations(clock),
        )
    )
    if start:
        await gateway.start()
    listener = listen("127.0.0.1", 0)
    host, port = listener.getsockname()
    server = uvicorn.Server(uvicorn.Config(app, http="httptools", ws="none", lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with httpx2.AsyncClient(base_url=f"http://{host}:{port}") as client:
            yield Site(client, backend, host, port, events)
    finally:
        server.should_exit = True
        await serving
        await gateway.aclose()


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):  # a server that waits for ever fails instead of hanging
            await body()

    asyncio.run(main())


class Hold:
    """A gate that stays shut at one delta until it is opened."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, index: int) -> None:
        if index != self.at:
            return
        self.reached.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def post_raw(site: Site, body: dict[str, object]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request on a socket of our own, to be cut whenever we like."""
    reader, writer = await asyncio.open_connection(site.host, site.port)
    payload = json.dumps(body).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(payload), payload))
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_cancels_its_computation_at_once(stream: bool) -> None:
    async def body() -> None:
        hold = Hold(at=3)
        async with site(hold) as here:
            reader, writer = await post_raw(here, chat("to be or not", stream=stream))
            await hold.reached.wait()
            if stream:
                assert b"200 OK" in await reader.readuntil(b"be ")
            writer.close()
            await writer.wait_closed()
            await hold.cancelled.wait()
            stats = await here.client.get("/anaphora/stats")
            assert stats.json()["answers"]["num_left"] == 1
            hold.at = -1
            assert "fwd=miss" in (await here.ask()).headers["cache-status"], "nothing was learned"

    run(body)


def test_a_client_that_disconnects_harms_nobody_else() -> None:
    async def body() -> None:
        hold = Hold(at=3)
        async with site(hold) as here:
            _, writer = await post_raw(here, chat("to be or not", stream=True))
            await hold.reached.wait()
            other = asyncio.create_task(here.ask())
            await here.until(Miss, 2)  # looking up and joining are one step
            writer.close()
            await writer.wait_closed()
            hold.open.set()
            answer = await other
            assert answer.json()["choices"][0]["message"]["content"] == "to be or not"
            assert "collapsed" in answer.headers["cache-status"]
            assert here.backend.runs == 1

    run(body)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_error_before_the_first_delta_has_its_own_status_in_both_dialects() -> None:
    async def body() -> None:
        async with site(fail_at(0, QueueFull("too many", retry_after_s=7))) as here:
            for stream in (False, True):
                answer = await here.ask(stream=stream)
                assert answer.status_code == 429
                assert answer.headers["retry-after"] == "7"
                assert answer.json()["error"]["type"] == "rate_limit_error"
                message = {"model": "echo", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}], "stream": stream}
                other = await here.client.post("/v1/messages", json=message)
                assert other.status_code == 429
                assert other.json()["error"]["type"] == "rate_limit_error"
                assert other.headers["request-id"] == other.json()["request_id"]

    run(body)


def test_a_full_queue_is_the_sdks_rate_limit_error() -> None:
    async def body() -> None:
        async with (
            site(fail_at(0, QueueFull("too many", retry_after_s=7))) as here,
            openai.AsyncOpenAI(base_url=f"{here.client.base_url}/v1", api_key="x", max_retries=0) as sdk,
        ):
            with pytest.raises(openai.RateLimitError):
                await sdk.chat.completions.create(model="echo", messages=[{"role": "user", "content": "x"}])

    run(body)


@pytest.mark.parametrize("error", [EngineDied("gone"), ZeroDivisionError("a bug")])
def test_an_error_after_the_first_delta_is_the_streams_error_event(error: Exception) -> None:
    async def body() -> None:
        async with site(fail_at(2, error)) as here:
            answer = await here.ask(stream=True)
            assert answer.status_code == 200
            assert "[DONE]" not in answer.text
            last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))
            assert last["error"]["message"]
            assert "a bug" not in answer.text
            message = {"model": "echo", "max_tokens": 9, "messages": [{"role": "user", "content": "x y"}], "stream": True}
            other = await here.client.post("/v1/messages", json=message)
            assert "event: error" in other.text
            assert "message_stop" not in other.text

    run(body)


@pytest.mark.parametrize("error", [EngineDied("gone"), ZeroDivisionError("a bug")])
def test_an_error_in_the_middle_of_a_whole_answer_has_its_status(error: Exception) -> None:
    async def body() -> None:
        async with site(fail_at(2, error)) as here:
            answer = await here.ask()
            assert answer.status_code == (503 if isinstance(error, EngineDied) else 500)
            assert "a bug" not in answer.text

    run(body)


def test_every_refusal_is_in_the_callers_dialect() -> None:
    async def body() -> None:
        async with site() as here:
            ask = here.client.request
            anthropic = {"anthropic-version": "2023-06-01"}
            big = b" " * (MAX_BODY + 1)
            cases: list[tuple[str, str, dict[str, str], bytes, int]] = [
                ("POST", "/v1/chat/completions", {}, b"{", 400),
                ("POST", "/v1/messages", {}, b"{", 400),
                ("POST", "/v1/responses", {}, b"[]", 400),
                ("POST", "/v1/chat/completions", {}, big, 413),
                ("POST", "/v1/messages", {}, big, 413),
                ("GET", "/v1/chat/completions", {}, b"", 405),
                ("GET", "/v1/messages", {}, b"", 405),
                ("GET", "/nowhere", {}, b"", 404),
                ("GET", "/nowhere", anthropic, b"", 404),
                ("GET", "/v1/models/none", {}, b"", 404),
                ("GET", "/v1/models/none", anthropic, b"", 404),
                ("GET", "/v1/models?limit=x", anthropic, b"", 400),
                ("POST", "/anaphora/forget", {}, b'{"tenant":"someone-else"}', 400),
            ]
            for method, path, headers, content, status in cases:
                answer = await ask(method, path, headers=headers, content=content)
                assert answer.status_code == status, (path, answer.text)
                in_anthropic = path == "/v1/messages" or bool(headers)
                assert (answer.json().get("type") == "error") == in_anthropic, path
                assert answer.headers["request-id" if in_anthropic else "x-request-id"]

    run(body)


def test_a_body_without_a_length_is_bounded_too() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(MAX_BODY // 100 + 1):
            yield b" " * 100

    async def body() -> None:
        async with site() as here:
            assert (await here.client.post("/v1/chat/completions", content=endless())).status_code == 413

    run(body)


# -- streams -------------------------------------------------------------------------------------------------------------


def test_deltas_are_sent_as_they_are_made() -> None:
    async def body() -> None:
        hold = Hold(at=3)
        async with (
            site(hold) as here,
            here.client.stream("POST", "/v1/chat/completions", json=chat("a b c", stream=True)) as answer,
        ):
            assert "fwd=miss" in answer.headers["cache-status"]
            seen = ""
            async for line in answer.aiter_lines():
                seen += line
                if '"b "' in line:
                    assert hold.reached.is_set()
                    assert not hold.open.is_set()
                    hold.open.set()
            assert seen.endswith("data: [DONE]")

    run(body)


def test_a_hit_is_the_same_bytes_as_a_miss_but_for_ids() -> None:
    async def body() -> None:
        async with site() as here:
            miss = await here.ask()
            await here.until(Stored)
            hit = await here.ask()
            fresh = ("id", "created")
            one, two = miss.json(), hit.json()
            assert {name: one[name] for name in one if name not in fresh} == {
                name: two[name] for name in two if name not in fresh
            }
            assert one["id"] != two["id"]
            assert int(hit.headers["age"]) >= 0
            assert "hit" in hit.headers["cache-status"]

    run(body)


# -- keys and operators ----------------------------------------------------------------------------------------------------


def test_keys_are_needed_where_there_are_keys_but_not_for_health_and_metrics() -> None:
    async def body() -> None:
        async with site(keys={"secret": Tenant("alice")}) as here:
            for path in ("/health", "/ready", "/metrics"):
                assert (await here.client.get(path)).status_code == 200
            for path in ("/v1/models", "/anaphora/stats"):
                assert (await here.client.get(path)).status_code == 401
                assert (await here.client.get(path, headers={"x-api-key": "secret"})).status_code == 200
                assert (await here.client.get(path, headers={"authorization": "bearer secret"})).status_code == 200
            assert (await here.ask()).status_code == 401

    run(body)


def test_ready_says_what_it_waits_for() -> None:
    async def body() -> None:
        async with site(start=False) as here:
            answer = await here.client.get("/ready")
            assert answer.status_code == 503
            assert answer.json() == {"ready": False, "waiting_for": "the backend"}
            assert (await here.client.get("/health")).status_code == 200
            await here.backend.start()
            assert (await here.client.get("/ready")).status_code == 200

    run(body)


def test_metrics_have_vllms_names() -> None:
    async def body() -> None:
        async with site() as here:
            await here.ask("one two three", stream=True)
            await here.until(Stored)
            await here.ask("one two three")
            page = (await here.client.get("/metrics")).text
            labels = '{engine="0",model_name="echo"}'
            for line in (
                f"vllm:prompt_tokens_total{labels} 3.0",
                f"vllm:generation_tokens_total{labels} 3.0",
                f"vllm:prompt_tokens_cached_total{labels} 0.0",
                f"vllm:num_requests_running{labels} 0.0",
                f"vllm:num_requests_waiting{labels} 0.0",
                f"vllm:kv_cache_usage_perc{labels} 0.0",
                f"vllm:prefix_cache_queries_total{labels} 0.0",
                f"vllm:prefix_cache_hits_total{labels} 0.0",
                f"vllm:time_to_first_token_seconds_count{labels} 2.0",
                f"vllm:inter_token_latency_seconds_count{labels} 2.0",
                f"vllm:e2e_request_latency_seconds_count{labels} 2.0",
                'vllm:request_success_total{engine="0",finished_reason="stop",model_name="echo"} 2.0',
                'anaphora:requests_total{model="echo",outcome="finished",source="hit"} 1.0',
                'anaphora:cache_misses_total{level="exact",reason="absent"} 1.0',
                'anaphora:saved_generation_tokens_total{model="echo"} 3.0',
            ):
                assert line in page, line

    run(body)
