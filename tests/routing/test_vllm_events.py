"""Against a real ZeroMQ publisher that encodes batches as vLLM does: events tagged by the name of their class."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread
from typing import Any

import msgspec
import pytest

from anaphora.keys import block_hashes
from anaphora.routing.base import BlocksCleared, BlocksRemoved, BlocksStored, CacheEvent, question
from anaphora.routing.expected import Expected
from anaphora.routing.router import Router
from anaphora.routing.vllm_events import Subscriber, Translator
from anaphora.testing.routing import fleet

zmq = pytest.importorskip("zmq")

NAMESPACE = b"ours"
TOKENS = list(range(100, 164))
OURS = tuple(block_hashes(NAMESPACE, TOKENS, 16))


def stored(names: list[Any], parent: Any, tokens: list[int], **fields: Any) -> dict[str, Any]:
    event = {"block_hashes": names, "parent_block_hash": parent, "token_ids": tokens, "block_size": 16}
    return {"type": "BlockStored", **event, "lora_id": None, "medium": "GPU", "lora_name": None, **fields}


def removed(names: list[Any], **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": names, "medium": "GPU", **fields}


def batch(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


FIRST = stored([b"v0", b"v1"], None, TOKENS[:32])
THEN = stored([b"v2", b"v3"], b"v1", TOKENS[32:])


def test_blocks_get_the_names_that_chains_of_ours_have() -> None:
    translator = Translator(NAMESPACE)
    assert translator.batch(batch(FIRST, THEN)) == [BlocksStored(OURS[:2], (16, 16)), BlocksStored(OURS[2:], (16, 16))]
    assert translator.batch(batch(removed([b"v3", b"never seen"]))) == [BlocksRemoved((OURS[3],))]
    assert translator.batch(batch({"type": "AllBlocksCleared"})) == [BlocksCleared()]
    assert translator.batch(batch(THEN)) == []  # its beginning is not known any more


def test_events_of_older_versions_are_lists() -> None:
    first = [
        "BlockStored",
        [b"v0", b"v1"],
        None,
        TOKENS[:32],
        16,
        None,
        "GPU",
        None,
        None,
        0,
        "full_attention",
        None,
        "something new",
    ]
    events: list[Any] = [first, ["BlockRemoved", [b"v1"], "GPU"], ["AllBlocksCleared"]]
    expected = [BlocksStored(OURS[:2], (16, 16)), BlocksRemoved((OURS[1],)), BlocksCleared()]
    assert Translator(NAMESPACE).batch(batch(*events)) == expected


def test_events_of_unknown_kinds_are_passed_over_and_the_others_are_heeded() -> None:
    unknown: list[Any] = [
        ["BlockStored", 7],
        ["Nothing"],
        [],
        [[]],
        3,
        ["BlockRemoved", [1.5]],
        {"type": "BlockMigrated", "to": 1},
    ]
    translator = Translator(NAMESPACE)
    assert translator.batch(batch(*unknown, FIRST, *unknown)) == [BlocksStored(OURS[:2], (16, 16))]
    assert translator.batch(batch(*unknown, removed([b"v1"]))) == [BlocksRemoved((OURS[1],))]


def test_of_several_kinds_of_layers_those_of_full_attention_count() -> None:
    translator = Translator(NAMESPACE)
    sliding = stored([b"v0", b"v1"], None, TOKENS[:32], block_size=32, group_idx=0, kv_cache_spec_kind="sliding_window")
    full = stored([b"v0", b"v1"], None, TOKENS[:32], group_idx=1, kv_cache_spec_kind="full_attention")
    assert translator.batch(batch(sliding, full)) == [BlocksStored(OURS[:2], (16, 16))]
    assert translator.block_size == 16
    assert translator.batch(batch(removed([b"v0"], group_idx=0))) == []
    assert translator.batch(batch(removed([b"v1"], group_idx=1))) == [BlocksRemoved((OURS[1],))]


def test_hashes_may_be_numbers_and_unknown_fields_are_passed_over() -> None:
    event = stored([7, 8], None, TOKENS[:32], group_idx=0, kv_cache_spec_kind="full", something_new=[1])
    assert Translator(NAMESPACE).batch(batch(event)) == [BlocksStored(OURS[:2], (16, 16))]


def test_a_block_that_moves_to_memory_of_the_machine_is_in_a_slower_place() -> None:
    translator = Translator(NAMESPACE)
    translator.batch(batch(FIRST))
    events = translator.batch(
        batch(stored([b"v0"], None, TOKENS[:16], medium="CPU"), removed([b"v0"]), removed([b"v0"], medium="CPU"))
    )
    assert events == [BlocksStored(OURS[:1], (16,), "cpu"), BlocksRemoved(OURS[:1]), BlocksRemoved(OURS[:1], "cpu")]


@pytest.mark.parametrize("apart", [{"lora_name": "an adapter"}, {"extra_keys": [["a salt"], None]}])
def test_blocks_of_adapters_and_salts_are_passed_over(apart: dict[str, Any]) -> None:
    assert Translator(NAMESPACE).batch(batch(stored([b"v0", b"v1"], None, TOKENS[:32], **apart))) == []


def test_what_is_no_batch_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="not a batch"):
        Translator(NAMESPACE).batch(b"\x00garbage")


@pytest.fixture
def publisher() -> Iterator[Any]:
    context = zmq.Context()
    socket = context.socket(zmq.XPUB)  # as PUB, and it tells when somebody has subscribed
    socket.bind("tcp://127.0.0.1:0")
    yield socket
    socket.close(linger=0)
    context.term()


def test_a_router_follows_what_a_publisher_says(publisher: Any) -> None:
    strategy = Expected()
    router = Router(strategy, fleet("one", capacity_tokens=None))
    asked = question(OURS, 16, 70)
    with Subscriber(publisher.getsockopt_string(zmq.LAST_ENDPOINT), Translator(NAMESPACE)) as subscriber:
        assert publisher.recv() == b"\x01"
        found = []
        messages: list[tuple[int, bytes]] = [
            (0, batch(FIRST, THEN)),
            (1, batch(removed([b"v3"]))),
            (2, b"garbage"),
            (5, batch(removed([b"v2"]))),
            (0, batch(FIRST)),  # it has restarted
        ]
        for number, payload in messages:
            publisher.send_multipart((b"", number.to_bytes(8, "big"), payload))
            events: list[CacheEvent] = list(subscriber.read(10.0))
            router.events("one", events, 0.0)
            choice = strategy.pick(asked, router.replicas, 0.0)
            assert choice is not None
            found.append(choice.cached_tokens)
        assert subscriber.num_missed == 2
        assert subscriber.read(0.0) == ()
    assert found == [64, 48, 48, 32, 32]


class Replaying:
    """Gives out once more what was published, from the number that is asked for on, as vLLM does."""

    def __init__(self, kept: dict[int, bytes]) -> None:
        self.kept = kept
        self.asked: list[int] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind("tcp://127.0.0.1:0")
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._ending = Event()
        self._thread = Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._ending.is_set():
            if not self._socket.poll(50):
                continue
            client, _, first = self._socket.recv_multipart()
            self.asked.append(int.from_bytes(first, "big"))
            for number, payload in self.kept.items():
                if number >= self.asked[-1]:
                    self._socket.send_multipart((client, b"", number.to_bytes(8, "big"), payload))
            self._socket.send_multipart((client, b"", (-1).to_bytes(8, "big", signed=True), b""))

    def close(self) -> None:
        self._ending.set()
        self._thread.join()
        self._socket.close(linger=0)
        self._context.term()


@pytest.fixture
def replaying() -> Iterator[Replaying]:
    replaying = Replaying({})
    yield replaying
    replaying.close()


def test_what_was_missed_is_asked_for_again(publisher: Any, replaying: Replaying) -> None:
    def publish(number: int, *events: dict[str, Any], heard: bool = True) -> None:
        replaying.kept[number] = batch(*events)
        if heard:
            publisher.send_multipart((b"", number.to_bytes(8, "big"), replaying.kept[number]))

    publish(0, FIRST, heard=False)  # before anybody listened
    publish(1, THEN, heard=False)
    endpoint = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
    with Subscriber(endpoint, Translator(NAMESPACE), replay=replaying.address) as subscriber:
        assert publisher.recv() == b"\x01"
        assert subscriber.read(10.0) == [BlocksStored(OURS[:2], (16, 16)), BlocksStored(OURS[2:], (16, 16))]
        publish(2, removed([b"v3"]))
        assert subscriber.read(10.0) == [BlocksRemoved((OURS[3],))]
        publish(3, removed([b"v2"]), heard=False)
        publish(4, removed([b"v1"]))
        assert subscriber.read(10.0) == [BlocksRemoved((OURS[2],)), BlocksRemoved((OURS[1],))]
        assert subscriber.num_missed == 0
        publish(5, removed([b"v0"]), heard=False)
        publish(6, FIRST, heard=False)
        del replaying.kept[5]  # as old as nobody keeps
        publish(7, removed([b"v1"]))
        assert list(subscriber.read(10.0))[-1] == BlocksRemoved((OURS[1],))
        assert subscriber.num_missed == 1
        replaying.kept.clear()
        publish(0, FIRST, heard=False)  # it has restarted, and nobody noticed at once
        publish(1, removed([b"v1"]))
        assert subscriber.read(10.0) == [BlocksCleared(), BlocksStored(OURS[:2], (16, 16)), BlocksRemoved((OURS[1],))]
        assert subscriber.num_missed == 1
    assert replaying.asked == [0, 3, 5, 0]
