"""A request as the router sees it: a chain over what its prompt begins with. Pure.

The prompt is cut into pieces of so many bytes, across the borders of messages; each name stands for everything before it too.
What a token is only the replica knows: four bytes are taken for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import msgspec

from anaphora.routing.base import Question
from anaphora.types import BlockHash, MediaPart, Request

PIECE_BYTES = 1024
BYTES_PER_TOKEN = 4
MEDIA_TOKENS = 1_600
"""A picture, sound or document, whatever its size."""
EXPECTED_TOKENS = 256
"""Of an answer, where the request sets no limit or a higher one."""

_encode = msgspec.json.Encoder(order="sorted").encode


def of_request(request: Request) -> Question:
    """Prompts of different models, or asked with different keys of the clients' own, have nothing in common."""
    credential = None if request.native is None else request.native.credential
    chain = _Chain(_encode((request.model, credential, request.cache_salt)))
    for tokens, piece in _pieces(request):
        chain.add(piece, tokens)
    limit = EXPECTED_TOKENS if request.max_tokens is None else min(request.max_tokens, EXPECTED_TOKENS)
    ends = tuple(chain.ends)
    return Question(tuple(chain.names), ends, max(1, chain.num_tokens), max(1, limit), tenant=request.tenant)


def _pieces(request: Request) -> Iterator[tuple[int | None, bytes]]:
    """Each with its tokens, where these do not follow from its length."""
    for tool in request.tools:
        yield None, _encode(tool)
    for message in request.messages:
        yield None, message.role.encode()
        for part in message.content:
            yield (MEDIA_TOKENS if isinstance(part, MediaPart) else None), _encode(part)
    for prompt in request.prompts:
        yield None, prompt.encode() if isinstance(prompt, str) else _encode(prompt)
    if not request.messages and not request.prompts:  # a body that was not understood
        yield from _unread(request.extra)


def _unread(body: dict[str, Any]) -> Iterator[tuple[int | None, bytes]]:
    for key in ("tools", "system", "instructions", "messages", "input", "prompt"):
        value = body.get(key)
        for item in value if isinstance(value, list) else (value,) if value is not None else ():
            yield None, _encode(item)


class _Chain:
    def __init__(self, seed: bytes) -> None:
        self.names: list[BlockHash] = []
        self.ends: list[int] = []
        self._hash = blake2b(seed, digest_size=32)
        self._bytes = 0
        self._media_tokens = 0
        self._room = PIECE_BYTES

    @property
    def num_tokens(self) -> int:
        return self._bytes // BYTES_PER_TOKEN + self._media_tokens

    def add(self, piece: bytes, tokens: int | None) -> None:
        if tokens is not None:
            self._hash.update(len(piece).to_bytes(8, "big") + piece)
            self._media_tokens += tokens
            self._cut()
            return
        view = memoryview(piece)
        while view:
            some, view = view[: self._room], view[self._room :]
            self._hash.update(some)
            self._bytes += len(some)
            self._room -= len(some)
            if not self._room:
                self._cut()

    def _cut(self) -> None:
        self.names.append(BlockHash(self._hash.digest()))
        self.ends.append(self.num_tokens)
        self._room = PIECE_BYTES
