"""HTTP to upstreams: connections that are kept, answers read chunk by chunk. The one place that knows the client library.

aiohttp and not the client that the command line uses: its parser is compiled, and a stream of small events costs it half the
time (docs/decisions/0011).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Mapping
from functools import lru_cache
from math import inf
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from anaphora.errors import ConfigError
from anaphora.patience import grace_s

_IDLE_S, _IDLE_PLAIN_S = 30.0, 4.0
"""A connection that nobody used for so long is closed. One without TLS is soon made again, and many servers (vLLM, whatever
runs on uvicorn) close theirs after 5 s: perhaps just when a request is on its way, of which nobody knows then whether it was
seen."""
_DRAIN_S = 1.0
"""How long the end of a body may take behind all that was of interest, for its connection to be used again."""


class Unreachable(Exception):
    """No answer, or no more of one. `unsent`: the other side has certainly not seen the request."""

    def __init__(self, message: str, *, unsent: bool) -> None:
        super().__init__(message)
        self.unsent = unsent


class Reply:
    """An answer whose head is there. Whoever has it must `finish` or `close` it; both may be called twice."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._due_s: float | None = None
        """When whoever waits has waited long enough, by the event loop's clock."""
        self._grace_s = 0.0
        """For how much longer, if this process is held up."""
        self._timer: asyncio.TimerHandle | None = None
        self._looks_s = inf
        """When the timer looks."""
        self._loop = asyncio.get_running_loop()
        self._late = False
        self.over = False
        """Set by who reads it: what was of interest is there, though there may be more."""
        self.status = response.status
        self.headers: dict[str, str] = {name.lower(): value for name, value in response.headers.items()}
        """Names in lower case; of those that are there twice the last one."""

    async def chunk(self, within_s: float | None = None) -> bytes:
        """What has come since, at least a byte; nothing at the end. Raises Unreachable, and TimeoutError if that takes longer
        than `within_s`: then there is nothing more to be had of it."""
        if within_s is not None:
            self._limit(within_s)
        try:
            chunk = await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            if not self._late:
                raise Unreachable(_words(error), unsent=False) from error
        self._due_s = None
        if self._late:  # by a hair even if there is something: the stream is marked as failed
            raise TimeoutError
        return chunk

    def _limit(self, within_s: float) -> None:
        """A timer that is set once and looks then whether it is really time: setting one for each chunk costs more than
        reading it."""
        due_s = self._due_s = self._loop.time() + within_s
        self._grace_s = within_s
        if due_s < self._looks_s:
            self._look_at(due_s)

    def _look_at(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._looks_s = self._loop.call_at(at_s, self._look), at_s

    def _look(self) -> None:
        looked_s, self._timer, self._looks_s = self._looks_s, None, inf
        if self._due_s is None:  # nobody waits
            return
        now_s = self._loop.time()
        if now_s >= self._due_s:
            more_s = grace_s(max(self._due_s, looked_s), now_s, self._grace_s)
            if not more_s:
                self._late = True
                self._response.content.set_exception(TimeoutError())
                return
            self._grace_s -= more_s
            self._due_s = now_s + more_s
        self._look_at(self._due_s)

    async def read(self, limit: int | None = None) -> bytes:
        """All of it, or a little more than `limit` bytes. Raises Unreachable."""
        pieces: list[bytes] = []
        size = 0
        while piece := await self.chunk():
            pieces.append(piece)
            size += len(piece)
            if limit is not None and size > limit:
                break
        return b"".join(pieces)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body, and the end of the answer."""
        try:
            while piece := await self.chunk():
                yield piece
        finally:
            self.close()

    @property
    def at_end(self) -> bool:
        """Everything is here, and its connection is free for the next request."""
        return self._response.content.is_eof()

    async def finish(self) -> None:
        """All that was of interest was read: what is left is on its way, and then the connection can be used again."""
        if not self._response.content.is_eof():
            try:
                async with asyncio.timeout(_DRAIN_S):
                    await self.read(1 << 16)
            except (TimeoutError, Unreachable):
                pass
        self.close()

    def close(self) -> None:
        """Without more ado: a body that was not read to its end is of no interest, and the other side gets to know that."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._response.close()


class Http:
    """A client of one `server`. `start` it on the event loop that uses it."""

    def __init__(self, server: str, *, connect_s: float, ca_file: str = "", headers: Mapping[str, str] | None = None) -> None:
        self._server = server
        self._connect_s = connect_s
        self._ca_file = ca_file
        self._headers = dict(headers or {})
        self._session: aiohttp.ClientSession | None = None

    @property
    def started(self) -> bool:
        return self._session is not None

    async def start(self) -> None:
        """Raises ConfigError for a `ca_file` that cannot be used."""
        try:
            verify = ssl.create_default_context(cafile=self._ca_file) if self._ca_file else True
        except OSError as error:
            raise ConfigError(f"ca_file cannot be used: {error}") from error
        idle_s = _IDLE_PLAIN_S if self._server.startswith("http:") else _IDLE_S
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=verify, keepalive_timeout=idle_s),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),  # what one client is given is not for the next
            headers=self._headers,
            skip_auto_headers=("content-type",),
            auto_decompress=False,
            proxy=_proxy(
                self._server
            ),  # once: aiohttp itself would look for it, and into ~/.netrc, in a thread for each request
        )

    async def send(self, method: str, url: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        """Returns when the head of the answer is there. Raises Unreachable."""
        assert self._session is not None
        try:
            response = await self._session.request(method, _url(url), data=body, headers=headers, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
            raise Unreachable(_words(error), unsent=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(_words(error), unsent=False) from error
        return Reply(response)

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


@lru_cache(maxsize=256)
def _url(text: str) -> URL:
    return URL(text, encoded=True)


def _proxy(server: str) -> str | None:
    """The proxy that the environment names for `server` (HTTPS_PROXY and its kin), unless NO_PROXY excepts it."""
    url = URL(server)
    if url.host is None or proxy_bypass(url.host if url.explicit_port is None else f"{url.host}:{url.explicit_port}"):
        return None
    return getproxies().get(url.scheme)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
