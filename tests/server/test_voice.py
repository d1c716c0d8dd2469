"""What a server tells the person who started it."""

from __future__ import annotations

import asyncio
from typing import Any

from anaphora.backends.engine_ipc import Status
from anaphora.errors import EngineDied
from anaphora.server.voice import Announcer
from anaphora.types import ModelInfo

URL = "http://127.0.0.1:8080"


class Heard:
    """A voice that remembers."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def say(self, text: str) -> None:
        self.words.append(f"say {text}")

    def stage(self, text: str) -> None:
        self.words.append(f"stage {text}")

    def settled(self, text: str) -> None:
        self.words.append(f"settled {text}")


class Engine:
    """What an engine says of itself when asked."""

    def __init__(self, stats: dict[str, Any], *, gone: bool = False) -> None:
        self._stats = stats
        self._gone = gone

    async def models(self) -> tuple[ModelInfo, ...]:
        if self._gone:
            raise EngineDied("gone again")
        return (ModelInfo("tiny", max_input_tokens=100, fingerprint="f"),)

    async def stats(self) -> dict[str, Any]:
        return self._stats


def told(engine: Engine, *statuses: Status, with_keys: bool = False, closed: bool = False) -> list[str]:
    """What a person hears of an engine that goes through `statuses`."""
    heard = Heard()

    async def main() -> None:
        announcer = Announcer(heard, URL, with_keys=with_keys)
        announcer.watch(engine)
        if closed:
            announcer.close()
        for status in statuses:
            announcer.on_status(status)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)

    asyncio.run(main())
    return heard.words


READY = Status("ready", ready=True)
FIGURES = {"dtype": "float32", "device": "cpu", "context_tokens": 8192}


def test_an_engine_that_loads_is_told_stage_by_stage_and_each_once() -> None:
    words = told(Engine(FIGURES), Status("starting"), Status("loading weights"), Status("loading weights"))
    assert words == ["stage starting", "stage loading weights"]


def test_a_ready_engine_is_told_with_its_figures_and_how_to_ask_it() -> None:
    ready, ask = told(Engine(FIGURES), READY)
    assert ready == f"settled ready: tiny (float32, cpu, 8192 tokens of context) on {URL}"
    assert f"curl {URL}/v1/chat/completions" in ask
    assert '"model": "tiny"' in ask
    assert "authorization" not in ask


def test_weights_that_are_not_as_they_were_are_told() -> None:
    assert "(float32, int8, cpu, 8192 tokens" in told(Engine({**FIGURES, "quantization": "int8"}), READY)[0]
    assert "(float32, cpu, 8192 tokens" in told(Engine({**FIGURES, "quantization": "none"}), READY)[0]


def test_where_keys_are_needed_the_command_has_a_place_for_one() -> None:
    assert "authorization: Bearer" in told(Engine({}), READY, with_keys=True)[1]


def test_a_backend_without_figures_is_told_by_its_name() -> None:
    assert told(Engine({}), READY)[0] == f"settled ready: tiny on {URL}"


def test_an_engine_that_never_will_be_ready_says_why() -> None:
    words = told(Engine({}), Status("refused", refused="no such model"))
    assert words == ["settled the engine cannot run as configured: no such model"]


def test_an_engine_that_is_gone_before_it_could_be_asked_is_no_news() -> None:
    assert told(Engine({}, gone=True), READY) == []


def test_the_end_of_an_engine_that_is_stopped_is_no_news() -> None:
    assert told(Engine({}), Status("the engine process died"), closed=True) == []
