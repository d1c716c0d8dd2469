"""Who answers in a test upstream: the echo engine at the pace of a model, or what a test told it to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from contextvars import ContextVar

import msgspec

from anaphora.accounting import Accounting, Asked, Bill
from anaphora.backends.echo import EMULATED_INPUT_TOKENS, WORD, EchoBackend, Options
from anaphora.clock import Clock
from anaphora.errors import ServiceError
from anaphora.promises import Books
from anaphora.testing.upstream.prefixes import Prefixes
from anaphora.testing.upstream.script import Answer, Fault
from anaphora.types import Begin, Delta, End, Finish, ModelInfo, Request, TextDelta, ThinkingDelta, ToolUseDelta, Usage


class Pace(msgspec.Struct, frozen=True):
    """0 of a rate: it takes no time at all."""

    base_latency_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0

    def first_s(self, uncached_tokens: int) -> float:
        """Until the first token."""
        return self.base_latency_s + (uncached_tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0)

    def decode_s(self, num_tokens: int) -> float:
        """From the first token until that many are out."""
        return max(0, num_tokens - 1) / self.decode_tokens_per_s if self.decode_tokens_per_s else 0.0


class Orders(msgspec.Struct):
    """What the backend is to do with one request, and what accounting found out about it on the way there."""

    answer: Answer | None = None
    fault: Fault | None = None
    uncached_tokens: int | None = None
    """Of the prompt. None: nothing is known to be cached."""
    reused_tokens: int = 0
    """That are still in memory, where that is limited."""
    failed: bool = False
    """The backend has failed as it was told to."""


ORDERS: ContextVar[Orders] = ContextVar("anaphora_testing_orders")
"""Those of the request that a task works on. The task that computes an answer inherits it from whoever begins it."""


class ToldToFail(ServiceError):
    """A fault that a test asked for."""

    def __init__(self, fault: Fault, status: int) -> None:
        message = fault.message or f"The test upstream was told to answer with {status}."
        super().__init__(message, retry_after_s=fault.retry_after_s)
        self.status = status


class PacedBackend(EchoBackend):
    """`models`: all there are. Without any: the echo's own, and every model that a caching profile is known for."""

    def __init__(self, pace: Pace, models: tuple[str, ...] = (), *, clock: Clock) -> None:
        super().__init__(Options(emulates=True), clock=clock)
        self._pace = pace
        self._named = tuple(ModelInfo(name, max_input_tokens=EMULATED_INPUT_TOKENS, fingerprint="echo-1") for name in models)

    async def models(self) -> tuple[ModelInfo, ...]:
        return self._named or await super().models()

    def model(self, name: str) -> ModelInfo | None:
        return None if self._named else super().model(name)

    async def run(self, request: Request) -> AsyncIterator[Delta]:
        orders = ORDERS.get()
        said = super().run(request) if orders.answer is None else self._say(request, orders.answer)
        began_s = _now_s()
        num_tokens = 0
        async for delta in said:
            if isinstance(delta, Begin):
                prompt_tokens = delta.usage.input_tokens
                uncached = prompt_tokens if orders.uncached_tokens is None else orders.uncached_tokens
                began_s += self._pace.first_s(uncached)
                await _until(began_s)
            elif isinstance(delta, End):
                await _until(began_s + self._pace.decode_s(delta.usage.output_tokens))
                _fail_if_told(orders, None)
            elif not isinstance(delta, Finish):
                _fail_if_told(orders, num_tokens)
                num_tokens += 1
                await _until(began_s + self._pace.decode_s(num_tokens))
            if isinstance(delta, Begin | End):
                usage = msgspec.structs.replace(delta.usage, kv_reused_tokens=orders.reused_tokens)
                delta = msgspec.structs.replace(delta, usage=usage)
            yield delta

    async def _say(self, request: Request, answer: Answer) -> AsyncIterator[Delta]:
        """One token for each piece, `max_tokens` of them at most."""
        usage = Usage(input_tokens=await self.count_tokens(request))
        yield Begin(request.model, usage)
        output_tokens = 0
        for choice in range(request.sampling.n):
            reason = answer.reason or ("tool_use" if answer.tools else "end_turn")
            for num_said, delta in enumerate(_content(answer, choice)):
                if num_said == request.max_tokens:
                    reason = "max_tokens"
                    break
                output_tokens += 1
                yield delta
            yield Finish(choice, reason)
        yield End(msgspec.structs.replace(usage, output_tokens=output_tokens))


class PacedAccounting(Accounting):
    """Tells the orders of a request what of its prompt was cached. `prefixes` is the memory that promised prompts lie in;
    None: it holds everything."""

    def __init__(self, backend: PacedBackend, books: Books, prefixes: Prefixes | None) -> None:
        super().__init__(backend, books, hosted=True, block_size=None if prefixes is None else 1)
        self._prefixes = prefixes

    async def open(self, request: Request, asked: Asked, started_s: float) -> Bill | None:
        bill = await super().open(request, asked, started_s)
        if bill is not None:
            orders, charge = ORDERS.get(), bill.charge
            cached = charge.usage.read
            if self._prefixes is not None:
                orders.reused_tokens = self._prefixes.use(request.tenant, asked.prompt(), charge.lengths)
                cached = min(cached, orders.reused_tokens)
            orders.uncached_tokens = charge.lengths.total - cached
        return bill


def _content(answer: Answer, choice: int) -> Iterator[TextDelta | ThinkingDelta | ToolUseDelta]:
    for word in WORD.findall(answer.thinking):
        yield ThinkingDelta(choice, word)
    if answer.signature:
        yield ThinkingDelta(choice, "", answer.signature)
    text = answer.text or " ".join(f"word{number}" for number in range(answer.num_tokens))
    for word in WORD.findall(text):
        yield TextDelta(choice, word)
    for index, tool in enumerate(answer.tools):
        yield ToolUseDelta(choice, index, "", f"call_{index}", tool.name)
        yield ToolUseDelta(choice, index, json.dumps(tool.arguments))


def _fail_if_told(orders: Orders, num_tokens: int | None) -> None:
    """None: the answer is at its end, so a fault that has not come yet must come now."""
    fault = orders.fault
    if fault is not None and fault.kind == "error" and (num_tokens is None or num_tokens >= fault.at_event):
        orders.failed = True
        raise ToldToFail(fault, fault.status)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def _until(at_s: float) -> None:
    """Returns at that time of the loop; at once where it has passed."""
    left_s = at_s - _now_s()
    if left_s > 0:
        await asyncio.sleep(left_s)


async def pause(seconds: float | None, ended: asyncio.Event) -> None:
    """Stands still, but no longer than until `ended`. None: until then."""
    with suppress(TimeoutError):
        await asyncio.wait_for(ended.wait(), seconds)
