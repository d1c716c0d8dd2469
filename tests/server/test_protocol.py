"""The head of an answer goes out with the beginning of its body."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from anaphora.server.protocol import HeadWithBody

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Wire:
    """What a transport is told, in order; what is told at once is one item."""

    def __init__(self) -> None:
        self.told: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        self.told.append(data)

    def writelines(self, pieces: tuple[bytes, ...]) -> None:
        self.told.append(b"".join(pieces))

    def is_closing(self) -> bool:
        return "closed" in self.told

    def close(self) -> None:
        self.told.append("closed")

    def get_extra_info(self, name: str) -> str:
        return f"the {name}"


def joining() -> tuple[HeadWithBody, Wire]:
    wire = Wire()
    return HeadWithBody(cast("asyncio.Transport", wire)), wire


def test_a_head_waits_for_its_body() -> None:
    async def run() -> None:
        transport, wire = joining()
        transport.write(HEAD)
        assert wire.told == []
        transport.write(b"ok")
        transport.write(b"more")
        assert wire.told == [HEAD + b"ok", b"more"]
        await asyncio.sleep(0)
        assert wire.told == [HEAD + b"ok", b"more"]

    asyncio.run(run())


def test_a_head_waits_no_longer_than_the_event_loop_does_something_else() -> None:
    async def run() -> None:
        transport, wire = joining()
        transport.write(HEAD)
        await asyncio.sleep(0)
        assert wire.told == [HEAD]
        transport.write(b"ok")
        assert wire.told == [HEAD, b"ok"]

    asyncio.run(run())


def test_two_heads_are_two_heads() -> None:
    """As of 100 Continue and the answer behind it, or of two requests at once."""

    async def run() -> None:
        transport, wire = joining()
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        transport.write(HEAD)
        transport.write(b"ok")
        assert b"".join(cast("list[bytes]", wire.told)) == b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"ok"

    asyncio.run(run())


def test_what_is_closed_has_said_its_head() -> None:
    async def run() -> None:
        transport, wire = joining()
        transport.write(HEAD)
        transport.close()
        assert wire.told == [HEAD, "closed"]
        assert transport.is_closing()
        await asyncio.sleep(0)
        assert wire.told == [HEAD, "closed"]

    asyncio.run(run())


def test_a_client_that_has_left_is_told_nothing() -> None:
    async def run() -> None:
        transport, wire = joining()
        transport.write(HEAD)
        wire.close()
        await asyncio.sleep(0)
        assert wire.told == ["closed"]

    asyncio.run(run())


def test_all_else_is_the_transports_own() -> None:
    async def run() -> None:
        transport, _ = joining()
        assert transport.get_extra_info("peername") == "the peername"
        with pytest.raises(AttributeError):
            _ = transport.unheard_of

    asyncio.run(run())
