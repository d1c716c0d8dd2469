"""What every endpoint does: know the tenant, read a bounded body, send one response, and fail in the caller's dialect.

Plain ASGI: on a hit, a framework's request and response objects would cost more than the whole lookup.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
from starlette.types import Receive, Send
from starlette.types import Scope as Connection

from anaphora.clock import Clock
from anaphora.errors import BackendFailed, InvalidRequest, NotCached, ServiceError, TooLarge, UpstreamFailed
from anaphora.events import Emit, ignore
from anaphora.explain import Explanations
from anaphora.gateway import Gateway
from anaphora.ledger.accounts import Ledger
from anaphora.server import headers
from anaphora.server.auth import LOCAL, Keyring
from anaphora.server.books import Books
from anaphora.server.headers import RawHeaders
from anaphora.server.metrics import Metrics
from anaphora.types import Owner, Tenant
from anaphora.wire.anthropic import Anthropic
from anaphora.wire.base import Dialect, Ids, new_ids
from anaphora.wire.openai_chat import OpenAIChat

log = logging.getLogger(__name__)

ANTHROPIC = Anthropic()
OPENAI = OpenAIChat()

JSON = (b"content-type", b"application/json")


class Api(msgspec.Struct):
    """What the endpoints share."""

    gateway: Gateway
    keyring: Keyring
    metrics: Metrics
    ledger: Ledger
    clock: Clock
    max_body: int
    """Bytes; a longer request body is refused with 413."""
    explanations: Explanations
    books: Books | None = None
    """The lasting ledger. None: there is none."""
    emit: Emit = ignore
    """Told what the gateway does not see: what is only passed on."""


class Endpoint:
    """One ASGI endpoint. Subclasses answer; this sees to the tenant, and to errors in the dialect of the caller."""

    open = False
    """True: needs no API key."""

    def __init__(self, api: Api) -> None:
        self.api = api

    async def __call__(self, connection: Connection, receive: Receive, send: Send) -> None:
        head = dict(connection["headers"])
        ids = new_ids(self.api.clock.now_s())
        sender = Sender(send)
        try:
            owner = LOCAL if self.open else self._owner(head)
            await self.answer(
                Call(connection, head, receive, sender, owner.tenant, owner.workspace, ids, self.api.max_body, owner.admin)
            )
        except ServiceError as error:
            await self._fail(connection, head, sender, error, ids)
        except Exception:  # the last place where a bug can still become an answer
            log.exception("a request failed unexpectedly (req_%s)", ids.id)
            await self._fail(connection, head, sender, BackendFailed("Something went wrong inside Anaphora."), ids)

    async def answer(self, call: Call) -> None:
        raise NotImplementedError

    def dialect(self, path: str, head: Mapping[bytes, bytes]) -> Dialect:
        """Of errors."""
        return dialect_of(path, head)

    def _owner(self, head: Mapping[bytes, bytes]) -> Owner:
        return self.api.keyring.owner(head.get(b"authorization"), head.get(b"x-api-key"))

    async def _fail(
        self, connection: Connection, head: Mapping[bytes, bytes], sender: Sender, error: ServiceError, ids: Ids
    ) -> None:
        if sender.started:  # a stream reports its own errors; what comes here then can only cut the connection
            raise error
        dialect = self.dialect(connection["path"], head)
        status, body, answer_headers = dialect.render_error(error, f"req_{ids.id}")
        if isinstance(error, UpstreamFailed):
            if error.body and error.dialect == dialect.name:
                status, body = error.status, error.body
            # What may be repeated was repeated; anything else is not for the client's SDK to repeat without being asked.
            answer_headers["x-should-retry"] = "true" if error.again else "false"
        raw = [(name.encode(), value.encode()) for name, value in answer_headers.items()]
        if isinstance(error, NotCached):
            raw += headers.NOT_CACHED
        await sender.whole(status, raw, body)


def dialect_of(path: str, head: Mapping[bytes, bytes]) -> Dialect:
    """The dialect of whoever asks for `path` with these headers."""
    return ANTHROPIC if path.startswith("/v1/messages") or b"anthropic-version" in head else OPENAI


def id_header(dialect: Dialect, ids: Ids) -> tuple[bytes, bytes]:
    return b"request-id" if dialect.name == "anthropic" else b"x-request-id", b"req_" + ids.id.encode()


class Sender:
    """Sends one response, and knows whether it was begun."""

    __slots__ = ("_send", "started")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def whole(self, status: int, raw: RawHeaders, body: bytes) -> None:
        raw.append((b"content-length", b"%d" % len(body)))
        await self.start(status, raw)
        await self._send({"type": "http.response.body", "body": body})

    async def start(self, status: int, raw: RawHeaders) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def more(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def last(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body})


class Call(msgspec.Struct, frozen=True):
    """One request on its way through an endpoint."""

    connection: Connection
    head: Mapping[bytes, bytes]
    receive: Receive
    sender: Sender
    tenant: Tenant
    workspace: str
    ids: Ids
    max_body: int
    admin: bool = False

    @property
    def version(self) -> str | None:
        version = self.head.get(b"anthropic-version")
        return None if version is None else version.decode("latin-1")

    async def json(self, body: bytes, dialect: Dialect | None = None) -> None:
        """Answer 200 with `body`, and with the request's id where `dialect` says how to spell its header."""
        raw: RawHeaders = [JSON]
        if dialect is not None:
            raw.append(id_header(dialect, self.ids))
        await self.sender.whole(200, raw, body)

    async def gone(self) -> None:
        """Returns when the client has closed the connection. Behind `body`."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def body(self) -> bytes:
        """Raises TooLarge as soon as it is known that the body is longer than `max_body` bytes."""
        limit = self.max_body
        length = self.head.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        message = await self.receive()
        body: bytes = message.get("body", b"")
        if not message.get("more_body"):
            return body
        pieces = [body]
        size = len(body)
        while message.get("more_body"):
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise InvalidRequest("The client left before it had sent the whole body.")
            pieces.append(message["body"])
            size += len(pieces[-1])
            if size > limit:
                raise _too_large(limit)
        return b"".join(pieces)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"The body is larger than the {limit} bytes that this server takes.")
