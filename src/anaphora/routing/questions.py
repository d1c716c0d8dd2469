"""A request as the router sees it: a chain over what its prompt begins with. Pure.

The prompt is cut into pieces of so many bytes, and where a message ends; short messages share a piece. So a conversation's next
turn begins with the very pieces of the turn before it. Each name stands for everything before it too. What a token is only the
replica knows: four bytes are taken for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import msgspec

from anaphora.routing.base import Question
from anaphora.types import BlockHash, MediaPart, Request

PIECE_BYTES = 1024
SHORTEST_BYTES = 256
"""A piece that ends with its message has at least so many."""
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
    for message in _messages(request):
        for tokens, piece in message:
            chain.add(piece, tokens)
        chain.message_ends()
    limit = EXPECTED_TOKENS if request.max_tokens is None else min(request.max_tokens, EXPECTED_TOKENS)
    ends = tuple(chain.ends)
    return Question(tuple(chain.names), ends, max(1, chain.num_tokens), max(1, limit), tenant=request.tenant)


def _messages(request: Request) -> Iterator[list[tuple[int | None, bytes]]]:
    """What each is made of, with its tokens where these do not follow from its length."""
    for tool in request.tools:
        yield [(None, _encode(tool))]
    for message in request.messages:
        parts = [((MEDIA_TOKENS if isinstance(part, MediaPart) else None), _encode(part)) for part in message.content]
        yield [(None, message.role.encode()), *parts]
    for prompt in request.prompts:
        yield [(None, prompt.encode() if isinstance(prompt, str) else _encode(prompt))]
    if not request.messages and not request.prompts:  # a body that was not understood
        for item in _unread(request.extra):
            yield [(None, item)]


def _unread(body: dict[str, Any]) -> Iterator[bytes]:
    for key in ("tools", "system", "instructions", "messages", "input", "prompt"):
        value = body.get(key)
        for item in value if isinstance(value, list) else (value,) if value is not None else ():
            yield _encode(item)


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

    def message_ends(self) -> None:
        if PIECE_BYTES - self._room >= SHORTEST_BYTES:
            self._cut()

    def _cut(self) -> None:
        self.names.append(BlockHash(self._hash.digest()))
        self.ends.append(self.num_tokens)
        self._room = PIECE_BYTES
