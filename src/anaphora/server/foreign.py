"""What of a provider's API Anaphora itself does not know: files, batches, audio. It goes to an upstream and back as it is."""

from __future__ import annotations

import asyncio

import msgspec

from anaphora.backends.base import Foreign, Forwarded
from anaphora.server import passing
from anaphora.server.endpoint import Call, Endpoint, dialect_of

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


class _Named(msgspec.Struct, frozen=True):
    model: str = ""


class Elsewhere(Endpoint):
    """Any path below `/v1/` that nothing else is at. Nothing of it is remembered or accounted for, but it counts as a
    request where the tenant has limits."""

    async def answer(self, call: Call) -> None:
        await self.pass_on(call, await call.body())

    async def pass_on(self, call: Call, body: bytes) -> None:
        connection = call.connection
        query = connection["query_string"].decode("latin-1")
        path = connection["path"] + (f"?{query}" if query else "")
        dialect = dialect_of(connection["path"], call.head)
        native = passing.native(dialect.name, body, call.head, own_keys=bool(self.api.keyring), further=("content-type",))
        asked = Foreign(dialect.name == "anthropic", connection["method"], path, native, _model(body))
        if self.api.books is not None and self.api.books.allowance is not None:
            self.api.books.allowance.admit(call.tenant)
        forwarded = await self.api.gateway.forward(asked)
        copying = asyncio.create_task(_copy(call, forwarded), name="anaphora-forward")
        gone = asyncio.create_task(call.gone(), name="anaphora-client-gone")
        try:
            await asyncio.wait((copying, gone), return_when=asyncio.FIRST_COMPLETED)
            if copying.done():
                await copying  # its error, if there is one
        finally:
            for task in (copying, gone):
                task.cancel()
            await asyncio.wait((copying, gone))
            await forwarded.chunks.aclose()


async def _copy(call: Call, forwarded: Forwarded) -> None:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in forwarded.headers]
    await call.sender.start(forwarded.status, headers)
    async for chunk in forwarded.chunks:
        await call.sender.more(chunk)
    await call.sender.last(b"")


def _model(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Named).model
    except msgspec.MsgspecError:
        return ""
