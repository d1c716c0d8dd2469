"""Talking to one server, or to the nodes of a cluster: transactions on the keys of one bucket.

A cluster is spoken to node by node, with the map of slots that its nodes give: all that is asked of it are transactions
whose keys share a slot, and scans.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import msgspec
import redis.asyncio as redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import TimeoutError as NoAnswer

from anaphora.errors import ConfigError, TierFailed
from anaphora.tiers.valkey.reading import Parser

Word: TypeAlias = bytes | str | int | float
Command: TypeAlias = tuple[Word, ...]
Reply: TypeAlias = Any
"""What the server said: depends on the command."""

SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")


class Unreachable(TierFailed):
    """No answer: not the server's, but the lack of it. Asking again at once would only cost time."""


class Refused(TierFailed):
    """The server answered with an error."""


class Access(msgspec.Struct, frozen=True):
    url: str
    ca_file: str = ""
    timeout_s: float = 2.0
    connect_timeout_s: float = 1.0
    max_connections: int = 8

    @property
    def cluster(self) -> bool:
        return urlsplit(self.url).scheme.endswith("+cluster")


class Servers:
    """Every method raises TierFailed and nothing else. Raises ConfigError for an address that cannot be used."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._cluster = access.cluster
        self._options = _connection_options(access)
        self._seed = _client(self._options, access)
        self._nodes: dict[tuple[str, int], redis.Redis] = {}
        self._slots: dict[int, redis.Redis] = {}
        self._mapping = asyncio.Lock()

    async def transact(self, bucket: str, commands: Sequence[Command]) -> list[Reply]:
        """The replies to `commands`, done as one step. All their keys are in the slot of `bucket`."""
        try:
            return await self._transact(bucket, commands)
        except _Moved:
            self._slots.clear()
            try:
                return await self._transact(bucket, commands)
            except _Moved:
                raise Unreachable("the cluster is being reorganised") from None
        except Unreachable:
            self._slots.clear()  # another node may have taken over
            raise

    async def scan(self, pattern: bytes) -> AsyncIterator[list[bytes]]:
        """The keys that match `pattern`, of all nodes, piece by piece; some may come twice."""
        with _translated():
            if self._cluster:
                await self._client("")
            clients = list({id(client): client for client in self._slots.values()}.values()) if self._cluster else [self._seed]
            for client in clients:
                cursor: Reply = b"0"
                while True:
                    async with asyncio.timeout(self._access.timeout_s):
                        cursor, keys = await _call(client, "SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
                    yield keys
                    if int(cursor) == 0:
                        break

    async def aclose(self) -> None:
        for client in (self._seed, *self._nodes.values()):
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()

    async def _transact(self, bucket: str, commands: Sequence[Command]) -> list[Reply]:
        with _translated():
            # Not the client library's own timeout: it uses `wait_for`, which on Python 3.11 loses cancellations.
            async with asyncio.timeout(self._access.timeout_s):
                return await _transact(await self._client(bucket), commands)

    async def _client(self, bucket: str) -> redis.Redis:
        if not self._cluster:
            return self._seed
        if not self._slots:
            async with self._mapping:
                if not self._slots:
                    self._slots = await self._map()
        try:
            return self._slots[key_slot(bucket.encode())]
        except KeyError:
            raise Refused("the cluster serves only some of the slots") from None

    async def _map(self) -> dict[int, redis.Redis]:
        """Slot → node, as the first node says that answers."""
        problem: Exception | None = None
        for client in (self._seed, *self._nodes.values()):
            try:
                ranges: Reply = await _call(client, "CLUSTER", "SLOTS")
            except (RedisError, OSError) as error:
                problem = error
                continue
            found: dict[int, redis.Redis] = {}
            for first, last, (host, port, *_), *_ in ranges:
                node = self._node(host.decode() if host else str(self._options["host"]), int(port))
                found.update(dict.fromkeys(range(int(first), int(last) + 1), node))
            return found
        assert problem is not None
        raise problem

    def _node(self, host: str, port: int) -> redis.Redis:
        if (host, port) not in self._nodes:
            self._nodes[host, port] = _client({**self._options, "host": host, "port": port}, self._access)
        return self._nodes[host, port]


class _Moved(Exception):
    """The slot is another node's by now."""


async def _call(client: redis.Redis, *words: Word) -> Reply:
    return await client.execute_command(*words)  # type: ignore[no-untyped-call]


async def _transact(client: redis.Redis, commands: Sequence[Command]) -> list[Reply]:
    async with client.pipeline(transaction=True) as pipeline:
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Reply] = await pipeline.execute(raise_on_error=False)
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """The client library's exceptions as this project's. Messages must not carry values, which they quote from commands."""
    try:
        yield
    except (MovedError, AskError) as error:
        raise _Moved from error
    except (TimeoutError, LostConnection, NoAnswer, ClusterDownError, OSError) as error:
        raise Unreachable(_said(error)) from None
    except RedisError as error:
        raise Refused(_said(error)) from None


def _said(error: BaseException) -> str:
    if isinstance(error, TimeoutError | NoAnswer) and not str(error):
        return "no answer in time"
    text = re.sub(r"(?s)^Command # .* of pipeline caused error: ", "", str(error)).strip("(),'\"")
    return text or type(error).__name__


def _connection_options(access: Access) -> dict[str, object]:
    scheme = urlsplit(access.url).scheme
    if scheme not in SCHEMES:
        raise ConfigError(f"a shared cache's address begins with one of {', '.join(f'{name}://' for name in SCHEMES)}")
    try:
        options = dict(parse_url(access.url.replace("+cluster", "", 1)))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the shared cache's address cannot be used: {error}") from None
    if access.cluster and options.get("db"):
        raise ConfigError("a cluster has no numbered databases: leave the number out of the shared cache's address")
    if access.ca_file:
        if scheme not in ("rediss", "rediss+cluster"):
            raise ConfigError("a CA file is only of use for rediss:// addresses")
        options["ssl_ca_certs"] = access.ca_file
    return options


def _client(options: dict[str, object], access: Access) -> redis.Redis:
    arguments: dict[str, Any] = {
        "socket_timeout": None,
        "socket_connect_timeout": access.connect_timeout_s,
        # Once more where a connection was lost, such as an idle one whose server was started again. No answer is an answer.
        "retry": Retry(NoBackoff(), 1, (LostConnection,)),
        "retry_on_error": [],
        "protocol": 2,
        "parser_class": Parser,
        **options,
    }
    pool = redis.BlockingConnectionPool(max_connections=access.max_connections, timeout=access.timeout_s, **arguments)
    return redis.Redis.from_pool(pool)
