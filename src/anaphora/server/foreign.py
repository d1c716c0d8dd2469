"""What of a provider's API Anaphora itself does not know: files, batches, audio. It goes to an upstream and back as it is."""

from __future__ import annotations

import asyncio
from typing import Literal

from anaphora.backends.base import Foreign, Forwarded
from anaphora.errors import ServiceError
from anaphora.events import Answered
from anaphora.server import headers, passing
from anaphora.server.endpoint import Call, Endpoint, dialect_of
from anaphora.types import Usage
from anaphora.wire.upstream_other import asked_model, stated

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")

MAX_LOOKED_AT = 4 << 20
"""Bytes of an answer that is looked at for what it cost: a picture or two with their usage."""

_Outcome = Literal["finished", "failed", "left"]


class Elsewhere(Endpoint):
    """Any path below `/v1/` that nothing else is at. Nothing of it is remembered. It counts as a request where the tenant has
    limits; what is posted costs what the answer says it does."""

    async def answer(self, call: Call) -> None:
        await self.pass_on(call, await call.body())

    async def pass_on(self, call: Call, body: bytes) -> None:
        connection = call.connection
        query = connection["query_string"].decode("latin-1")
        path = connection["path"] + (f"?{query}" if query else "")
        dialect = dialect_of(connection["path"], call.head)
        native = passing.native(dialect.name, body, call.head, own_keys=bool(self.api.keyring), further=("content-type",))
        model = asked_model(body, call.head.get(b"content-type", b"").decode("latin-1"))
        asked = Foreign(dialect.name == "anthropic", connection["method"], path, native, model)
        costs = connection["method"] == "POST"  # the other methods look at what is there, or take it away
        passage = _Passage(self, call, asked)
        if self.api.books is not None and self.api.books.allowance is not None:
            await self.api.books.allowance.admit(call.tenant, costs=costs)
        try:
            await passage.go()
        finally:
            if costs:
                self.api.emit(passage.over())


class _Passage:
    """One request on its way to an upstream and back."""

    def __init__(self, endpoint: Elsewhere, call: Call, asked: Foreign) -> None:
        self._gateway = endpoint.api.gateway
        self._clock = endpoint.api.clock
        self._call = call
        self._asked = asked
        self._tag = headers.tag(call.head.get(b"x-anaphora-tag"))
        self._started_s = self._clock.monotonic_s()
        self._outcome: _Outcome = "failed"
        self._upstream = ""
        self._begun = False
        self._kept: list[bytes] | None = None
        self._size = 0

    async def go(self) -> None:
        forwarded = await self._gateway.forward(self._asked)
        given = dict(forwarded.headers)
        self._upstream = given.get("x-anaphora-upstream", "")
        if forwarded.status < 400:
            self._outcome, self._begun = "left", True
            self._kept = [] if _is_json(given) else None
        copying = asyncio.create_task(self._copy(forwarded), name="anaphora-forward")
        gone = asyncio.create_task(self._call.gone(), name="anaphora-client-gone")
        try:
            await asyncio.wait((copying, gone), return_when=asyncio.FIRST_COMPLETED)
            if copying.done():
                await copying  # its error, if there is one
        finally:
            for task in (copying, gone):
                task.cancel()
            await asyncio.wait((copying, gone))
            await forwarded.chunks.aclose()

    async def _copy(self, forwarded: Forwarded) -> None:
        sender = self._call.sender
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in forwarded.headers]
        await sender.start(forwarded.status, raw)
        try:
            async for chunk in forwarded.chunks:
                self._keep(chunk)
                await sender.more(chunk)
        except ServiceError:
            self._outcome = "failed"
            raise
        if self._begun:
            self._outcome = "finished"
        await sender.last(b"")

    def _keep(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._kept is not None and self._size <= MAX_LOOKED_AT:
            self._kept.append(chunk)
        else:
            self._kept = None

    def over(self) -> Answered:
        """What came of it, for the books."""
        call, name = self._call, self._asked.model
        model, usage = "", None
        if self._outcome == "finished" and self._kept is not None:
            model, usage = stated(b"".join(self._kept), anthropic=self._asked.anthropic)
        return Answered(
            tenant=call.tenant,
            model=name if self._gateway.hosts(name) else "",  # clients may name anything
            source="passed",
            outcome=self._outcome,
            usage=usage or Usage(),
            reasons=(),
            elapsed_s=self._clock.monotonic_s() - self._started_s,
            first_s=None,
            asked=name,
            answered=model or name,
            upstream=self._upstream,
            begun=Usage() if self._begun and self._outcome != "finished" else None,
            request_id=f"req_{call.ids.id}",
            workspace=call.workspace,
            tag=self._tag,
        )


def _is_json(given: dict[str, str]) -> bool:
    return given.get("content-type", "").startswith("application/json") and not given.get("content-encoding")
