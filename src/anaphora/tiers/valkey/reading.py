"""Reading replies with large values in them.

The client library's own parsers take bytes through a stream's buffer and a parser's: at four or five copies of each value,
they and not the server are what limits reading. This one has the socket write to where a value is put together.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis._parsers import _AsyncRESP2Parser
from redis.exceptions import ConnectionError as LostConnection

_SCRATCH_BYTES = 64 << 10
_LARGE_BYTES = 64 << 10
_PENDING_BYTES = 1 << 20
_LOST = "the server closed the connection"


class _Inbox(asyncio.BufferedProtocol):
    """Takes a connection over from `before`, the stream's protocol, which goes on hearing of everything but data."""

    def __init__(self, before: asyncio.Protocol, transport: asyncio.Transport) -> None:
        self._before = before
        self._transport = transport
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._pending = bytearray()
        self._large = memoryview(b"")
        """Where a large value is put together; kept: memory that is new each time costs more than a copy."""
        self._target: memoryview | None = None
        """The part of it that is still missing: bytes go there directly."""
        self._waiter: asyncio.Future[None] | None = None
        self._paused = False
        self._lost = False

    async def line(self) -> bytes:
        while (end := self._pending.find(b"\r\n")) < 0:
            await self._more()
        line = self._taken(end)
        del self._pending[:2]
        return line

    async def exactly(self, length: int) -> bytes:
        have = len(self._pending)
        if have >= length or length < _LARGE_BYTES:
            while len(self._pending) < length:
                await self._more()
            return self._taken(length)
        if len(self._large) < length:
            self._large = memoryview(bytearray(length))
        value = self._large[:length]
        value[:have] = self._pending
        self._pending.clear()
        self._target = value[have:]
        try:
            while self._target:
                await self._more()
        finally:
            self._target = None
        return bytes(value)

    def idle(self) -> bool:
        """Connected, with nothing there to be read."""
        return not self._pending and not self._lost

    def _taken(self, length: int) -> bytes:
        with memoryview(self._pending) as pending:
            taken = bytes(pending[:length])
        del self._pending[:length]
        return taken

    async def _more(self) -> None:
        if self._lost:
            raise LostConnection(_LOST)
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- what the transport calls --------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._target or self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._target:
            self._target = self._target[nbytes:]
            if self._target:
                return
        else:
            self._pending += self._scratch[:nbytes]
            if len(self._pending) > _PENDING_BYTES and not self._paused:
                self._paused = True
                self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool | None:
        self._lost = True
        self._wake()
        return self._before.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._wake()
        self._before.connection_lost(exc)

    def pause_writing(self) -> None:
        self._before.pause_writing()

    def resume_writing(self) -> None:
        self._before.resume_writing()


class Parser(_AsyncRESP2Parser):
    """For `parser_class` of a connection. A read that was given up leaves it unusable: the connection is then closed."""

    _inbox: _Inbox

    def on_connect(self, connection: Any) -> None:
        super().on_connect(connection)  # type: ignore[no-untyped-call]
        transport = connection._writer.transport
        self._inbox = _Inbox(transport.get_protocol(), transport)
        transport.set_protocol(self._inbox)

    async def can_read(self) -> bool:
        return not self._inbox.idle()

    async def read_response(self, disable_decoding: bool = False) -> Any:
        if not self._connected:
            raise LostConnection(_LOST)
        return await self._read_response(disable_decoding=disable_decoding)

    async def _readline(self) -> bytes:
        return await self._inbox.line()

    async def _read(self, length: int) -> bytes:
        value = await self._inbox.exactly(length)
        await self._inbox.exactly(2)
        return value
