"""The HTTP client for upstreams, against real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
from base64 import b64encode
from pathlib import Path

import pytest

from anaphora.backends.http import Http


class Server(threading.Thread):
    """Answers one connection, and notes what it was asked."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.head = b""
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        connection, _ = self._listener.accept()
        with self._listener, connection:
            while b"\r\n\r\n" not in self.head:
                self.head += connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


def ask(server: str) -> bytes:
    async def body() -> bytes:
        http = Http(server, connect_s=5.0)
        await http.start()
        try:
            reply = await http.send("POST", f"{server}/v1/messages", b"", {})
            return await reply.read()
        finally:
            await http.aclose()

    return asyncio.run(body())


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_goes_through_the_proxy_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Server()
    monkeypatch.setenv("http_proxy", f"http://user:secret@{proxy.address}")
    assert ask("http://provider.invalid:8000") == b"ok"
    assert proxy.head.startswith(b"POST http://provider.invalid:8000/v1/messages HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic " + b64encode(b"user:secret") in proxy.head


@pytest.mark.parametrize("excepted", ["127.0.0.1", "{server}"], ids=["host", "host and port"])
def test_goes_around_the_proxy_where_the_environment_says_so(excepted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", excepted.format(server=server.address))
    assert ask(f"http://{server.address}") == b"ok"
    assert server.head.startswith(b"POST /v1/messages HTTP/1.1\r\n")


def test_no_password_of_the_users_own_is_sent_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passwords = tmp_path / "netrc"
    passwords.write_text("machine 127.0.0.1 login somebody password secret\n")
    passwords.chmod(0o600)
    monkeypatch.setenv("NETRC", str(passwords))
    server = Server()
    assert ask(f"http://{server.address}") == b"ok"
    assert b"authorization" not in server.head.lower()


def test_a_body_that_stops_coming_is_waited_for_as_long_as_was_said_each_time_anew() -> None:
    first, stop = threading.Event(), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with listener, connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\na")
            first.wait(30)
            connection.sendall(b"b")
            stop.wait(30)

    async def body() -> None:
        server = f"http://127.0.0.1:{listener.getsockname()[1]}"
        http = Http(server, connect_s=5.0)
        await http.start()
        reply = await http.send("POST", server, b"", {})
        assert await reply.chunk(0.2) == b"a"
        waiting = asyncio.create_task(reply.chunk(60.0))  # the timer that is set already goes off in the middle of it
        await asyncio.wait((waiting,), timeout=0.5)
        assert not waiting.done()
        first.set()
        assert await waiting == b"b"
        with pytest.raises(TimeoutError):
            await reply.chunk(0.01)
        reply.close()
        await http.aclose()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        asyncio.run(body())
    finally:
        first.set()
        stop.set()
        thread.join()
