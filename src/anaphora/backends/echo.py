"""A backend without a model: it says the last user text back, word by word. For tests of the path, and for trying the server.

Deterministic whatever the sampling says. Each delta of a stream is one word with the white space behind it, and counts as one
output token; prompts are counted by `echo_lengths`. It honours `max_tokens`, `n`, `stop`, `logprobs` and a forced tool call,
and can be told to hang, to fail, and to wait for a gate before every delta.

It also is the engine of the emulator: it answers for every model that a caching profile is known for, beside its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import msgspec

from anaphora.backends import echo_lengths
from anaphora.clock import Clock, SystemClock
from anaphora.errors import BackendFailed, ContextTooLong
from anaphora.profiles import known, match
from anaphora.prompt import Lengths, Prompt
from anaphora.types import (
    Begin,
    Delta,
    End,
    Finish,
    FinishReason,
    Message,
    ModelInfo,
    Request,
    Scope,
    TextDelta,
    TextPart,
    TokenLogprob,
    ToolResultPart,
    ToolUseDelta,
    TopLogprob,
    Usage,
)

WORD = re.compile(r"\s*\S+\s*|\s+")
LOGPROB = -0.5
"""Of every word: an echo is as sure of each."""

EMULATED_INPUT_TOKENS = 1_000_000

Gate = Callable[[int], Awaitable[None]]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: str = "echo"
    max_input_tokens: int = 32_768
    """Prompt tokens plus `max_tokens` beyond this are a ContextTooLong."""
    emulates: bool = False
    """It also answers as any model that a caching profile is known for, with `EMULATED_INPUT_TOKENS` of context."""
    tokenizer: str = ""
    """A `tokenizer.json` to count with. Empty: the rule of `echo_lengths`."""


class EchoBackend:
    """`gate(i)` is awaited before the i-th delta of a run (Begin is 0): a test forces interleavings with it, and makes a run
    hang (a gate that never opens) or fail (a gate that raises) wherever it likes. `runs`, `finished` and `closed` count."""

    def __init__(self, options: Options | None = None, *, gate: Gate | None = None, clock: Clock | None = None) -> None:
        self.options = options or Options()
        self.gate = gate
        self.runs = 0
        self.finished = 0
        """Runs whose End was given out."""
        self.closed = 0
        """Runs that are over, however it came to that. `runs - closed` are under way."""
        self._clock = clock or SystemClock()
        self._started = False
        tokenizer = self.options.tokenizer
        self._counter = echo_lengths.Counter(echo_lengths.of_model(tokenizer) if tokenizer else None)
        self.takes_provider_blocks = self.options.emulates
        own = ModelInfo(self.options.model, max_input_tokens=self.options.max_input_tokens, fingerprint="echo-1")
        names = [profile.name for profile in known()] if self.options.emulates else []
        self._models = (own, *(_emulated(name) for name in names if name != own.id))

    async def start(self) -> None:
        self._started = True

    def ready(self) -> bool:
        return self._started

    async def models(self) -> tuple[ModelInfo, ...]:
        return self._models

    def model(self, name: str) -> ModelInfo | None:
        """A model that is not among `models`, but is answered for all the same: a variant, a snapshot, a platform's name."""
        return _emulated(name) if self.options.emulates and match(name) is not None else None

    async def run(self, request: Request) -> AsyncIterator[Delta]:
        started_s = self._clock.monotonic_s()
        prompt_tokens = self._prompt_tokens(request)
        context = self.options.max_input_tokens
        if request.model != self.options.model and self.model(request.model) is not None:
            context = EMULATED_INPUT_TOKENS
        room = context - prompt_tokens
        if room < (request.max_tokens or 0):
            raise ContextTooLong(f"The prompt has {prompt_tokens} tokens; the context holds {context}.")
        self.runs += 1
        try:
            # Nobody sees the words of a whole answer one by one; whoever set a gate counts on them.
            whole = not request.stream and self.gate is None
            for index, delta in enumerate(_answer(request, prompt_tokens, room, whole)):
                if self.gate is not None:
                    await self.gate(index)
                if isinstance(delta, End):
                    self.finished += 1
                    delta = End(delta.usage, self._clock.monotonic_s() - started_s)
                yield delta
        finally:
            self.closed += 1

    async def count_tokens(self, request: Request) -> int:
        return self._prompt_tokens(request)

    async def measure(self, request: Request, prompt: Prompt) -> Lengths | None:
        return self._counter.lengths(prompt)

    def _prompt_tokens(self, request: Request) -> int:
        texts = [_text(message) for message in request.messages] + [_raw(prompt) for prompt in request.prompts]
        return max(1, sum(map(self._counter.num_tokens, texts)))

    async def forget(self, scope: Scope) -> int:
        return 0

    async def stats(self) -> dict[str, Any]:
        running = self.runs - self.closed
        return {"num_requests_running": running, "num_requests_waiting": 0, "kv_cache_usage_perc": 0.0}

    async def aclose(self) -> None:
        self._started = False


def fail_at(index: int, error: Exception | None = None) -> Gate:
    """A gate that lets `index` deltas through and then raises `error` (BackendFailed by default)."""

    async def gate(at: int) -> None:
        if at == index:
            raise error or BackendFailed("The echo was told to fail.")

    return gate


def _emulated(name: str) -> ModelInfo:
    return ModelInfo(name, max_input_tokens=EMULATED_INPUT_TOKENS, fingerprint="echo-1")


# -- what it says ------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return WORD.findall(text)


def _text(message: Message) -> str:
    texts: list[str] = []
    for part in message.content:
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif isinstance(part, ToolResultPart):
            texts += [inner.text for inner in part.content if isinstance(inner, TextPart)]
    return "".join(texts)


def _raw(prompt: str | tuple[int, ...]) -> str:
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def _questions(request: Request) -> list[str]:
    """The text that each group of `n` choices says back."""
    if request.prompts:
        return [_raw(prompt) for prompt in request.prompts]
    return [next((_text(message) for message in reversed(request.messages) if message.role == "user"), "")]


def _answer(request: Request, prompt_tokens: int, room: int, whole: bool) -> Iterator[Delta]:
    """`whole`: each choice's text in one delta."""
    limit = room if request.max_tokens is None else request.max_tokens
    yield Begin(request.model, Usage(input_tokens=prompt_tokens))
    output_tokens = 0
    for number, question in enumerate(_questions(request)):
        for copy in range(request.sampling.n):
            for delta, tokens in _choice(request, number * request.sampling.n + copy, question, limit, whole):
                output_tokens += tokens
                yield delta
    yield End(Usage(input_tokens=prompt_tokens, output_tokens=output_tokens))


def _choice(request: Request, index: int, question: str, limit: int, whole: bool) -> Iterator[tuple[Delta, int]]:
    """Deltas, and how many output tokens each is."""
    if request.tool_choice.mode in ("any", "tool") and request.tools and limit:
        name = request.tool_choice.name or request.tools[0].name
        yield ToolUseDelta(index, 0, "", f"call_{index}", name), 1
        yield ToolUseDelta(index, 0, json.dumps({"text": question})), 1
        yield Finish(index, "tool_use"), 0
        return
    answer, stop = _stopped(question, request.sampling.stop)
    words = _words(answer)
    reason: FinishReason = "stop_sequence" if stop else "end_turn"
    if len(words) > limit or not limit:
        words, reason, stop = words[:limit], "max_tokens", None
    if request.echo and request.prompts:
        words = _words(question) + words
    if words and whole and request.sampling.logprobs is None:
        yield TextDelta(index, "".join(words)), len(words)
    else:
        for word in words:
            yield TextDelta(index, word, _logprobs(word, request.sampling.logprobs)), 1
    yield Finish(index, reason, stop), 0


def _stopped(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """`text` up to the first stop string in it, and that string."""
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return text, None
    at, stop = min(found)
    return text[:at], stop


def _logprobs(word: str, num_top: int | None) -> tuple[TokenLogprob, ...]:
    if num_top is None:
        return ()
    return (TokenLogprob(word, LOGPROB, (TopLogprob(word, LOGPROB),) if num_top else ()),)
