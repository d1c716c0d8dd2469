"""The contract of backends, as a suite: subclass it with a `make` that gives a backend, and pytest checks it.

class TestMine(BackendContract):
    model = "mine"
    def make(self) -> Backend:
        return MyBackend(...)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from anaphora.backends.base import Backend
from anaphora.errors import ServiceError
from anaphora.transcript import Collector
from anaphora.types import (
    LOCAL_TENANT,
    Begin,
    Completion,
    Delta,
    End,
    Finish,
    Message,
    Request,
    Sampling,
    Scope,
    Tenant,
    TextPart,
)


class BackendContract:
    """Checks what `backends.base.Backend` promises, whatever the backend says."""

    model: str
    """A model that the backend made by `make` serves."""
    ready_s: float = 60.0
    """How long it may take to become ready."""

    def make(self) -> Backend:
        raise NotImplementedError

    def ask(self, text: str = "Say something short.", *, max_tokens: int | None = 8, n: int = 1) -> Request:
        sampling = Sampling(temperature=0.0, n=n)
        return Request(self.model, messages=(Message("user", (TextPart(text),)),), max_tokens=max_tokens, sampling=sampling)

    def run(self, body: Callable[[Backend], Awaitable[None]]) -> None:
        """`body` with a started, ready backend that is closed afterwards."""

        async def run() -> None:
            backend = self.make()
            try:
                await backend.start()
                async with asyncio.timeout(self.ready_s):
                    while not backend.ready():  # noqa: ASYNC110  # `ready` is a question, not an event
                        await asyncio.sleep(0.01)
                await body(backend)
            finally:
                await backend.aclose()

        asyncio.run(run())

    # -- the promises --------------------------------------------------------------------------------------------------

    def test_it_serves_the_model_it_names(self) -> None:
        async def body(backend: Backend) -> None:
            assert self.model in [model.id for model in await backend.models()]

        self.run(body)

    def test_an_answer_is_begin_then_its_choices_then_end(self) -> None:
        async def body(backend: Backend) -> None:
            deltas = await _deltas(backend, self.ask())
            assert isinstance(deltas[0], Begin)
            assert isinstance(deltas[-1], End)
            assert sum(isinstance(delta, Finish) for delta in deltas) == 1
            _complete(deltas)

        self.run(body)

    def test_the_input_side_of_usage_is_known_at_begin_and_does_not_change(self) -> None:
        async def body(backend: Backend) -> None:
            request = self.ask()
            deltas = await _deltas(backend, request)
            begin, end = deltas[0], deltas[-1]
            assert isinstance(begin, Begin)
            assert isinstance(end, End)
            assert begin.usage.prompt_tokens == end.usage.prompt_tokens
            assert begin.usage.cache_read_input_tokens == end.usage.cache_read_input_tokens
            assert begin.usage.kv_reused_tokens == end.usage.kv_reused_tokens
            assert begin.usage.output_tokens == 0
            assert end.usage.prompt_tokens == await backend.count_tokens(request)
            assert end.compute_s >= 0

        self.run(body)

    def test_max_tokens_is_honoured(self) -> None:
        async def body(backend: Backend) -> None:
            completion = _complete(await _deltas(backend, self.ask("one two three four", max_tokens=2)))
            assert completion.usage.output_tokens <= 2
            assert completion.choices[0].reason == "max_tokens"

        self.run(body)

    def test_max_tokens_0_is_a_pre_warm(self) -> None:
        async def body(backend: Backend) -> None:
            completion = _complete(await _deltas(backend, self.ask(max_tokens=0)))
            assert completion.usage.output_tokens == 0
            assert completion.choices[0].content == ()
            assert completion.choices[0].reason == "max_tokens"

        self.run(body)

    def test_n_gives_n_choices(self) -> None:
        async def body(backend: Backend) -> None:
            completion = _complete(await _deltas(backend, self.ask(n=3)))
            assert len(completion.choices) == 3

        self.run(body)

    def test_greedy_answers_are_the_same_twice(self) -> None:
        async def body(backend: Backend) -> None:
            first = _complete(await _deltas(backend, self.ask()))
            again = _complete(await _deltas(backend, self.ask()))
            assert [choice.content for choice in first.choices] == [choice.content for choice in again.choices]

        self.run(body)

    def test_concurrent_answers_are_whole(self) -> None:
        async def body(backend: Backend) -> None:
            requests = [self.ask(f"Question number {i}.") for i in range(4)]
            for deltas in await asyncio.gather(*(_deltas(backend, request) for request in requests)):
                _complete(deltas)

        self.run(body)

    def test_closing_an_answer_early_leaves_the_backend_usable(self) -> None:
        async def body(backend: Backend) -> None:
            deltas = backend.run(self.ask(max_tokens=None))
            assert isinstance(await anext(deltas), Begin)
            aclose = getattr(deltas, "aclose")  # noqa: B009  # AsyncIterator does not declare it, the contract does
            await aclose()
            _complete(await _deltas(backend, self.ask()))
            assert (await backend.stats()).get("num_requests_running", 0) == 0

        self.run(body)

    def test_too_long_a_prompt_is_an_error_of_the_service_and_harms_nothing(self) -> None:
        async def body(backend: Backend) -> None:
            limit = max(model.max_input_tokens for model in await backend.models() if model.id == self.model)
            if not limit:
                return
            assert await _refused(backend, self.ask("word " * (limit + 1))) == 400
            _complete(await _deltas(backend, self.ask()))

        self.run(body)

    def test_forgetting_counts_and_leaves_the_backend_usable(self) -> None:
        async def body(backend: Backend) -> None:
            await _deltas(backend, self.ask())
            assert await backend.forget(Scope(tenant=Tenant("nobody"))) == 0
            assert await backend.forget(Scope(tenant=LOCAL_TENANT)) >= 0
            assert _complete(await _deltas(backend, self.ask())).usage.kv_reused_tokens == 0

        self.run(body)

    def test_stats_are_flat_numbers_and_strings(self) -> None:
        async def body(backend: Backend) -> None:
            for name, value in (await backend.stats()).items():
                assert isinstance(value, int | float | str), name

        self.run(body)


async def _deltas(backend: Backend, request: Request) -> list[Delta]:
    return [delta async for delta in backend.run(request)]


async def _refused(backend: Backend, request: Request) -> int:
    """The status that `request` is refused with; 0 where it is taken."""
    try:
        await _deltas(backend, request)
    except ServiceError as error:
        return error.status
    return 0


def _complete(deltas: list[Delta]) -> Completion:
    collector = Collector()
    for delta in deltas:
        collector.add(delta)
    assert collector.completion is not None
    return collector.completion
