"""What the gateway and the engine process say to each other over a Unix socket.

Frames are a 4-byte big-endian length and that many bytes of MessagePack: one tagged union per direction. No pickle. Every
request carries an id chosen by the client, unique on its connection.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec

from anaphora import errors
from anaphora.prompt import Prompt
from anaphora.types import Delta, ModelInfo, Request, Scope

MAX_FRAME = 256 * 1024 * 1024

# -- gateway → engine --------------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, tag="submit", array_like=True):
    id: int
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    id: int


class CountTokens(msgspec.Struct, frozen=True, tag="count", array_like=True):
    id: int
    request: Request


class Measure(msgspec.Struct, frozen=True, tag="measure", array_like=True):
    id: int
    request: Request
    prompt: Prompt
    """Its blocks without their contents, which `request` has."""


class Forget(msgspec.Struct, frozen=True, tag="forget", array_like=True):
    id: int
    scope: Scope


class Stats(msgspec.Struct, frozen=True, tag="stats", array_like=True):
    id: int


ToEngine = Submit | Cancel | CountTokens | Measure | Forget | Stats

# -- engine → gateway --------------------------------------------------------------------------------------------------


class Status(msgspec.Struct, frozen=True, tag="status", array_like=True):
    """Sent on connection and at every change. `ready` with models, or what is being waited for."""

    stage: str
    models: tuple[ModelInfo, ...] = ()
    ready: bool = False
    refused: str | None = None
    """Why the engine will never be ready as configured."""


class Deltas(msgspec.Struct, frozen=True, tag="deltas", array_like=True):
    id: int
    deltas: tuple[Delta, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    id: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None


class Reply(msgspec.Struct, frozen=True, tag="reply", array_like=True):
    id: int
    value: Any


FromEngine = Status | Deltas | Failed | Reply

# -- frames ------------------------------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

M = TypeVar("M")


def frame(message: ToEngine | FromEngine) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


async def read_frame(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[M]) -> M | None:
    """The next message, or None where the stream ends, cleanly or torn, or says what no message is."""
    try:
        length = int.from_bytes(await reader.readexactly(4), "big")
        if length > MAX_FRAME:
            return None
        return decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
        return None


def failed(id: int, error: errors.ServiceError) -> Failed:
    return Failed(id, type(error).__name__, error.message, error.param, error.code, error.retry_after_s)


_KINDS: dict[str, type[errors.ServiceError]] = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServiceError)
}


def error_of(message: Failed) -> errors.ServiceError:
    kind = _KINDS.get(message.kind, errors.BackendFailed)
    return kind(message.message, param=message.param, code=message.code, retry_after_s=message.retry_after_s)
