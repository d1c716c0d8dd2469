"""vLLM's reports of what its prefix cache stores and drops, as events for a router.

vLLM publishes batches over ZeroMQ: topic, sequence number, and MessagePack of (time, events, rank). Its hashes of blocks are
its own; a block's tokens come with it, so that a `Translator` names it as `keys.block_hashes` would, and keeps the names for
when vLLM drops it. `Subscriber` reads the socket.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import msgspec

from anaphora.errors import ConfigError
from anaphora.keys import block_hashes
from anaphora.routing.base import BlocksCleared, BlocksRemoved, BlocksStored, CacheEvent
from anaphora.types import BlockHash

_FASTEST = ("GPU", "", None)
"""Where a block is ready to be used."""


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True):
    block_hashes: list[bytes | int]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, omit_defaults=True):
    pass


class Batch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


_decoder = msgspec.msgpack.Decoder(Batch)


class Translator:
    """Of one replica. `namespace` is what the router's own chains begin with; blocks of adapters and salts are passed over."""

    def __init__(self, namespace: bytes) -> None:
        self._namespace = namespace
        self._names: dict[bytes | int, BlockHash] = {}
        self._places: dict[bytes | int, set[str]] = {}

    def batch(self, payload: bytes) -> list[CacheEvent]:
        """What one message means. Raises ValueError where it is none of vLLM's."""
        try:
            batch = _decoder.decode(payload)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not a batch of vLLM's events: {error}") from error
        events: list[CacheEvent] = []
        for event in batch.events:
            if isinstance(event, BlockStored):
                events.extend(self._stored(event))
            elif isinstance(event, BlockRemoved):
                events.append(self._removed(event))
            else:
                self._names.clear()
                self._places.clear()
                events.append(BlocksCleared())
        return events

    def _stored(self, event: BlockStored) -> list[CacheEvent]:
        parent: bytes | None = self._namespace
        if event.parent_block_hash is not None:
            parent = self._names.get(event.parent_block_hash)
        apart = event.lora_name is not None or event.lora_id is not None or any(event.extra_keys or ())
        if parent is None or apart:  # its beginning was stored before anybody listened, or no chain of ours can mean it
            return []
        names = block_hashes(parent, event.token_ids, event.block_size)
        known = event.block_hashes[: len(names)]
        for known_as, name in zip(known, names, strict=False):
            self._names[known_as] = name
            self._places.setdefault(known_as, set()).add(_medium(event.medium))
        return [BlocksStored(tuple(names[: len(known)]), (event.block_size,) * len(known), _medium(event.medium))]

    def _removed(self, event: BlockRemoved) -> CacheEvent:
        medium = _medium(event.medium)
        names = []
        for known in event.block_hashes:
            if known not in self._names:
                continue
            names.append(self._names[known])
            self._places[known].discard(medium)
            if not self._places[known]:
                del self._places[known], self._names[known]
        return BlocksRemoved(tuple(names), medium)


def _medium(name: str | None) -> str:
    return "" if name in _FASTEST else str(name).lower()


class Subscriber:
    """Reads what a replica publishes. Needs pyzmq (`anaphora[vllm-events]`)."""

    def __init__(self, endpoint: str, translator: Translator, *, topic: str = "") -> None:
        try:
            import zmq
        except ImportError as error:
            raise ConfigError("reading vLLM's events needs pyzmq: pip install 'anaphora[vllm-events]'") from error
        self._translator = translator
        self._next: int | None = None
        self.num_missed = 0
        """Batches that never came: what was dropped in them is thought to be there, until answers tell otherwise."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.subscribe(topic.encode())
        self._socket.connect(endpoint)

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def read(self, timeout_s: float) -> Sequence[CacheEvent]:
        """The next batch's events; none where nothing came in time. Blocks: for a thread of its own."""
        if not self._socket.poll(round(timeout_s * 1000)):
            return ()
        _, number, payload = self._socket.recv_multipart()
        sequence = int.from_bytes(number, "big")
        if self._next is not None and sequence > self._next:
            self.num_missed += sequence - self._next
        events: list[CacheEvent] = []
        if self._next is not None and sequence < self._next:  # it has restarted: its cache is empty
            events.append(BlocksCleared())
        self._next = sequence + 1
        with contextlib.suppress(ValueError):
            events.extend(self._translator.batch(payload))
        return events

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
