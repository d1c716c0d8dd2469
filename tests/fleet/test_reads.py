"""What an answer says of a replica's cache is heeded, and what it does not say is not taken for nothing."""

from __future__ import annotations

import asyncio

import pytest
from tests.fleet.test_fleet import BEGIN, HI, Scripted

from anaphora.config import GatewayConfig, UpstreamConfig
from anaphora.fleet import Fleet
from anaphora.routing.base import RequestId
from anaphora.routing.round_robin import RoundRobin
from anaphora.types import End, Finish, Message, Request, TextPart, Usage

SILENT = Usage(2000, 1, reads_unsaid=True)
NOTHING, SOMETHING = Usage(2000, 1), Usage(1000, 1, 1000)


class Told(RoundRobin):
    def __init__(self) -> None:
        super().__init__()
        self.cached: list[int | None] = []

    def ended(self, request: RequestId, now_s: float, *, output_tokens: int, cached_tokens: int | None = None) -> None:
        super().ended(request, now_s, output_tokens=output_tokens, cached_tokens=cached_tokens)
        self.cached.append(cached_tokens)


@pytest.mark.parametrize(
    ("usages", "told"),
    [
        ((SILENT, SILENT), [None, None]),  # as vLLM without --enable-prompt-tokens-details
        ((NOTHING, SILENT), [0, 0]),
        ((SILENT, SOMETHING, SILENT), [None, 1000, 0]),  # as those that say it only where there is something
        ((Usage(500, 1), Usage(400, 1, 100)), [None, 100]),  # of short prompts most say nothing, whatever they have
    ],
)
def test_a_server_that_never_says_what_it_had_is_not_believed_to_have_had_nothing(
    usages: tuple[Usage, ...], told: list[int | None]
) -> None:
    strategy = Told()
    asked: list[tuple[str, str]] = []
    scripts = [(BEGIN, HI, Finish(0, "end_turn"), End(usage)) for usage in usages]
    configs = tuple(UpstreamConfig(name=name, base_url=f"http://{name}", models=("m",)) for name in ("one", "two"))

    def make(one: UpstreamConfig) -> Scripted:
        return Scripted(one, scripts, asked)

    async def run() -> None:
        fleet = Fleet(GatewayConfig(upstreams=configs), make, strategy)
        fleet.drain("two")
        for _ in usages:
            async for _ in fleet.bursts(Request("m", messages=(Message("user", (TextPart("Hello"),)),))):
                pass
        await fleet.aclose()

    asyncio.run(run())
    assert strategy.cached == told
