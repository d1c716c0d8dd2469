"""An answer made of bytes that a test gave: whatever no dialect here knows."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from anaphora.testing.upstream.backend import Pace
from anaphora.testing.upstream.script import Answer
from anaphora.wire import sse

if TYPE_CHECKING:
    from starlette.types import Receive, Send
    from starlette.types import Scope as Connection

_NAMED = frozenset({"/v1/messages", "/v1/responses"})
"""Paths whose events have names."""


class RawAnswer:
    """A stream where the answer has events, else one body. Nothing is known of its tokens: only `Pace.base_latency_s` and the
    rate of decoding, one event for a token, have a part in its pace."""

    def __init__(self, answer: Answer, pace: Pace) -> None:
        self._answer = answer
        self._pace = pace

    async def __call__(self, connection: Connection, receive: Receive, send: Send) -> None:
        answer, pace = self._answer, self._pace
        await asyncio.sleep(pace.first_s(0))
        kind = sse.CONTENT_TYPE if answer.events else "application/json"
        headers = {"content-type": kind, **{name.lower(): value for name, value in answer.headers.items()}}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": raw})
        if not answer.events:
            await send({"type": "http.response.body", "body": msgspec.json.encode(answer.body)})
            return
        for event in answer.events:
            await send({"type": "http.response.body", "body": _framed(event, connection["path"]), "more_body": True})
            await asyncio.sleep(pace.decode_s(2))
        await send({"type": "http.response.body", "body": b""})


def _framed(event: str | dict[str, Any], path: str) -> bytes:
    if isinstance(event, str):
        return event.encode()
    payload = msgspec.json.encode(event)
    if path in _NAMED:
        return sse.event(str(event.get("type", "message")).encode(), payload)
    return sse.data(payload)
