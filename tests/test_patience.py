"""Time limits do not count the time in which this process could not look."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from anaphora.backends.http import Http
from anaphora.patience import HELD_UP_S, Patience, grace_s

WITHIN_S = 0.3
HELD_UP_FOR_S = 3 * WITHIN_S


def hold_up() -> None:
    """As a machine that has too much to do: nothing of this process runs."""
    time.sleep(HELD_UP_FOR_S)


def test_what_came_while_the_process_was_held_up_came_in_time() -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        loop.call_later(0.01, hold_up)
        # What is read has some way to go to whoever waits for it.
        loop.call_later(0.02, lambda: loop.call_soon(lambda: loop.call_soon(lambda: answer.set_result("here"))))
        async with Patience(WITHIN_S):
            assert await answer == "here"

    asyncio.run(body())


def test_nothing_is_waited_for_without_end() -> None:
    async def body() -> float:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        loop.call_later(0.01, hold_up)
        with pytest.raises(TimeoutError):
            async with Patience(WITHIN_S):
                await asyncio.Event().wait()
        return loop.time() - started_s

    assert HELD_UP_FOR_S < asyncio.run(body()) < HELD_UP_FOR_S + 10


def test_whoever_is_cancelled_while_waiting_is_cancelled() -> None:
    async def wait() -> None:
        async with Patience(60):
            await asyncio.Event().wait()

    async def body() -> None:
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())


def test_a_timer_in_time_has_no_grace_and_a_late_one_no_more_than_is_left() -> None:
    assert grace_s(10.0, 10.0 + HELD_UP_S / 2, 5.0) == 0.0
    assert grace_s(10.0, 12.0, 5.0) == 2.0
    assert grace_s(10.0, 18.0, 5.0) == 5.0
    assert grace_s(10.0, 18.0, 0.0) == grace_s(10.0, 18.0, -3.0) == 0.0


class Server(threading.Thread):
    """Answers with a head, and with a body once it may."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.may_go_on = threading.Event()
        self.done = threading.Event()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/"

    def run(self) -> None:
        connection, _ = self._listener.accept()
        with self._listener, connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n")
            self.may_go_on.wait(30)
            connection.sendall(b"body")
            self.done.set()


@pytest.mark.parametrize("held_up", [True, False])
def test_a_piece_that_waited_in_the_socket_while_nobody_looked_is_read(held_up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()

    def let_it_come_unseen() -> None:
        server.may_go_on.set()
        assert server.done.wait(30)
        hold_up()

    async def body() -> bytes:
        http = Http(server.url, connect_s=5.0)
        await http.start()
        try:
            reply = await http.send("POST", server.url, b"", {})
            if held_up:
                asyncio.get_running_loop().call_later(0.01, let_it_come_unseen)
            try:
                return await reply.chunk(WITHIN_S)
            finally:
                reply.close()
        finally:
            server.may_go_on.set()
            await http.aclose()

    if held_up:
        assert asyncio.run(body()) == b"body"
    else:
        with pytest.raises(TimeoutError):
            asyncio.run(body())
