"""A test upstream on a socket: in a thread of its own for tests, or as this process for `anaphora testing upstream`."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from anaphora.server.run import listen, run
from anaphora.testing.upstream.app import Options, UpstreamApp

Returned = TypeVar("Returned")

HOST = "127.0.0.1"


class _Protocol(HttpToolsProtocol):
    """Hands the application its connection, so that a fault can break it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does so only for sockets whose protocol is named, which that of `create_server` is not.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.app_state = {**self.app_state, "transport": transport}


class _Server(uvicorn.Server):
    def __init__(self, app: UpstreamApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                server_header=False,
            )
        )
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.hang_up()  # what is under way ends as it does where a server dies; a stall would never end by itself
        await super().shutdown(sockets)


def serve(options: Options, host: str, port: int, say: Callable[[str], object]) -> None:
    """Be a test upstream until a signal comes. Raises ConfigError where the address cannot be listened on."""
    listener = listen(host, port)
    say(url_of(listener))

    async def main() -> None:
        app = UpstreamApp(options)
        server = _Server(app)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)  # uvicorn raises it once more when it has stopped
        await app.start()
        try:
            await server.serve(sockets=[listener])
        finally:
            await app.aclose()

    run(main())


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class ServedInThread:
    """One test upstream in a thread. It keeps what it knows while it is not listening."""

    def __init__(self, options: Options, port: int = 0) -> None:
        self._options = options
        self._port = port
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"anaphora-{options.name}", daemon=True)
        self._thread.start()
        self._app = self._call(self._make())

    def listen(self) -> str:
        """Returns the address, which is the same each time, when requests are answered there."""
        listener = listen(HOST, self._port)
        self._port = listener.getsockname()[1]
        self._call(self._serve(listener))
        return url_of(listener)

    def refuse(self) -> None:
        """Connections are refused from here on, and those there are have ended."""
        self._call(self._stop())

    def close(self) -> None:
        self._call(self._stop())
        self._call(self._app.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, Returned]) -> Returned:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _make(self) -> UpstreamApp:
        app = UpstreamApp(self._options)
        await app.start()
        return app

    async def _serve(self, listener: socket.socket) -> None:
        self._server = _Server(self._app)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def _stop(self) -> None:
        if self._server is None or self._serving is None:
            return
        self._server.should_exit = True
        await self._serving
        self._server = self._serving = None
