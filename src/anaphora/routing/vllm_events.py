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
from anaphora.keys import block_hashes, digest
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


def apart(namespace: bytes, adapter: str = "", salt: str = "") -> bytes:
    """What chains of blocks begin with in `namespace`: prompts for an adapter, or with a `cache_salt`, have blocks of their
    own, whatever their tokens are."""
    return digest((namespace, adapter.encode(), salt.encode())) if adapter or salt else namespace


class _Block:
    __slots__ = ("copies", "name")

    def __init__(self, name: BlockHash) -> None:
        self.name = name
        self.copies: dict[str, int] = {}
        """By place. A block that is computed twice lies there twice, and is there until both are dropped."""


class Translator:
    """Of one replica. `namespace` is what the router's own chains begin with (`apart` for adapters and salts); blocks that
    pictures are part of are passed over, and so are those behind them.

    Where layers of several kinds have blocks of their own, those of full attention tell how much of a prompt is there."""

    def __init__(self, namespace: bytes) -> None:
        self._namespace = namespace
        self._blocks: dict[bytes | int, _Block] = {}
        self._group: int | None = None
        self.block_size = 0
        """Of whole blocks. 0: none were stored yet."""
        self.published_s = 0.0
        """When the latest batch was, on the replica's clock."""

    def restarted(self) -> None:
        """What it calls its blocks begins anew, and so does what they are."""
        self._blocks.clear()
        self._group, self.block_size = None, 0

    def missed(self) -> None:
        """Some batches never came. How often a block is there is not known any more: what is dropped once counts as gone."""
        for block in self._blocks.values():
            block.copies = dict.fromkeys(block.copies, 0)

    def batch(self, payload: bytes) -> list[CacheEvent]:
        """What one message means; events of a kind that is not known are passed over. Raises ValueError where it is no batch
        of vLLM's."""
        batch = _decoded(payload)
        self.published_s = batch.ts
        events: list[CacheEvent] = []
        for event in _known(batch.events):
            if isinstance(event, BlockStored):
                events.extend(self._stored(event) if self._follows(event) else ())
            elif isinstance(event, BlockRemoved):
                events.extend(self._removed(event) if event.group_idx in (None, self._group) else ())
            else:
                self._blocks.clear()
                events.append(BlocksCleared())
        return events

    def _follows(self, event: BlockStored) -> bool:
        kind = event.kv_cache_spec_kind
        full = kind is None or (("full" in kind or "mla" in kind) and "sliding" not in kind)
        if self._group is None and event.token_ids and full:
            self._group = event.group_idx
        return event.group_idx in (None, self._group)

    def _stored(self, event: BlockStored) -> list[CacheEvent]:
        medium = _medium(event.medium)
        names = [block.name for known_as in event.block_hashes if (block := self._blocks.get(known_as)) is not None]
        if len(names) < len(event.block_hashes):
            names = self._names(event)
            if names and not medium:
                self.block_size = event.block_size
        for known_as, name in zip(event.block_hashes, names, strict=False):
            copies = self._blocks.setdefault(known_as, _Block(name)).copies
            copies[medium] = copies.get(medium, 0) + 1
        size = self.block_size or event.block_size
        return [BlocksStored(tuple(names), (size,) * len(names), medium)] if names else []

    def _names(self, event: BlockStored) -> list[BlockHash]:
        """As `keys.block_hashes` has them. None where the event does not tell what they are made of (copies elsewhere may come
        without tokens), where it is a part of a block, and where no chain of ours can mean it."""
        adapter = event.lora_name or ""
        if event.block_size < max(1, self.block_size) or (event.lora_id is not None and not adapter):
            return []
        salt, num_plain = _extra(event, adapter)
        if event.parent_block_hash is None:
            parent: bytes = apart(self._namespace, adapter, salt)
        elif (before := self._blocks.get(event.parent_block_hash)) is not None:
            parent = before.name
        else:
            return []  # its beginning was stored before anybody listened
        names = block_hashes(parent, event.token_ids, event.block_size)
        return names[:num_plain] if len(names) == len(event.block_hashes) else []

    def _removed(self, event: BlockRemoved) -> list[CacheEvent]:
        medium = _medium(event.medium)
        names = []
        for known_as in event.block_hashes:
            block = self._blocks.get(known_as)
            if block is None or medium not in block.copies:
                continue
            block.copies[medium] -= 1
            if block.copies[medium] <= 0:
                names.append(block.name)
                del block.copies[medium]
                if not block.copies:
                    del self._blocks[known_as]
        return [BlocksRemoved(tuple(names), medium)] if names else []


def _extra(event: BlockStored, adapter: str) -> tuple[str, int]:
    """The salt among what goes into the hashes beside tokens, and how many blocks there are before the first with anything
    that is neither that nor the adapter's name."""
    salt, num_plain = "", 0
    for place, keys in enumerate(event.extra_keys or [None] * len(event.block_hashes)):
        more = list(keys or ())
        if adapter and more[:1] == [adapter]:
            del more[0]
        if place == 0 and event.parent_block_hash is None and len(more) == 1 and isinstance(more[0], str):
            salt = more.pop()
        if more:
            break
        num_plain += 1
    return salt, num_plain


def _decoded(payload: bytes) -> Batch:
    """Raises ValueError."""
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a batch of vLLM's events: {error}") from error


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
_HEARTBEAT_S = 10.0
"""A replica whose machine is gone does not say so: a connection without answers to this is given up."""


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
        self._heard = -1
        """The number of the latest message that was published, not replayed."""
        self.num_batches = 0
        self.num_missed = 0
        """Batches that never came: what was dropped in them is thought to be there, until answers tell otherwise."""
        self._context = zmq.Context()
        self._dealer = zmq.DEALER
        self._socket = self._context.socket(zmq.SUB)
        self._socket.rcvhwm = 0
        self._socket.heartbeat_ivl = round(_HEARTBEAT_S * 1000)
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
        if self._next is not None and sequence < self._next:
            if self._was_replayed(sequence, payload):
                self._heard = sequence
                return ()
            self._translator.restarted()  # so has it: its cache is empty
            events.append(BlocksCleared())
            self._next = 0 if self._replay else None
        first = 0 if self._next is None else self._next
        if self._replay and sequence > first:
            events.extend(self._missed(first, sequence))
        if self._next is not None:
            self._lost(sequence - self._next)
        self._next, self._heard = sequence + 1, sequence
        events.extend(self._meant(payload))
        return events

    def _was_replayed(self, sequence: int, payload: bytes) -> bool:
        """Numbers grow as long as the replica lives. What it published while it was asked to replay comes twice."""
        with contextlib.suppress(ValueError):
            return sequence > self._heard and _decoded(payload).ts <= self._translator.published_s
        return False

    def _lost(self, num_batches: int) -> None:
        if num_batches > 0:
            self.num_missed += num_batches
            self._translator.missed()

    def _meant(self, payload: bytes) -> Sequence[CacheEvent]:
        self.num_batches += 1
        with contextlib.suppress(ValueError):
            return self._translator.batch(payload)
        return ()

    def _missed(self, first: int, end: int | None) -> list[CacheEvent]:
        """What was published from number `first` on and before `end`, as far as it is kept there. All of it is sent at once,
        and what the connection has no room for is left out: from there it is asked for again."""
        events: list[CacheEvent] = []
        whole = False
        while not whole:
            before = self._next
            whole = self._replayed(first, end, events)
            if self._next is None or self._next == before:
                break
            first = self._next
        return events

    def _replayed(self, first: int, end: int | None, events: list[CacheEvent]) -> bool:
        """Once: as far as there is no gap in it. Whether that is to its end."""
        begun = False
        with self._context.socket(self._dealer) as socket:
            socket.linger = 0
            socket.rcvhwm = 0
            socket.connect(self._replay)
            socket.send_multipart((b"", first.to_bytes(8, "big")))
            while socket.poll(round(_REPLAY_S * 1000)):
                *_, number, payload = socket.recv_multipart()
                if number == _END:
                    return True
                sequence = int.from_bytes(number, "big")
                if sequence < first or (end is not None and sequence >= end):
                    continue  # the latter come again by themselves
                if self._next is not None and sequence > self._next:
                    if begun:
                        return False
                    self._lost(sequence - self._next)  # those before it are kept no more
                begun = True
                self._next = sequence + 1
                events.extend(self._meant(payload))
        return False

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
