"""vLLM's reports of what its prefix cache stores and drops, as events for a router.

vLLM publishes batches over ZeroMQ: topic, sequence number, and MessagePack of (time, events, rank). Its hashes of blocks are
its own; a block's tokens come with it, so that a `Translator` names it as `keys.block_hashes` would, and keeps the names for
when vLLM drops it. `Subscriber` reads the socket, and asks for batches that it missed where vLLM keeps them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
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
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True):
    block_hashes: list[bytes | int]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, omit_defaults=True):
    pass


class Batch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


_decoder = msgspec.msgpack.Decoder(Batch)
_event_decoder = msgspec.msgpack.Decoder(BlockStored | BlockRemoved | AllBlocksCleared | list[Any])
"""Older versions write an event as a list of its fields, behind its name."""


class Translator:
    """Of one replica. `namespace` is what the router's own chains begin with; blocks of adapters and salts are passed over.

    Where layers of several kinds have blocks of their own, those of full attention tell how much of a prompt is there."""

    def __init__(self, namespace: bytes) -> None:
        self._namespace = namespace
        self._names: dict[bytes | int, BlockHash] = {}
        self._places: dict[bytes | int, set[str]] = {}
        self._group: int | None = None
        self.block_size = 0
        """Of the blocks that were stored last. 0: none were yet."""

    def clear(self) -> None:
        """The replica has restarted: what it calls its blocks begins anew."""
        self._names.clear()
        self._places.clear()

    def batch(self, payload: bytes) -> list[CacheEvent]:
        """What one message means; events of a kind that is not known are passed over. Raises ValueError where it is no batch
        of vLLM's."""
        try:
            batch = _decoder.decode(payload)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not a batch of vLLM's events: {error}") from error
        events: list[CacheEvent] = []
        for event in _known(batch.events):
            if isinstance(event, BlockStored):
                events.extend(self._stored(event) if self._follows(event) else ())
            elif isinstance(event, BlockRemoved):
                events.extend([self._removed(event)] if event.group_idx in (None, self._group) else ())
            else:
                self.clear()
                events.append(BlocksCleared())
        return events

    def _follows(self, event: BlockStored) -> bool:
        kind = event.kv_cache_spec_kind
        if self._group is None and (kind is None or (("full" in kind or "mla" in kind) and "sliding" not in kind)):
            self._group = event.group_idx
        return event.group_idx in (None, self._group)

    def _stored(self, event: BlockStored) -> list[CacheEvent]:
        parent: bytes | None = self._namespace
        if event.parent_block_hash is not None:
            parent = self._names.get(event.parent_block_hash)
        apart = event.lora_name is not None or event.lora_id is not None or any(event.extra_keys or ())
        if parent is None or apart:  # its beginning was stored before anybody listened, or no chain of ours can mean it
            return []
        self.block_size = event.block_size
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


_KINDS: dict[str, type[BlockStored | BlockRemoved | AllBlocksCleared]] = {
    "BlockStored": BlockStored,
    "BlockRemoved": BlockRemoved,
    "AllBlocksCleared": AllBlocksCleared,
}


def _known(events: list[msgspec.Raw]) -> Iterator[BlockStored | BlockRemoved | AllBlocksCleared]:
    for raw in events:
        with contextlib.suppress(msgspec.MsgspecError):
            event = _event_decoder.decode(raw)
            yield _of_fields(event) if isinstance(event, list) else event


def _of_fields(values: list[Any]) -> BlockStored | BlockRemoved | AllBlocksCleared:
    """Raises ValidationError for what is no event; fields that are not known come last, and are passed over."""
    kind = _KINDS.get(values[0]) if values and isinstance(values[0], str) else None
    if kind is None:
        raise msgspec.ValidationError("an event of no known kind")
    fields = dict(zip(kind.__struct_fields__, values[1:], strict=False))
    return msgspec.convert({"type": kind.__name__, **fields}, kind)


def _medium(name: str | None) -> str:
    return "" if name in _FASTEST else str(name).lower()


_END = (-1).to_bytes(8, "big", signed=True)
"""The number of the message that ends a replay."""
_REPLAY_S = 2.0
"""How long the next message of a replay may take."""


class Subscriber:
    """Reads what a replica publishes at `endpoint`; asks for what it missed at `replay`, where that is given. Needs pyzmq
    (`anaphora[vllm-events]`). Of one thread at a time; connections that break are made again."""

    def __init__(self, endpoint: str, translator: Translator, *, topic: str = "", replay: str = "") -> None:
        try:
            import zmq
        except ImportError as error:
            raise ConfigError("reading vLLM's events needs pyzmq: pip install 'anaphora[vllm-events]'") from error
        self._translator = translator
        self._replay = replay
        self._begun = False
        self._next: int | None = None
        self.num_missed = 0
        """Batches that never came: what was dropped in them is thought to be there, until answers tell otherwise."""
        self._context = zmq.Context()
        self._dealer = zmq.DEALER
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.subscribe(topic.encode())
        self._socket.connect(endpoint)

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def read(self, timeout_s: float) -> Sequence[CacheEvent]:
        """The events of the next batch, and of those that were missed before it; none where nothing came in time. The first
        time, all that is kept for replay. Blocks: for a thread of its own."""
        if self._replay and not self._begun:
            self._begun = True
            return self._missed(0, None)
        if not self._socket.poll(round(timeout_s * 1000)):
            return ()
        _, number, payload = self._socket.recv_multipart()
        sequence = int.from_bytes(number, "big")
        events: list[CacheEvent] = []
        if self._next is not None and sequence < self._next:  # it has restarted: its cache is empty
            self._translator.clear()
            events.append(BlocksCleared())
            self._next = 0 if self._replay else None
        if self._next is not None and sequence > self._next:
            first = self._next
            events.extend(self._missed(first, sequence) if self._replay else ())
            self.num_missed += sequence - max(first, self._next)
        self._next = sequence + 1
        events.extend(self._meant(payload))
        return events

    def _meant(self, payload: bytes) -> Sequence[CacheEvent]:
        with contextlib.suppress(ValueError):
            return self._translator.batch(payload)
        return ()

    def _missed(self, first: int, end: int | None) -> list[CacheEvent]:
        """What was published from number `first` on and before `end`, as far as it is kept there."""
        events: list[CacheEvent] = []
        with self._context.socket(self._dealer) as socket:
            socket.linger = 0
            socket.connect(self._replay)
            socket.send_multipart((b"", first.to_bytes(8, "big")))
            while socket.poll(round(_REPLAY_S * 1000)):
                *_, number, payload = socket.recv_multipart()
                if number == _END:
                    break
                sequence = int.from_bytes(number, "big")
                if sequence < first or (end is not None and sequence >= end):
                    continue  # the latter come again by themselves
                if self._next is not None:
                    self.num_missed += max(0, sequence - self._next)
                self._next = sequence + 1
                events.extend(self._meant(payload))
        return events

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
