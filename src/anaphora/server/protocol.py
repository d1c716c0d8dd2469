"""HTTP as uvicorn speaks it, with the head of an answer in one piece with the beginning of its body.

An ASGI application says its head and its body one after the other, and uvicorn writes each as it comes: two system calls and
two packets, of which the first wakes a client that can do nothing with it yet.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEAD = b"HTTP/1.1 "


class Protocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", HeadWithBody(transport)))


class HeadWithBody:
    """A transport that keeps what begins as a head does until the next piece is written, but no longer than until the event
    loop goes on to something else. All else is `transport`'s own. Nothing changes its order."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._head = b""
        # For every piece of a stream: found here they cost less than by `__getattr__`.
        self._write, self.is_closing = transport.write, transport.is_closing

    def write(self, data: bytes) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.writelines((head, data))
        elif data.startswith(_HEAD):
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            self._write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            if not self.is_closing():  # else the client has left meanwhile, and writing may raise
                self._write(head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
