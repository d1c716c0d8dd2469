"""The semantic level as a configuration makes it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from anaphora.accounting import NOBODY
from anaphora.build import build
from anaphora.config import CacheConfig, Config, EngineConfig, SemanticConfig
from anaphora.errors import ConfigError, NotFound
from anaphora.events import Answered, Event, Judged
from anaphora.gateway import Gateway
from anaphora.types import LOCAL_TENANT, Message, Request, Sampling, TextPart


def config(folder: Path, **settings: Any) -> Config:
    return Config(
        engine=EngineConfig(kind="echo"),
        cache=CacheConfig(dir=str(folder), disk=0),
        semantic=SemanticConfig(**{"mode": "on", "risk": 0.3, **settings}),
    )


async def ask(gateway: Gateway, text: str) -> str:
    """Where the answer came from."""
    request = Request("echo", LOCAL_TENANT, (Message("user", (TextPart(text),)),), sampling=Sampling(temperature=0.0))
    answer = await gateway.complete(request, asked=msgspec.structs.replace(NOBODY, model="echo"))
    if answer.source != "hit":
        await answer.whole()  # type: ignore[union-attr]
        answer.leave()  # type: ignore[union-attr]
        await gateway.semantic().flush()
    return answer.source


def test_the_judge_is_asked_through_the_gateway_and_paid_for_by_the_tenant(tmp_path: Path) -> None:
    events: list[Event] = []

    async def main() -> None:
        gateway = build(config(tmp_path, judge="echo"), emit=events.append)
        await gateway.start()
        try:
            assert await ask(gateway, "How do I pay?") == "miss"
            assert await ask(gateway, "how do i pay") == "miss"  # in shadow; and the judge, who only echoes, never says yes
        finally:
            await gateway.aclose()

    asyncio.run(main())
    judged = [event for event in events if isinstance(event, Judged)]
    assert [(event.source, event.wrong) for event in judged] == [("shadow", True)]
    paid = [event for event in events if isinstance(event, Answered) and event.tag == "semantic-judge"]
    assert [(event.tenant, event.asked, event.outcome) for event in paid] == [(LOCAL_TENANT, "echo", "finished")]


def test_without_a_judge_answers_are_compared_here(tmp_path: Path) -> None:
    events: list[Event] = []

    async def main() -> None:
        gateway = build(config(tmp_path), emit=events.append)
        await gateway.start()
        try:
            await ask(gateway, "How do I pay?")
            await ask(gateway, "how do i pay")
        finally:
            await gateway.aclose()

    asyncio.run(main())
    assert [event.wrong for event in events if isinstance(event, Judged)] == [False]


def test_an_encoder_that_is_none_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"semantic\.encoder.*minilm"):
        build(config(tmp_path, encoder="minilmm"))


def test_it_is_off_unless_it_is_wanted(tmp_path: Path) -> None:
    gateway = build(config(tmp_path, mode="off"))
    with pytest.raises(NotFound, match=r"semantic\.mode"):
        gateway.semantic()
