"""One request of a test upstream and its answer on the way out, where most faults happen. Plain ASGI."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anaphora.testing.upstream.backend import Orders, pause
from anaphora.testing.upstream.records import Record
from anaphora.testing.upstream.script import BREAKS, MALFORMS, Fault

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Send
    from starlette.types import Scope as Connection

_EVENT = re.compile(rb".+?(?:\n\n|\Z)", re.DOTALL)
_OWN_HEADERS = re.compile(rb"x-anaphora-|cache-status$|age$|content-length$")
"""That no provider sends; and the length, which is known anew."""
_PAGE = b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body><h1>502 Bad Gateway</h1></body>\r\n</html>\r\n"


class Exchange:
    """`await exchange.run(app)` has `app` answer. Whoever is told to by a fault ends it in another way."""

    def __init__(
        self,
        connection: Connection,
        body: bytes,
        receive: Receive,
        send: Send,
        *,
        record: Record,
        orders: Orders,
        headers: Callable[[int], list[tuple[bytes, bytes]]],
    ) -> None:
        """`headers`: those that go out with every answer of a status."""
        self.connection = connection
        self.body = body
        self.record = record
        self.orders = orders
        self.ended = asyncio.Event()
        """Nothing more can be sent: the client is gone, or a fault has ended the answer."""
        self._receive = receive
        self._send = send
        self._headers = headers
        self._head: Message | None = None
        self._body_read = False
        self._finished = False
        self._streams = False
        self._broken = False
        self._struck = False
        self._arrived_s = asyncio.get_running_loop().time()

    @property
    def _fault(self) -> Fault | None:
        """That is still to come, of those that happen on the way out."""
        return None if self._struck else self.orders.fault

    def elapsed_s(self) -> float:
        return asyncio.get_running_loop().time() - self._arrived_s

    async def run(self, app: ASGIApp) -> None:
        watch = asyncio.create_task(self._watch(), name="anaphora-testing-watch")
        try:
            await app(self.connection, self.receive, self.send)
            if self._broken:
                await watch  # the server must see its connection end before this does
        finally:
            watch.cancel()
            record = self.record
            if record.outcome == "running":
                record.outcome = "fault" if self.orders.failed else "finished"
            record.over_s = self.elapsed_s()

    async def receive(self) -> Message:
        if not self._body_read:
            self._body_read = True
            return {"type": "http.request", "body": self.body}
        await self.ended.wait()
        return {"type": "http.disconnect"}

    async def _watch(self) -> None:
        """Returns when the connection has ended."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._finished and not self.ended.is_set():
            self.record.left_s = self.elapsed_s()
            if self.record.outcome == "running":  # whoever leaves a spoiled answer has reason to
                self.record.outcome = "left"
        self.ended.set()

    def hang_up(self) -> None:
        """End the connection at once."""
        self.connection["state"]["transport"].abort()

    # -- the answer on its way out ---------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        if self.ended.is_set():
            return
        if message["type"] == "http.response.start":
            self._head = message  # waits until it is known what comes behind it
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._head is not None:
            head, self._head = self._head, None
            await self._begin(head, body, more)
            if self.ended.is_set():
                return
        if self._streams:
            await self._events(body, more)
        else:
            await self._whole(body, more)

    async def _begin(self, head: Message, body: bytes, more: bool) -> None:
        fault = self._fault
        if fault is not None and fault.kind == "slow":
            self._struck = True
            await pause(fault.wait_s, self.ended)
        if fault is not None and fault.kind in BREAKS and fault.at_event == 0:
            self._break(fault)
        if self.ended.is_set():
            return
        headers = [(name, value) for name, value in head["headers"] if not _OWN_HEADERS.match(name)]
        self._streams = (b"content-type", b"text/event-stream") in [(name, value[:17]) for name, value in headers]
        if not self._streams and not more:
            fault = self._fault
            length = len(body) // 2 if fault is not None and fault.kind in MALFORMS else len(body)
            headers.append((b"content-length", b"%d" % length))
        self.record.status = head["status"]
        self.record.first_s = self.elapsed_s()
        await self._send({**head, "headers": headers + self._headers(head["status"])})

    async def _events(self, body: bytes, more: bool) -> None:
        for event in _EVENT.findall(body):
            fault = self._fault
            if fault is not None and self.record.num_events == fault.at_event:
                event = await self._strike(fault, event)
            if self.ended.is_set():
                return
            self.record.num_events += 1
            await self._send({"type": "http.response.body", "body": event, "more_body": True})
        if not more:
            await self._last(b"")

    async def _strike(self, fault: Fault, event: bytes) -> bytes:
        """What goes out in the place of `event`."""
        if fault.kind == "stall":
            self._struck = True
            await pause(fault.wait_s, self.ended)
        elif fault.kind in BREAKS:
            self._break(fault)
        elif fault.kind == "malformed-json":
            self._struck = True
            self.record.outcome = "fault"
            return event[: max(event.rfind(b"{") + 1, len(event) // 2)] + b"\n\n"
        elif fault.kind == "malformed-sse":
            self.record.outcome = "fault"
            await self._last(_PAGE)
            self.ended.set()
        return event

    async def _whole(self, body: bytes, more: bool) -> None:
        fault = self._fault
        if fault is not None and fault.kind == "stall":
            self._struck = True
            await pause(fault.wait_s, self.ended)
        elif fault is not None and fault.kind in BREAKS:
            await self._send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            self._break(fault)
        elif fault is not None and fault.kind in MALFORMS:
            self.record.outcome = "fault"
            body = body[: len(body) // 2]
        if self.ended.is_set():
            return
        if more:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
        else:
            await self._last(body)

    async def _last(self, body: bytes) -> None:
        self._finished = True
        await self._send({"type": "http.response.body", "body": body})

    def _break(self, fault: Fault) -> None:
        """`cut` lets out what was written, then ends as a server does that dies; `reset` drops it."""
        self._broken = True
        self.record.outcome = "fault"
        self.ended.set()
        transport: Any = self.connection["state"]["transport"]
        if fault.kind == "cut":
            transport.close()
            return
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
