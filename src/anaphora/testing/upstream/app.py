"""The test upstream as an ASGI application: the emulator of `server.app` behind exchanges that can go wrong, and `/testing/`
where a test says what shall happen and asks what did."""

from __future__ import annotations

import time
from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from anaphora.catalogue import Catalogue
from anaphora.clock import Clock, ManualClock, SystemClock
from anaphora.errors import InvalidRequest
from anaphora.explain import Explanations
from anaphora.gateway import Gateway
from anaphora.ledger.accounts import Ledger
from anaphora.memory import Memory
from anaphora.promises import Books
from anaphora.server.app import App
from anaphora.server.auth import Keyring
from anaphora.server.endpoint import Api, dialect_of
from anaphora.server.metrics import Metrics
from anaphora.sums import Sums
from anaphora.testing.upstream.backend import ORDERS, Orders, Pace, PacedAccounting, PacedBackend
from anaphora.testing.upstream.exchange import Exchange
from anaphora.testing.upstream.prefixes import Prefixes
from anaphora.testing.upstream.raw import RawAnswer
from anaphora.testing.upstream.records import Records
from anaphora.testing.upstream.refusals import limits, refusal
from anaphora.testing.upstream.script import Answer, Asked, Fault, Script
from anaphora.testing.upstream.tokens import TOKENIZE, tokenized
from anaphora.types import Owner, Tenant
from anaphora.wire.base import new_ids

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Send
    from starlette.types import Scope as Connection

MAX_BODY = 64 << 20

Told = TypeVar("Told")


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str = "upstream"
    """Every answer tells it in the header `x-testing-upstream`."""
    models: tuple[str, ...] = ()
    """That it has. None given: `echo`, and every model of the providers that a caching profile is known for."""
    keys: tuple[str, ...] = ()
    """API keys that it knows. None given: any key, each an organisation of its own."""
    pace: Pace = Pace()
    faults: tuple[Fault, ...] = ()
    seed: int = 0
    """Of the generator that decides which requests a fault with a share meets."""
    keep: int = 10_000
    """Requests of which a record is kept, the latest ones."""
    kv_tokens: int = 0
    """How many tokens of prompts are in its memory at most. 0: no limit."""
    virtual_clock: bool = False
    """Lifetimes follow a clock that `POST /anaphora/clock` moves. Latencies are real all the same."""


class UpstreamApp:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.script = Script(options.faults, Random(options.seed))
        self.records = Records(options.keep)
        self._clock: Clock = ManualClock(float(int(time.time()))) if options.virtual_clock else SystemClock()
        self._under_way: set[Exchange] = set()
        backend = PacedBackend(options.pace, options.models, clock=self._clock)
        catalogue = Catalogue(backend, further=backend.model)
        prefixes = Prefixes(options.kv_tokens) if options.kv_tokens else None
        sums = Sums()
        self._gateway = Gateway(
            backend,
            Memory([], fingerprint=catalogue.fingerprint),
            catalogue,
            accounting=PacedAccounting(backend, Books(self._clock), prefixes),
            clock=self._clock,
        )
        keyring = Keyring(
            {key: Owner(Tenant(f"organisation-{number}")) for number, key in enumerate(options.keys)}, any_key=True
        )
        explanations = Explanations(self._clock, size=0)
        self._emulator = App(
            Api(self._gateway, keyring, Metrics(sums), Ledger(sums), self._clock, MAX_BODY, explanations),
        )

    async def start(self) -> None:
        await self._gateway.start()

    async def aclose(self) -> None:
        await self._gateway.aclose()

    def hang_up(self) -> None:
        """End every connection on which an answer is under way."""
        for exchange in list(self._under_way):
            exchange.hang_up()

    async def __call__(self, connection: Connection, receive: Receive, send: Send) -> None:
        path = connection["path"]
        if path.startswith("/testing/"):
            body = await _whole_body(receive)
            if body is not None:
                await self._control(connection, body, send)
        elif path.startswith("/v1/") or path == TOKENIZE:
            body = await _whole_body(receive)
            if body is not None:
                await self._exchange(connection, body, receive, send)
        else:
            await self._emulator(connection, receive, send)

    # -- a request as the provider gets it -----------------------------------------------------------------------------

    async def _exchange(self, connection: Connection, body: bytes, receive: Receive, send: Send) -> None:
        path, head = connection["path"], dict(connection["headers"])
        asked = Asked(path, _model(body), body)
        record = self.records.open(connection["method"], path, connection["headers"], asked.model, body, time.time())
        orders = Orders()

        def headers(status: int) -> list[tuple[bytes, bytes]]:
            name = (b"x-testing-upstream", self.options.name.encode("latin-1", "replace"))
            fault = orders.fault
            return [name, *limits(path, head, status, time.time(), None if fault is None else fault.retry_after_s)]

        exchange = Exchange(connection, body, receive, send, record=record, orders=orders, headers=headers)
        self._under_way.add(exchange)
        ORDERS.set(orders)
        try:
            orders.answer = _told(head, b"x-testing-answer", Answer) or self.script.answer(asked)
            orders.fault = _told(head, b"x-testing-fault", Fault) or self.script.fault(asked)
            record.fault = None if orders.fault is None else orders.fault.kind
            await exchange.run(self._who_answers(orders, path, head, body))
        except InvalidRequest as error:  # in the headers for tests
            status, text, raw = dialect_of(path, head).render_error(error, "req_testing")
            await exchange.run(_Fixed(status, [(name.encode(), value.encode()) for name, value in raw.items()], text))
        finally:
            self._under_way.discard(exchange)
            self.records.close(record)

    def _who_answers(self, orders: Orders, path: str, head: Mapping[bytes, bytes], body: bytes) -> ASGIApp:
        fault = orders.fault
        if fault is not None and fault.refusal is not None:
            orders.failed = True
            raw, refused = refusal(fault, fault.refusal, path, head, f"req_{new_ids(time.time()).id}")
            return _Fixed(fault.refusal, raw, refused)
        if orders.answer is not None and orders.answer.raw:
            return RawAnswer(orders.answer, self.options.pace)
        if path == TOKENIZE:
            return _Fixed(200, [(b"content-type", b"application/json")], tokenized(body))
        return self._emulator

    # -- what a test says and asks ---------------------------------------------------------------------------------------

    async def _control(self, connection: Connection, body: bytes, send: Send) -> None:
        try:
            found = await self._do(connection["method"], connection["path"], _query(connection), body)
        except (msgspec.MsgspecError, ValueError) as error:
            await _reply(send, 400, {"error": str(error)})
            return
        if found is None:
            await _reply(send, 404, {"error": f"There is nothing at {connection['method']} {connection['path']}."})
        else:
            await _reply(send, 200, found)

    async def _do(self, method: str, path: str, query: Mapping[str, str], body: bytes) -> dict[str, Any] | None:
        """Raises MsgspecError or ValueError for a wrong body or query."""
        script = self.script
        match method, path.removeprefix("/testing/"):
            case "POST", "faults":
                for fault in _one_or_more(body, Fault):
                    script.add_fault(fault)
            case "POST", "answers":
                for answer in _one_or_more(body, Answer):
                    script.add_answer(answer)
            case "DELETE", "faults":
                script.clear_faults()
            case "DELETE", "answers":
                script.clear_answers()
            case "DELETE", "requests":
                self.records.clear()
            case "GET", "faults" | "answers":
                pass
            case ("GET", "requests"):
                settled = await self.records.settled(float(query.get("settled_within_s", 0)))
                outcomes = self.records.outcomes()
                requests = self.records.after(int(query.get("after", 0)))
                return {"settled": settled, "outcomes": outcomes, "requests": requests}
            case _:
                return None
        return {"faults": script.faults(), "answers": script.answers(), "outcomes": self.records.outcomes()}


class _Fixed:
    """An application that answers one thing."""

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self._start = {"type": "http.response.start", "status": status, "headers": headers}
        self._body = body

    async def __call__(self, connection: Connection, receive: Receive, send: Send) -> None:
        await send(self._start)
        await send({"type": "http.response.body", "body": self._body})


async def _reply(send: Send, status: int, found: dict[str, Any]) -> None:
    body = msgspec.json.encode(found)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _whole_body(receive: Receive) -> bytes | None:
    """None: the client left before it had sent all of it."""
    pieces: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(pieces)


def _one_or_more(body: bytes, kind: type[Told]) -> list[Told]:
    if body.lstrip().startswith(b"["):
        return msgspec.json.decode(body, type=list[kind])  # type: ignore[valid-type]
    return [msgspec.json.decode(body, type=kind)]


def _told(head: Mapping[bytes, bytes], name: bytes, kind: type[Told]) -> Told | None:
    """What the header tells: JSON, or for a fault just its kind. Raises InvalidRequest."""
    value = head.get(name)
    if value is None:
        return None
    if not value.startswith(b"{"):
        value = msgspec.json.encode({"kind" if kind is Fault else "text": value.decode("utf-8", "replace")})
    try:
        return msgspec.json.decode(value, type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"The header {name.decode()} is wrong: {error}.") from error


class _Named(msgspec.Struct):
    model: str = ""


def _model(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Named).model
    except (msgspec.MsgspecError, RecursionError):
        return ""


def _query(connection: Connection) -> dict[str, str]:
    return dict(parse_qsl(connection["query_string"].decode("latin-1")))
