"""The path of texts that become vectors, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")
pytest.importorskip("wordllama")

from anaphora.backends.base import Foreign, Forwarded
from anaphora.build import build
from anaphora.clock import ManualClock
from anaphora.config import CacheConfig, Config, EmbeddingsConfig, EngineConfig
from anaphora.embeddings import EmbeddingRequest, apportioned
from anaphora.errors import ContextTooLong, LimitReached, ModelNotFound, UpstreamFailed
from anaphora.events import Answered, Embedded, Event
from anaphora.gateway import Gateway
from anaphora.types import Native, Request, Tenant


@given(st.integers(0, 10**6), st.lists(st.integers(1, 1000), min_size=1, max_size=50))
def test_the_parts_of_a_count_add_up_to_it_and_follow_the_sizes(num_tokens: int, sizes: list[int]) -> None:
    parts = apportioned(num_tokens, sizes)
    assert sum(parts) == num_tokens
    for part, size in zip(parts, sizes, strict=True):
        assert abs(part - num_tokens * size / sum(sizes)) <= 1


class Scarce:
    """An allowance for so many tokens, as far as this path asks for one."""

    def __init__(self, num_left: int) -> None:
        self.num_left = num_left
        self.reserved: list[str] = []

    async def admit(self, tenant: str) -> None:
        pass

    async def reserve(self, request: Request, request_id: str) -> None:
        if self.num_left <= 0:
            raise LimitReached("nothing is left", retry_after_s=60)
        self.num_left -= sum(len(str(prompt)) for prompt in request.prompts)
        self.reserved += [str(prompt) for prompt in request.prompts]


def made(folder: Path, events: list[Event], allowance: Scarce | None = None, **settings: object) -> Gateway:
    config = Config(
        engine=EngineConfig(kind="echo"),
        cache=CacheConfig(dir=str(folder)),
        embeddings=EmbeddingsConfig(models=("static",), **settings),  # type: ignore[arg-type]
    )
    return build(config, clock=ManualClock(), emit=events.append, allowance=allowance)  # type: ignore[arg-type]


def ask(*texts: str, **fields: object) -> EmbeddingRequest:
    return EmbeddingRequest("static", texts, Tenant("mann"), **fields)  # type: ignore[arg-type]


def test_a_request_tells_where_its_texts_came_from_and_what_it_saved(tmp_path: Path) -> None:
    events: list[Event] = []

    async def main() -> None:
        gateway = made(tmp_path, events)
        await gateway.start()
        await gateway.embed(ask("one two", "three"))
        await gateway.embed(ask("three", "four", "four", request_id="r", tag="t"))
        await gateway.aclose()

    asyncio.run(main())
    texts = [event for event in events if isinstance(event, Embedded)]
    assert [(event.num_hits, event.num_computed, event.num_shared) for event in texts] == [(0, 2, 0), (1, 1, 1)]
    first, second = (event for event in events if isinstance(event, Answered))
    assert (first.source, first.usage.input_tokens, first.known) == ("miss", 3, None)
    assert second.known is not None
    assert (second.usage.input_tokens, second.known.input_tokens, second.request_id, second.tag) == (1, 2, "r", "t")


def test_who_has_used_up_his_limit_is_given_what_is_known_and_nothing_is_computed(tmp_path: Path) -> None:
    async def main() -> None:
        scarce = Scarce(1)
        gateway = made(tmp_path, [], scarce)
        await gateway.start()
        await gateway.embed(ask("one two", "three"))
        assert scarce.reserved == ["one two", "three"]
        with pytest.raises(LimitReached):
            await gateway.embed(ask("three", "four"))
        assert len((await gateway.embed(ask("three"))).vectors) == 1
        await gateway.aclose()

    asyncio.run(main())


def test_with_nothing_remembered_a_text_is_computed_again_but_in_one_batch_once(tmp_path: Path) -> None:
    async def main() -> None:
        gateway = made(tmp_path, [], remember=False)
        await gateway.start()
        for _ in range(2):
            found = (await gateway.embed(ask("one", "one"))).found
            assert (found.num_hits, found.num_computed, found.num_shared) == (0, 1, 1)
        await gateway.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(("storage", "error"), [("float16", 1e-3), ("int8", 5e-3), ("float32", 0.0)])
def test_vectors_are_given_as_they_are_kept(storage: str, error: float, tmp_path: Path) -> None:
    from anaphora.backends.encoders.static import Static

    async def main() -> None:
        gateway = made(tmp_path, [], storage=storage)
        await gateway.start()
        found = await gateway.embed(ask("What is a cache?"))
        assert np.abs(found.vectors - Static().encode(["What is a cache?"])).max() <= error
        await gateway.aclose()

    asyncio.run(main())


class Stalling:
    """An upstream whose answers begin and never end."""

    closed = False

    def hosts(self, model: str) -> bool:
        return True

    async def forward(self, asked: Foreign) -> Forwarded:
        return Forwarded(200, (), self.chunks())

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            yield b'{"data": ['
            await asyncio.Event().wait()
        finally:
            self.closed = True


def test_an_answer_of_an_upstream_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anaphora.embeddings._BODY_S", 0.01)
    stalling = Stalling()

    async def main() -> None:
        gateway = made(tmp_path, [])
        await gateway.start()
        assert gateway.embeddings is not None
        gateway.embeddings._hosting = stalling  # type: ignore[assignment]
        body = b'{"model": "echo", "input": "a"}'
        with pytest.raises(UpstreamFailed, match="not over within") as failed:
            await gateway.embed(EmbeddingRequest("echo", ("a",), native=Native("openai_chat", body)))
        assert (failed.value.status, stalling.closed) == (504, True)
        await gateway.aclose()

    asyncio.run(main())


def test_a_text_that_is_too_long_and_a_model_that_is_not_there_are_refused(tmp_path: Path) -> None:
    events: list[Event] = []

    async def main() -> None:
        gateway = made(tmp_path, events)
        await gateway.start()
        with pytest.raises(ContextTooLong) as refused:
            await gateway.embed(ask("a", "a", "word " * 8193))
        assert refused.value.param == "input[2]"
        with pytest.raises(ModelNotFound, match="there is: static"):
            await gateway.embed(EmbeddingRequest("minilm", ("a",)))
        await gateway.aclose()

    asyncio.run(main())
    assert {event.outcome for event in events if isinstance(event, Answered)} == {"failed"}
