"""Small values on the server that processes of several machines change together: who changes one has seen the latest."""

from __future__ import annotations

import hashlib

from anaphora.tiers.valkey.servers import Access, Servers

_SWAP = """
local there = redis.call('GET', KEYS[1]) or ''
local seconds, microseconds = unpack(redis.call('TIME'))
if there ~= ARGV[1] then return {0, there, seconds, microseconds} end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
return {1, ARGV[2], seconds, microseconds}
"""


class Cells:
    """Values that nobody changes for `keep_s` are gone. Every method raises TierFailed and nothing else."""

    def __init__(self, access: Access, prefix: str, *, keep_s: int) -> None:
        self._servers = Servers(access)
        self._prefix = prefix
        self._keep_s = keep_s

    async def read(self, name: str) -> tuple[bytes, float]:
        """What is there, empty where nothing is, and what time it is on the server."""
        tag, key = self._place(name)
        data, (seconds, microseconds) = await self._servers.transact(tag, [("GET", key), ("TIME",)])
        return data or b"", int(seconds) + int(microseconds) / 1e6

    async def swap(self, name: str, expected: bytes, data: bytes) -> tuple[bool, bytes, float]:
        """Put `data` in the place of `expected`. Whether that was there; what is there now; what time it is on the server."""
        tag, key = self._place(name)
        script = ("EVAL", _SWAP, 1, key, expected, data, self._keep_s)
        [(swapped, there, seconds, microseconds)] = await self._servers.transact(tag, [script])
        return bool(swapped), there, int(seconds) + int(microseconds) / 1e6

    async def aclose(self) -> None:
        await self._servers.aclose()

    def _place(self, name: str) -> tuple[str, bytes]:
        """In a cluster names lie on all nodes."""
        tag = hashlib.sha256(name.encode()).hexdigest()[:2]
        return tag, f"{self._prefix}{{{tag}}}:{name}".encode()
