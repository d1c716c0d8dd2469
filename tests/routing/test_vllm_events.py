"""Against a real ZeroMQ publisher that encodes batches as vLLM does: events tagged by the name of their class."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import msgspec
import pytest

from anaphora.keys import block_hashes
from anaphora.routing.base import BlocksCleared, BlocksRemoved, BlocksStored, CacheEvent, question
from anaphora.routing.expected import Expected
from anaphora.routing.router import Router
from anaphora.routing.vllm_events import Subscriber, Translator, apart
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


def batch(*events: dict[str, Any], at_s: float = 1.5) -> bytes:
    return msgspec.msgpack.encode([at_s, list(events), 0])


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


def test_blocks_of_adapters_and_salts_have_names_of_their_own() -> None:
    translator = Translator(NAMESPACE)
    kept_apart: list[tuple[dict[str, Any], tuple[str, str]]] = [
        ({}, ("", "")),
        ({"lora_name": "poet", "lora_id": 1, "extra_keys": [["poet"], ["poet"]]}, ("poet", "")),
        ({"lora_name": "poet", "lora_id": 1}, ("poet", "")),  # before blocks came with what goes into their hashes
        ({"extra_keys": [["poet"], None]}, ("", "poet")),
        ({"lora_name": "poet", "extra_keys": [["poet", "pepper"], ["poet"]]}, ("poet", "pepper")),
    ]
    for number, (fields, (adapter, salt)) in enumerate(kept_apart):
        names = tuple(block_hashes(apart(NAMESPACE, adapter, salt), TOKENS[:48], 16))
        first, behind = [number * 10, number * 10 + 1], number * 10 + 2
        assert translator.batch(batch(stored(first, None, TOKENS[:32], **fields))) == [BlocksStored(names[:2], (16, 16))]
        more = {key: value for key, value in fields.items() if key != "extra_keys"}
        assert translator.batch(batch(stored([behind], first[1], TOKENS[32:48], **more))) == [BlocksStored(names[2:], (16,))]
        assert translator.batch(batch(removed([behind]))) == [BlocksRemoved(names[2:])]
    assert len({apart(NAMESPACE, *of) for _, of in kept_apart}) == len(kept_apart) - 1
    without_name = {"lora_id": 7}
    assert translator.batch(batch(stored([b"x"], None, TOKENS[:16], **without_name))) == []


def test_what_lies_before_a_picture_is_told_and_what_lies_behind_it_is_not() -> None:
    translator = Translator(NAMESPACE)
    seen = stored([b"v0", b"v1", b"v2"], None, TOKENS[:48], extra_keys=[None, [["a picture", 3]], None])
    assert translator.batch(batch(seen)) == [BlocksStored(OURS[:1], (16,))]
    assert translator.batch(batch(stored([b"v3"], b"v2", TOKENS[48:]))) == []


def test_a_block_that_was_computed_twice_is_there_until_both_copies_are_dropped() -> None:
    translator = Translator(NAMESPACE)
    translator.batch(batch(FIRST))
    translator.batch(batch(stored([b"v1"], b"v0", TOKENS[16:32])))
    assert translator.batch(batch(removed([b"v1"]))) == []
    assert translator.batch(batch(THEN)) == [BlocksStored(OURS[2:], (16, 16))]  # what comes behind it is understood
    assert translator.batch(batch(removed([b"v1"]))) == [BlocksRemoved((OURS[1],))]


def test_copies_are_not_counted_on_where_batches_were_missed() -> None:
    translator = Translator(NAMESPACE)
    translator.batch(batch(FIRST, FIRST))
    translator.missed()
    assert translator.batch(batch(removed([b"v1"]))) == [BlocksRemoved((OURS[1],))]
    translator.batch(batch(stored([b"v0"], None, TOKENS[:16])))
    assert translator.batch(batch(removed([b"v0"]))) == [BlocksRemoved((OURS[0],))]


def test_copies_elsewhere_may_come_without_tokens() -> None:
    translator = Translator(NAMESPACE)
    elsewhere = stored([b"v1"], None, [], block_size=0, medium="CPU", group_idx=1)
    assert translator.batch(batch(elsewhere, stored([b"v0", b"v1"], None, TOKENS[:32], group_idx=0))) == [
        BlocksStored(OURS[:2], (16, 16))
    ]
    assert translator.block_size == 16
    known = {**elsewhere, "group_idx": 0}
    assert translator.batch(batch(known)) == [BlocksStored((OURS[1],), (16,), "cpu")]
    assert translator.batch(batch(removed([b"v1"]), removed([b"v1"], medium="CPU"))) == [
        BlocksRemoved((OURS[1],)),
        BlocksRemoved((OURS[1],), "cpu"),
    ]


def test_a_part_of_a_block_is_no_block() -> None:
    translator = Translator(NAMESPACE)
    translator.batch(batch(FIRST))
    assert translator.batch(batch(stored([b"part"], b"v1", TOKENS[32:40], block_size=8))) == []
    assert translator.block_size == 16


RECORDED = msgspec.json.decode((Path(__file__).parent.parent / "data" / "vllm_events.json").read_bytes())
"""Batches that vLLM 0.32.0 published while it served SmolLM2-135M with two adapters."""


def recorded(name: str) -> Iterator[tuple[list[CacheEvent], list[dict[str, Any]]]]:
    """What each batch means, and what it says."""
    translator = Translator(NAMESPACE)
    for text in RECORDED[name]:
        payload = b64decode(text)
        yield translator.batch(payload), msgspec.msgpack.decode(payload)[1]


def test_what_a_real_vllm_publishes_is_understood() -> None:
    (((plain,), (said,)),) = recorded("plain")
    assert isinstance(plain, BlocksStored)
    assert list(plain.blocks) == block_hashes(NAMESPACE, said["token_ids"], 32)
    (((salted,), (again,)),) = recorded("salt")
    assert again["token_ids"] == said["token_ids"]
    assert isinstance(salted, BlocksStored)
    assert list(salted.blocks) == block_hashes(apart(NAMESPACE, salt="s1"), said["token_ids"], 32)
    found = [events for events, _ in recorded("adapters")]
    tokens = next(recorded("adapters"))[1][0]["token_ids"]
    starts = [apart(NAMESPACE, *of) for of in (("poet",), ("clerk",), (), ("poet", "pepper"))]
    assert found[:4] == [[BlocksStored(tuple(block_hashes(start, tokens, 32)), (32,))] for start in starts]
    assert isinstance(found[4][0], BlocksStored)


def test_a_real_vllm_computes_some_blocks_twice_and_says_so() -> None:
    """A prompt of whole blocks, asked twice: its last block and the answer's came twice, and were dropped twice."""
    told = [events for events, _ in recorded("twins")]
    stored_ = [event.blocks for events in told[:4] for event in events if isinstance(event, BlocksStored)]
    prompt, answer = stored_[0], stored_[1]
    assert stored_ == [prompt, answer, prompt[-1:], answer]
    removed_ = [name for event in told[4] if isinstance(event, BlocksRemoved) for name in event.blocks]
    assert removed_ == [*answer, *reversed(prompt)]
    said = [event for event in list(recorded("twins"))[4][1] if event["type"] == "BlockRemoved"]
    assert len(said) > len(removed_) + 1


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


def test_what_comes_once_more_behind_its_replay_is_no_restart(publisher: Any, replaying: Replaying) -> None:
    """Published between the beginning of the subscription and the replay."""
    endpoint = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
    replaying.kept |= {0: batch(FIRST, at_s=1.0), 1: batch(THEN, at_s=2.0), 2: batch(removed([b"v3"]), at_s=3.0)}
    with Subscriber(endpoint, Translator(NAMESPACE), replay=replaying.address) as subscriber:
        assert publisher.recv() == b"\x01"
        for number in (1, 2):
            publisher.send_multipart((b"", number.to_bytes(8, "big"), replaying.kept[number]))
        assert len(subscriber.read(10.0)) == 3
        assert [subscriber.read(10.0), subscriber.read(10.0)] == [(), ()]
        publisher.send_multipart((b"", (1).to_bytes(8, "big"), batch(FIRST, at_s=3.0)))
        assert subscriber.read(10.0)[0] == BlocksCleared()  # a number that is no higher: it has restarted
    with Subscriber(endpoint, Translator(NAMESPACE), replay=replaying.address) as subscriber:
        assert [publisher.recv(), publisher.recv()] == [b"\x00", b"\x01"]
        subscriber.read(10.0)
        publisher.send_multipart((b"", (1).to_bytes(8, "big"), batch(FIRST, at_s=4.0)))
        assert subscriber.read(10.0)[0] == BlocksCleared()  # and here it was published later than what was replayed


def test_a_replica_that_could_not_be_asked_at_first_is_asked_when_it_speaks(publisher: Any, replaying: Replaying) -> None:
    endpoint = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
    with Subscriber(endpoint, Translator(NAMESPACE), replay=replaying.address) as subscriber:
        assert publisher.recv() == b"\x01"
        assert subscriber.read(10.0) == []
        replaying.kept |= {5: batch(FIRST), 6: batch(THEN)}  # what it published before that is kept no more
        publisher.send_multipart((b"", (7).to_bytes(8, "big"), batch(removed([b"v3"]))))
        assert subscriber.read(10.0) == [
            BlocksStored(OURS[:2], (16, 16)),
            BlocksStored(OURS[2:], (16, 16)),
            BlocksRemoved((OURS[3],)),
        ]
        assert subscriber.num_missed == 0
    assert replaying.asked == [0, 0]


def test_all_of_a_long_replay_arrives(publisher: Any, replaying: Replaying) -> None:
    replaying.kept |= dict.fromkeys(range(10_000), batch({"type": "SomethingLong", "bytes": bytes(5000)}))
    endpoint = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
    with Subscriber(endpoint, Translator(NAMESPACE), replay=replaying.address) as subscriber:
        subscriber.read(10.0)
        assert (subscriber.num_batches, subscriber.num_missed) == (10_000, 0)
