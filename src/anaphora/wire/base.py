"""What every dialect does, and the pieces they share.

A dialect turns a request body into a `types.Request` and an answer into bytes. The same question gives the same `Request`
whichever dialect it came in (apart from `stream`), because it is one entry in every cache:

- A string is one text part. Empty text is no part.
- Neighbouring messages of one role (and name) are one message; system text before the conversation is one system message.
- Tool results are parts of a user message; OpenAI's consecutive `tool` messages become one, and a user message behind them
  joins it, as in an Anthropic body. Tool arguments are compact JSON with their keys in the order given.
- A last message of the assistant is the beginning of the answer, in every dialect: the backend continues it.
- Saying what is the default anyway (`n: 1`, `tool_choice: "auto"`, `thinking: {"type": "disabled"}`) says nothing.
- Null is absent. Unknown top-level fields are kept in `Request.extra`; unknown fields further down are refused.
- Cache marks (`cache_control`, `prompt_cache_breakpoint`) leave no trace: moving them is asking the same question.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol

import msgspec

from anaphora.errors import BackendFailed, InvalidRequest, ServiceError
from anaphora.prompt import Diagnosis, Prompt
from anaphora.types import (
    Completion,
    Delta,
    End,
    Message,
    Part,
    Raw,
    Request,
    Role,
    Said,
    Sampling,
    Tenant,
    TextPart,
    Tool,
    ToolChoice,
)
from anaphora.wire.fields import Json, bad_value, decode_object, opt_int, opt_list, opt_number, opt_string, strings

encode = msgspec.json.Encoder().encode


class Ids(msgspec.Struct, frozen=True):
    """What is fresh in every rendering of an answer. All ids inside one rendering are derived from `id`."""

    id: str
    """Letters and digits, at most 24 of them: OpenAI allows 40 characters in a tool call's id."""
    created_s: int
    """Unix time, whole seconds."""

    def call(self, prefix: str, choice: int, index: int) -> str:
        """The id of the `index`-th tool call of a choice."""
        return f"{prefix}{self.id}_{choice}_{index}"


def new_ids(now_s: float) -> Ids:
    return Ids(secrets.token_hex(12), int(now_s))


class Rendering(msgspec.Struct, frozen=True, omit_defaults=True):
    """What only rendering needs to know of a request: how the answer is written down, never what it says."""

    model: str
    """The id that the client asked for; answers repeat it."""
    stream: bool = False
    include_usage: bool = False
    """OpenAI streams: one more chunk with usage before the end."""
    num_choices: int = 1
    logprobs: bool = False
    version: str | None = None
    """Anthropic: API version."""
    repeated: dict[str, Any] = {}
    """Responses: fields of the body that the response object repeats."""
    writes_billed: bool = False
    """OpenAI: a profile that bills cache writes is in force, so usage tells even that there are none. Set by the server."""
    diagnosed: bool = False
    """The prompt was compared with an earlier one, as the client wished; the answer says what came of it. Set by the server."""
    diagnosis: Diagnosis | None = None
    """What came of it. None: nothing changed that was not added at the end."""


class Parsed(msgspec.Struct, frozen=True, dict=True):
    request: Request
    rendering: Rendering
    read_prompt: Callable[[], Prompt]

    @cached_property
    def prompt(self) -> Prompt:
        """The same body as prompt caching sees it. Read when first asked for: an answer from memory does without."""
        return self.read_prompt()


class StreamWriter(Protocol):
    """Writes one streamed answer. Purely a state machine: deltas in, bytes out."""

    def feed(self, delta: Said) -> bytes:
        """The events that `delta` causes; possibly none."""
        ...

    def fail(self, error: ServiceError, passed: bytes = b"") -> bytes:
        """The dialect's error event; the clean terminator is never sent after it. `passed`: where an upstream's own events
        were sent in the place of what `feed` gives, the last of them."""
        ...


class Dialect(ABC):
    """One wire format. Stateless: one instance serves all requests."""

    name: str
    answer_prefix: str
    """In front of `Ids.id` it makes the id of an answer."""

    def answer_id(self, ids: Ids) -> str:
        return self.answer_prefix + ids.id

    @abstractmethod
    def parse(self, body: bytes, *, tenant: Tenant, version: str | None = None) -> Parsed:
        """Raises `InvalidRequest` whose `param` is the path of the wrong field in the dialect's own style.

        `version` is the API version from the headers, for dialects that have one.
        """

    def unread(self, body: bytes, *, tenant: Tenant) -> Parsed:
        """A body that `parse` refuses, for an upstream that may know better: whatever it says is part of the question.

        Raises `InvalidRequest` where not even the model can be made out."""
        fields = decode_object(body)
        model = fields.get("model")
        if not isinstance(model, str) or not model:
            raise InvalidRequest("The body names no model.", param="model")
        stream = fields.get("stream") is True
        said = {key: value for key, value in fields.items() if key not in NEUTRAL and key != "model"}
        family: Literal["anthropic", "openai"] = "anthropic" if self.name == "anthropic" else "openai"
        request = Request(model=model, tenant=tenant, stream=stream, extra=said)
        return Parsed(request, Rendering(model, stream), lambda: Prompt(family, model, ()))

    @abstractmethod
    def render(self, completion: Completion, rendering: Rendering, ids: Ids) -> bytes:
        """The whole answer as one JSON body."""

    @abstractmethod
    def writer(self, rendering: Rendering, ids: Ids) -> StreamWriter: ...

    @abstractmethod
    def render_error(self, error: ServiceError, request_id: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, JSON body and headers (content type included)."""

    async def render_stream(self, deltas: AsyncIterator[Delta], rendering: Rendering, ids: Ids) -> AsyncIterator[bytes]:
        """The answer as SSE while it is made. A `ServiceError` becomes the dialect's error event and ends the stream.

        So does an answer that stops without its `End`. Closing this generator closes `deltas`.
        """
        writer = self.writer(rendering, ids)
        ended = False
        try:
            async for delta in deltas:
                ended = isinstance(delta, End)
                if not isinstance(delta, Raw) and (events := writer.feed(delta)):
                    yield events
            if not ended:
                yield writer.fail(BackendFailed("The answer was cut off."))
        except ServiceError as error:
            yield writer.fail(error)
        finally:
            if isinstance(deltas, AsyncGenerator):
                await deltas.aclose()

    def replay_stream(self, deltas: Iterable[Said], rendering: Rendering, ids: Ids) -> Iterator[bytes]:
        """The same for an answer that is already there."""
        writer = self.writer(rendering, ids)
        return filter(None, map(writer.feed, deltas))


# -- shared pieces of parsing --------------------------------------------------------------------------------------------

NEUTRAL = frozenset(
    {
        "stream",  # form of the answer, not its content
        "stream_options",  # likewise
        "metadata",  # the client's own notes
        "user",  # who asks, for abuse tracking
        "safety_identifier",  # likewise
        "store",  # whether the provider keeps the answer
        "service_tier",  # price and priority
        "prompt_cache_key",  # routing affinity
        "prompt_cache_retention",  # how long a prefix is kept
        "prompt_cache_options",  # likewise (Responses reads `prewarm` from it first)
        "prompt_cache_breakpoint",  # where a prefix ends
        "cache_control",  # likewise
        "diagnostics",  # asks why the cache missed
    }
)
"""Body fields proven not to change the answer: they are not part of the question. Everything else is."""

SAMPLING_FIELDS = frozenset({"temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty"})

# Fields Anaphora does not interpret, said with the value that they have anyway.
_DEFAULTS: dict[str, object] = {
    "logit_bias": {},
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "speed": "standard",
    "truncation": "disabled",
    "output_config": {},
}


def extra_fields(body: Json, known: frozenset[str]) -> Json:
    """Top-level fields outside `known` that say something."""
    return {key: value for key, value in body.items() if key not in known and not _says_nothing(key, value)}


def _says_nothing(key: str, value: object) -> bool:
    if value is None or (key in _DEFAULTS and _DEFAULTS[key] == value):
        return True
    return key == "thinking" and isinstance(value, dict) and value.get("type") == "disabled"


def cache_salt(body: Json) -> str | None:
    salt = opt_string(body, "cache_salt")
    if salt == "":
        raise bad_value("must not be empty", "cache_salt")
    return salt


def read_sampling(
    body: Json, *, max_temperature: int, stop: tuple[str, ...] = (), n: int = 1, logprobs: int | None = None
) -> Sampling:
    """The fields of `SAMPLING_FIELDS`; `top_k`, `min_p` and `seed` are understood in every dialect."""
    if SAMPLING_FIELDS.isdisjoint(body):
        return Sampling(stop=stop, n=n, logprobs=logprobs)
    top_k = opt_int(body, "top_k", -1)
    return Sampling(
        temperature=opt_number(body, "temperature", 0, max_temperature),
        top_p=opt_number(body, "top_p", 0, 1),
        top_k=0 if top_k == -1 else top_k,  # both mean: no limit
        min_p=opt_number(body, "min_p", 0, 1),
        seed=opt_int(body, "seed", -(2**63), 2**63 - 1),
        frequency_penalty=opt_number(body, "frequency_penalty", -2, 2) or 0.0,
        presence_penalty=opt_number(body, "presence_penalty", -2, 2) or 0.0,
        stop=stop,
        n=n,
        logprobs=logprobs,
    )


def read_stop(body: Json, key: str) -> tuple[str, ...]:
    """One stop string or an array of them."""
    value = body.get(key)
    return strings([value], key) if isinstance(value, str) else strings(opt_list(body, key), key)


def compact_arguments(arguments: str) -> str:
    """Tool arguments as compact JSON, keys in their order; none are {}; text that is no JSON object stays as it is."""
    if not arguments:
        return "{}"
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.MsgspecError, RecursionError):
        return arguments
    return encode(value).decode() if isinstance(value, dict) else arguments


_TOOL_SWITCHES = frozenset({"strict", "defer_loading", "eager_input_streaming"})


def tool_extra(tool: Json, known: frozenset[str]) -> Json:
    """Fields of a tool definition outside `known` that say something; documented switches are off by default."""
    return {
        key: value
        for key, value in tool.items()
        if key not in known and value is not None and not (value is False and key in _TOOL_SWITCHES)
    }


def settled_choice(choice: ToolChoice, tools: Sequence[Tool], *path: str) -> ToolChoice:
    """`choice` made to fit `tools`. Without tools, and where none may be called, there is nothing to choose."""
    if choice.mode in ("any", "tool") and not tools:
        raise bad_value("may only demand a tool when tools are given", *path)
    if choice.mode == "tool" and all(tool.name != choice.name for tool in tools):
        raise bad_value(f"Tool '{choice.name}' not found in provided tools", *path)
    if not tools:
        return ToolChoice()
    return ToolChoice(mode="none") if choice.mode == "none" else choice


def text_parts(text: str) -> tuple[TextPart, ...]:
    return (TextPart(text),) if text else ()


class Turns:
    """Collects messages in order, joining neighbours of one role and name."""

    def __init__(self) -> None:
        self._turns: list[tuple[Role, str | None, list[Part]]] = []

    def add(self, role: Role, parts: Iterable[Part], name: str | None = None) -> None:
        if self._turns and self._turns[-1][0] == role and self._turns[-1][1] == name:
            self._turns[-1][2].extend(parts)
        else:
            self._turns.append((role, name, list(parts)))

    def messages(self) -> tuple[Message, ...]:
        return tuple(Message(role, tuple(parts), name) for role, name, parts in self._turns)
