"""The client's side of the dialects: a `Request` as a body for an upstream, and its answer as deltas.

What a dialect cannot say is refused (`InvalidRequest` names it), never left out. A request's own dialect is where it came from
(`Request.native`): its fields that Anaphora does not interpret go back there as they are, and nowhere else. `extensions` says
that an upstream takes what Anaphora, vLLM, SGLang and llama.cpp take beyond the provider's API.

Left out on purpose, because another model can make nothing of it: earlier thinking, unless the dialect can carry it. What does
not change the answer (`base.NEUTRAL`) is not in a `Request` at all.

Reading an answer is forgiving: what deltas cannot say makes it unfaithful (`End.faithful`), never fails it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import msgspec

from anaphora.errors import BackendFailed, InvalidRequest, UpstreamFailed
from anaphora.types import Delta, Raw, Request, Said, Usage
from anaphora.wire.fields import Json, decode_object
from anaphora.wire.sse import Event, Splitter

UNKNOWN_USAGE = Usage(details={"unknown": 1})
"""Of an answer that came without: zeros that are no counts. Summed up, `unknown` is the number of such answers."""


class UpstreamError(msgspec.Struct, frozen=True):
    """What an upstream said instead of an answer."""

    status: int
    message: str
    """Never empty."""
    code: str | None = None
    """The provider's own word for it: OpenAI's `code`, or else its `type`; Anthropic's `type`."""
    param: str | None = None
    readable: bool = False
    """The body was an error in the dialect's own form."""


class Body(dict[str, object]):
    """A body to send, and what only the reader of its answer needs to know."""

    hide_usage = False
    """The client did not ask for the chunk with usage that was asked of the upstream."""


class Reader(Protocol):
    """Reads one streamed answer."""

    deltas: list[Delta]
    """What the latest chunk means, also where `feed` raised for what came behind that."""

    def feed(self, chunk: bytes) -> list[Delta]:
        """What the events that end in `chunk` mean: for each its `Raw`, then its deltas. Nothing comes after End.

        Raises UpstreamFailed for an error event, BackendFailed for what is no stream of this dialect.
        """
        ...


class UpstreamDialect(Protocol):
    name: str
    """As `wire.base.Dialect.name`."""
    path: str

    def write(self, request: Request, *, model: str) -> Json:
        """Raises InvalidRequest naming what cannot be said in this dialect."""
        ...

    def passed(self, native: bytes, *, model: str) -> Json:
        """A client's own body of this dialect, which names another model. Everything else stays as it is, and in its order."""
        ...

    def reader(self, body: Json) -> Reader:
        """For the streamed answer to `body`, as `write` or `passed` made it."""
        ...

    def read_whole(self, data: bytes) -> list[Delta]:
        """First the `Raw` of all of it. Raises BackendFailed for what is no answer."""
        ...

    def read_error(self, status: int, data: bytes) -> UpstreamError:
        """What an answer of another status than 200 says, whatever it is."""
        ...


EFFORTS = frozenset({"low", "medium", "high", "xhigh", "max"})
"""Words for a model's effort that both providers have."""

UNKNOWN_FILE = "a file is only known to the provider that it was sent to"


# -- writing -------------------------------------------------------------------------------------------------------------


def cannot_say(path: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{path}: {why}", param=path, code="unsupported_parameter")


def is_own(request: Request, dialect: str) -> bool:
    """Whether `request` came in `dialect`."""
    return request.native is not None and request.native.dialect == dialect


def renamed(native: bytes, model: str) -> Body:
    body = Body(decode_object(native))
    body["model"] = model
    return body


# -- reading -------------------------------------------------------------------------------------------------------------


class EventReader(ABC):
    """Splits a stream into events. A dialect says what each means."""

    dialect: str

    def __init__(self) -> None:
        self._splitter = Splitter()
        self.faithful = True
        self.ended = False
        self.hidden = False
        """The event that is being read is not for the client."""
        self.deltas: list[Delta] = []

    def feed(self, chunk: bytes) -> list[Delta]:
        deltas = self.deltas = []
        failure = None
        try:
            events = self._splitter.feed(chunk)
        except BackendFailed as error:
            events, failure = self._splitter.events, error
        for event in events:
            if self.ended:
                break
            self.hidden = False
            said = () if event.data is None else self.read(event, event.data)
            if not self.hidden:
                deltas.append(Raw(self.dialect, event.raw))
            deltas += said
        if failure is not None and not self.ended:
            raise failure
        return deltas

    @abstractmethod
    def read(self, event: Event, data: bytes) -> Sequence[Said]: ...


def json_object(data: bytes) -> Json:
    """Raises BackendFailed for what is none."""
    try:
        return _decode(data)
    except UNREADABLE as error:
        raise BackendFailed(f"The upstream's answer is malformed: {error}") from error


UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that it cannot read."""
_decode = msgspec.json.Decoder(dict[str, object]).decode


def malformed(what: str) -> BackendFailed:
    return BackendFailed(f"The upstream's answer is malformed: {what}.")


def object_of(value: object) -> Json:
    """`value` where it is an object; what is none says nothing."""
    return value if isinstance(value, dict) else {}


def objects_of(value: object) -> list[Json]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text_of(value: object) -> str:
    return value if isinstance(value, str) else ""


def count_of(value: object) -> int:
    """A number of tokens; servers send null, and decimals."""
    return max(0, int(value)) if isinstance(value, int | float) else 0


def before_answer(usage: Usage) -> Usage:
    """`usage` as it is known before the first token."""
    return msgspec.structs.replace(usage, output_tokens=0)


def says_more(owner: Json, known: frozenset[str]) -> bool:
    """Whether `owner` has fields beyond `known` that hold anything."""
    return any(key not in known and value not in (None, "", [], {}, False) for key, value in owner.items())


def stream_failure(error: UpstreamError, dialect: str, data: bytes) -> UpstreamFailed:
    """An error event. Its status is what the same error would have had before the stream began."""
    again = error.status in (429, 503, 529)
    return UpstreamFailed(
        error.message,
        error.status,
        param=error.param,
        code=error.code,
        elsewhere=again or error.status >= 500,
        again=again,
        dialect=dialect,
        body=data,
    )


_EXCERPT_CHARS = 300


def unreadable_error(status: int, data: bytes) -> UpstreamError:
    """A proxy's page, or nothing at all."""
    text = " ".join(data[: 1 << 14].decode("utf-8", "replace").split())
    if text[:1] == "<" or not any(map(str.isalpha, text)):
        return UpstreamError(status, f"The upstream answered with status {status}.")
    return UpstreamError(status, text[:_EXCERPT_CHARS])
