"""The optimiser on the way to an upstream: what is sent, what is told, whose turn it is, and entries that are kept alive."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from anaphora.backends.optimising import Mode, OptimiserOptions, Optimising
from anaphora.backends.pinging import TAG, Pinging
from anaphora.build import build
from anaphora.clock import ManualClock
from anaphora.config import CacheConfig, Config, EngineConfig, GatewayConfig, OptimiserConfig, UpstreamConfig
from anaphora.errors import UpstreamFailed
from anaphora.events import Answered, Event, Optimised
from anaphora.forgets import Forgets
from anaphora.types import Native, Request, Scope, Tenant, Usage

A = Tenant("a")
RULES = "\n".join(f"Rule {number}: read the ticket, look for the order, and say what happens next." for number in range(300))


def body(*turns: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    return {"model": "claude-opus-5", "max_tokens": 9, "tools": tools, "system": RULES, "messages": messages, **more}


def request(tenant: Tenant = A) -> Request:
    return Request("claude-opus-5", tenant=tenant, native=Native("anthropic", b"{}", request_id="req_1"))


class Bench:
    def __init__(self, *, ping_tokens: int = 0) -> None:
        self.clock = ManualClock(1_000_000.0)
        self.events: list[Event] = []
        pinging = Pinging(ping_tokens, clock=self.clock, emit=self.events.append)
        self.optimising = Optimising(clock=self.clock, emit=self.events.append, pinging=pinging)
        self.pings: list[dict[str, Any]] = []

    async def send(self, sent: dict[str, Any], mode: Mode = "on", tenant: Tenant = A) -> dict[str, Any] | None:
        options = OptimiserOptions(mode)
        sending = self.optimising.prepare(request(tenant), "anthropic", sent, "provider", options)
        if sending is None:
            return None
        await sending.wait()
        sending.begun()
        sending.over()
        return sending.body

    async def pauses(self, tenant: Tenant = A) -> None:
        """Conversations whose turns come four minutes after one another: the tenant is known for that now."""
        for number in range(6):
            turns = [f"Ticket {number}"]
            for turn in range(4):
                await self.send(body(*turns), tenant=tenant)
                turns += ["Done.", f"And {turn}?"]
                self.clock.advance(250)
        self.clock.advance(4 * 3600)

    async def ping(self) -> int:
        async def send(upstream: str, asked: Request, sent: dict[str, Any]) -> Usage:
            self.pings.append(sent)
            return Usage(cache_read_input_tokens=4000, input_tokens=3)

        return await self.optimising.pinging.once(send)


def marks(sent: Any) -> int:
    if isinstance(sent, dict):
        return ("cache_control" in sent) + sum(marks(value) for value in sent.values())
    return sum(marks(value) for value in sent) if isinstance(sent, list) else 0


def test_on_adds_breakpoints_and_tells_why() -> None:
    bench, asked = Bench(), body("What is open?")
    sent = asyncio.run(bench.send(asked))
    assert sent is not None
    assert marks(sent) >= 1
    assert marks(asked) == 0  # the client's own is not touched
    [event] = [event for event in bench.events if isinstance(event, Optimised)]
    assert (event.tenant, event.request_id, event.upstream, event.mode) == (A, "req_1", "provider", "on")
    assert len(event.marks) == marks(sent)
    assert {"code", "text"} <= set(event.reasons[0])


def test_advise_tells_the_same_and_sends_what_the_client_sent() -> None:
    bench, asked = Bench(), body("What is open?")
    sent = asyncio.run(bench.send(asked, "advise"))
    assert sent == asked
    [event] = [event for event in bench.events if isinstance(event, Optimised)]
    assert event.marks


def test_off_looks_at_nothing() -> None:
    bench = Bench()
    assert asyncio.run(bench.send(body("What is open?"), "off")) is None
    assert bench.events == []


def test_rewrites_are_done_where_they_are_wanted_and_told() -> None:
    bench, asked = Bench(), body("What is open?")
    asked["tools"] = [{"name": "b", "input_schema": {}}, {"name": "a", "input_schema": {}}]
    sending = bench.optimising.prepare(request(), "anthropic", asked, "provider", OptimiserOptions("on", rewrites=("tools",)))
    assert sending is not None
    tools: Any = sending.body["tools"]
    assert [tool["name"] for tool in tools] == ["a", "b"]
    [event] = [event for event in bench.events if isinstance(event, Optimised)]
    assert "tools-sorted" in {reason["code"] for reason in event.reasons}


def test_of_many_with_one_cold_prefix_one_goes_ahead() -> None:
    async def run() -> None:
        bench = Bench()
        options = OptimiserOptions("on")
        sendings = [
            bench.optimising.prepare(request(), "anthropic", body(f"Question {i}"), "provider", options) for i in range(4)
        ]
        order: list[int] = []

        async def go(index: int) -> None:
            sending = sendings[index]
            assert sending is not None
            await sending.wait()
            order.append(index)

        tasks = [asyncio.create_task(go(index)) for index in range(4)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert order == [0]
        first = sendings[0]
        assert first is not None
        first.begun()
        await asyncio.gather(*tasks)
        assert sorted(order) == [0, 1, 2, 3]
        for sending in sendings:
            assert sending is not None
            sending.over()

    asyncio.run(run())


def test_an_entry_that_is_likely_to_be_asked_for_is_kept_alive_and_paid_for() -> None:
    async def run() -> None:
        bench = Bench(ping_tokens=1_000_000)
        await bench.pauses()
        assert await bench.ping() == 0
        sent = await bench.send(body("What is open?", "Order 7.", "And then?"))
        assert await bench.ping() == 0  # not yet
        bench.clock.advance(285)
        assert await bench.ping() == 1
        assert sent is not None
        assert bench.pings == [{**sent, "max_tokens": 0}]
        [answered] = [event for event in bench.events if isinstance(event, Answered)]
        assert (answered.tenant, answered.tag, answered.upstream) == (A, TAG, "provider")
        assert answered.usage.cache_read_input_tokens == 4000
        assert await bench.ping() == 0  # it lives for five minutes more
        bench.clock.advance(24 * 3600)
        assert await bench.ping() == 0  # nobody came: it is given up
        assert len(bench.optimising.pinging) == 0

    asyncio.run(run())


@pytest.mark.parametrize("budget", [0, 100])
def test_beyond_the_budget_nothing_is_spent(budget: int) -> None:
    async def run() -> None:
        bench = Bench(ping_tokens=budget)
        await bench.pauses()
        await bench.send(body("What is open?", "Order 7.", "And then?"))
        bench.clock.advance(285)
        assert await bench.ping() == 0
        assert bench.pings == []

    asyncio.run(run())


@pytest.mark.parametrize(
    "more",
    [
        {"thinking": {"type": "enabled", "budget_tokens": 2000}},
        {"tool_choice": {"type": "any"}},
        {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
    ],
)
def test_what_a_pre_warm_cannot_repeat_is_not_pinged(more: dict[str, Any]) -> None:
    async def run() -> None:
        bench = Bench(ping_tokens=1_000_000)
        await bench.send(body("What is open?", **more))
        assert len(bench.optimising.pinging) == 0

    asyncio.run(run())


def test_a_conversation_is_pinged_with_its_latest_request_and_not_after_a_forget() -> None:
    async def run() -> None:
        bench = Bench(ping_tokens=1_000_000)
        await bench.pauses()
        assert await bench.ping() == 0
        await bench.send(body("What is open?"))
        latest = await bench.send(body("What is open?", "Order 7.", "And then?"))
        await bench.send(body("Something else"), tenant=Tenant("b"))
        assert len(bench.optimising.pinging) == 2
        bench.optimising.forget(Scope(tenant=Tenant("b")))
        bench.clock.advance(285)
        assert await bench.ping() == 1
        assert latest is not None
        assert bench.pings[0]["messages"] == latest["messages"]

    asyncio.run(run())


def test_a_ping_that_fails_is_not_tried_again() -> None:
    async def run() -> None:
        bench = Bench(ping_tokens=1_000_000)
        await bench.pauses()
        assert await bench.ping() == 0
        await bench.send(body("What is open?", "Order 7.", "And then?"))
        bench.clock.advance(285)

        async def fails(upstream: str, asked: Request, sent: dict[str, Any]) -> Usage:
            raise UpstreamFailed("gone", 502)

        assert await bench.optimising.pinging.once(fails) == 0
        assert len(bench.optimising.pinging) == 0
        assert [event for event in bench.events if isinstance(event, Answered)] == []

    asyncio.run(run())


def test_what_one_worker_is_told_to_forget_another_ones_optimiser_forgets(tmp_path: Path) -> None:
    upstream = UpstreamConfig(name="provider", base_url="http://127.0.0.1:1", dialect="anthropic")
    optimiser = OptimiserConfig(mode="on", ping_tokens_per_hour=1_000_000)
    config = Config(
        engine=EngineConfig(kind="none"),
        cache=CacheConfig(enabled=False),
        gateway=GatewayConfig(upstreams=(upstream,), optimiser=optimiser),
    )
    gateway = build(config, forgets=Forgets(tmp_path / "forgets"))
    asked = gateway.fleet()._replicas["provider"].upstream
    optimising = asked._optimising
    assert optimising is not None

    async def run() -> None:
        sending = optimising.prepare(request(), "anthropic", body("What?"), "provider", asked.options.optimiser)
        assert sending is not None
        await sending.wait()

    asyncio.run(run())
    pinging = optimising.pinging
    assert len(pinging) == 1
    Forgets(tmp_path / "forgets").tell(Scope(tenant=A))
    gateway.heed()
    assert len(pinging) == 0
