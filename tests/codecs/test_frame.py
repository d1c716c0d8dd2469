from __future__ import annotations

import random

import pytest

pytest.importorskip("torch")
pytest.importorskip("xxhash")

import torch
from hypothesis import given
from hypothesis import strategies as st

from anaphora.codecs import frame
from anaphora.codecs.raw import Raw
from anaphora.errors import DamagedBlock

BLOCK = torch.zeros((2, 2, 1, 4, 8))


class Other(Raw):
    name = "other"
    lossy = True


def test_what_was_packed_is_unpacked_without_a_copy() -> None:
    framed = frame.pack(Raw(), BLOCK, b"payload")
    payload = frame.unpack(Raw(), BLOCK, framed)
    assert bytes(payload) == b"payload"
    assert payload.obj is framed


@given(st.binary(max_size=100), st.binary(max_size=40), st.sampled_from((Raw(), Other())))
def test_a_frame_says_what_is_in_it(payload: bytes, bound_to: bytes, codec: Raw) -> None:
    block = BLOCK.to(torch.bfloat16)
    opened = frame.check(frame.pack(codec, block, payload, bound_to=bound_to), bound_to=bound_to)
    assert (opened.codec, opened.lossy, opened.dtype, opened.shape) == (codec.name, codec.lossy, "bfloat16", (2, 2, 1, 4, 8))
    assert bytes(opened.payload) == payload


def test_every_flipped_bit_is_damage() -> None:
    framed = frame.pack(Raw(), BLOCK, bytes(range(40)))
    for bit in range(8 * len(framed)):
        altered = bytearray(framed)
        altered[bit // 8] ^= 1 << bit % 8
        assert_damaged(bytes(altered))


@given(st.binary(max_size=3000), st.randoms(use_true_random=False))
def test_any_alteration_is_damage(payload: bytes, rng: random.Random) -> None:
    framed = frame.pack(Raw(), BLOCK, payload)
    altered = bytearray(framed)
    for _ in range(rng.randint(1, 8)):
        start = rng.randrange(len(altered))
        altered[start : start + rng.randint(0, 9)] = rng.randbytes(rng.randint(0, 9))
    if altered != framed:
        assert_damaged(bytes(altered))


def test_every_truncation_is_damage_and_so_is_anything_behind_it() -> None:
    framed = frame.pack(Raw(), BLOCK, bytes(range(40)))
    for length in range(len(framed)):
        assert_damaged(framed[:length])
    assert_damaged(framed + b"\0")
    assert_damaged(framed + framed)


@given(st.binary(max_size=200))
def test_other_bytes_are_damage_even_behind_a_true_beginning(other: bytes) -> None:
    framed = frame.pack(Raw(), BLOCK, b"payload")
    assert_damaged(other)
    assert_damaged(framed[:4] + other)
    assert_damaged(framed[:6] + other)
    assert_damaged(framed[: -len(b"payload") - 16] + other)


def test_a_block_of_another_shape_type_or_codec_is_damage_and_the_message_says_which() -> None:
    framed = frame.pack(Raw(), BLOCK, b"payload")
    for codec, block, said in (
        (Raw(), BLOCK[:1], r"float32 \[2, 2, 1, 4, 8\], not float32 \[1, 2, 1, 4, 8\]"),
        (Raw(), BLOCK.half(), "not float16"),
        (Raw(), BLOCK[0], r"not float32 \[2, 1, 4, 8\]"),
        (Other(), BLOCK, "encoded as 'raw', not 'other'"),
    ):
        with pytest.raises(DamagedBlock, match=said):
            frame.unpack(codec, block, framed)


def test_a_frame_of_another_version_is_damage() -> None:
    framed = bytearray(frame.pack(Raw(), BLOCK, b"payload"))
    framed[4] += 1
    with pytest.raises(DamagedBlock, match="version"):
        frame.check(framed)


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_a_sound_frame_in_a_wrong_place_is_damage(here: bytes, there: bytes) -> None:
    framed = frame.pack(Raw(), BLOCK, b"payload", bound_to=here)
    assert bytes(frame.unpack(Raw(), BLOCK, framed, bound_to=here)) == b"payload"
    if here != there:
        with pytest.raises(DamagedBlock):
            frame.unpack(Raw(), BLOCK, framed, bound_to=there)


def assert_damaged(framed: bytes) -> None:
    with pytest.raises(DamagedBlock):
        frame.check(framed)
    with pytest.raises(DamagedBlock):
        frame.unpack(Raw(), BLOCK, framed)
