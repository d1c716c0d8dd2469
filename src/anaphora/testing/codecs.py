"""What every codec owes the KV cache, as tests to inherit.

class TestMyCodec(CodecContract):
    most_error = 0.01
    def make(self) -> Codec:
        return MyCodec()
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from anaphora.codecs.base import Codec
from anaphora.errors import DamagedBlock

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 2, 1, 1, 1), (2, 2, 3, 16, 64), (3, 2, 2, 4, 80), (1, 2, 1, 32, 128), (1, 2, 5, 3, 7))
"""Of a block: [layers, 2, kv_heads, block_size, head_dim]."""


def kv_like(shape: tuple[int, ...], dtype: torch.dtype, *, num: int = 3, seed: int = 0) -> torch.Tensor:
    """`num` blocks with what real KV has: channels of keys that stand out, layers of other sizes, one token unlike the rest."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn((num, *shape), generator=generator)
    channels = 1 + 8 * (torch.rand((shape[0], shape[2], 1, shape[4]), generator=generator) > 0.9)
    blocks[:, :, 0] = blocks[:, :, 0] * channels + 0.5 * channels
    blocks *= torch.logspace(-2, 1, shape[0]).view(-1, 1, 1, 1, 1)
    blocks[0, :, 1, :, 0] *= 0.01
    return blocks.to(dtype)


class CodecContract:
    """Inherit, and say how one is made."""

    most_error = 0.0
    """How far a decoded value of `kv_like` blocks may be off, as a share of the largest one of its layer and kind."""

    def make(self) -> Codec:
        raise NotImplementedError

    def examples(self) -> Iterator[torch.Tensor]:
        for shape in SHAPES:
            for dtype in DTYPES:
                yield kv_like(shape, dtype)

    def decoded(self, payloads: list[bytes], like: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(like, float("nan"))
        self.make().decode(payloads, out)
        return out

    def test_blocks_come_back_as_they_were_or_as_near_as_it_says(self) -> None:
        codec = self.make()
        assert codec.lossy == (self.most_error > 0)
        for blocks in self.examples():
            found = self.decoded(codec.encode(blocks), blocks)
            if not codec.lossy:
                assert torch.equal(found.view(torch.uint8), blocks.contiguous().view(torch.uint8))
            largest = blocks.float().abs().amax((-3, -2, -1), keepdim=True)
            # A decoded value is rounded to its type once more.
            rounding = blocks.float().abs() * torch.finfo(blocks.dtype).eps if codec.lossy else 0.0
            error = (found.float() - blocks.float()).abs() - rounding
            assert (error <= self.most_error * largest).all()

    def test_a_payload_takes_no_more_than_it_says(self) -> None:
        codec = self.make()
        for blocks in self.examples():
            most = codec.bits_per_value(blocks[0]) * blocks[0].numel() * (1 + 1e-9)
            assert codec.bits_per_value(blocks[0].to("meta")) == codec.bits_per_value(blocks[0])
            assert all(8 * len(payload) <= most for payload in codec.encode(blocks))

    def test_a_payload_is_that_of_its_block_alone(self) -> None:
        codec = self.make()
        for blocks in self.examples():
            together = codec.encode(blocks)
            assert together == [codec.encode(block[None])[0] for block in blocks]
            found = self.decoded(together, blocks)
            assert torch.equal(self.decoded(together[::-1], blocks).flip(0), found)
            assert torch.equal(self.decoded(together[1:2], blocks[1:2]), found[1:2])

    def test_no_blocks_are_no_payloads(self) -> None:
        codec = self.make()
        none = torch.empty((0, *SHAPES[1]))
        assert codec.encode(none) == []
        codec.decode([], none)

    def test_several_threads_may_use_one(self) -> None:
        codec = self.make()
        blocks = kv_like(SHAPES[1], torch.float32, num=16)
        expected = codec.encode(blocks)
        found = self.decoded(expected, blocks)
        out = torch.empty_like(blocks)
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(lambda i: codec.encode(blocks[i : i + 1])[0], range(16))) == expected
            list(threads.map(lambda i: codec.decode(expected[i : i + 1], out[i : i + 1]), range(16)))
        assert torch.equal(out, found)

    def test_blocks_need_not_be_contiguous_and_are_left_as_they_were(self) -> None:
        codec = self.make()
        blocks = kv_like(SHAPES[1], torch.float32)
        spread = blocks.permute(1, 2, 3, 0, 4, 5).contiguous().permute(3, 0, 1, 2, 4, 5)
        before = spread.clone()
        assert codec.encode(spread) == codec.encode(blocks)
        assert torch.equal(spread, before)

    def test_payloads_may_be_any_kind_of_memory(self) -> None:
        codec = self.make()
        blocks = kv_like(SHAPES[1], torch.float32)
        payloads = codec.encode(blocks)
        expected = self.decoded(payloads, blocks)
        for kind in (bytearray, memoryview, lambda payload: memoryview(b"odd" + payload)[3:].toreadonly()):
            out = torch.empty_like(blocks)
            codec.decode([kind(payload) for payload in payloads], out)
            assert torch.equal(out, expected)

    def test_zeros_stay_zeros_and_whatever_is_finite_stays_finite(self) -> None:
        codec = self.make()
        for dtype in DTYPES:
            info = torch.finfo(dtype)
            for value in (
                0.0,
                info.smallest_normal * info.eps,
                info.smallest_normal,
                1e30 if info.max > 1e30 else info.max / 2,
            ):
                blocks = torch.full((1, *SHAPES[1]), value, dtype=dtype)
                blocks[:, :, :, :, 3:5] *= -1
                found = self.decoded(codec.encode(blocks), blocks)
                assert found.isfinite().all()
                assert value or not found.any()

    def test_a_payload_of_another_length_is_damaged(self) -> None:
        codec = self.make()
        blocks = kv_like(SHAPES[1], torch.float32, num=1)
        (payload,) = codec.encode(blocks)
        for wrong in (b"", payload[:1], payload[:-1], payload + b"\0", payload * 2):
            with pytest.raises(DamagedBlock):
                codec.decode([wrong], torch.empty_like(blocks))

    def test_altered_payloads_do_nothing_worse_than_raise_that_they_are_damaged(self) -> None:
        codec = self.make()
        blocks = kv_like(SHAPES[1], torch.float32, num=1)
        (payload,) = codec.encode(blocks)
        rng = random.Random(0)
        for _ in range(100):
            altered = bytearray(payload)
            for _ in range(rng.randint(1, 20)):
                altered[rng.randrange(min(len(altered), rng.choice((20, 1 << 30))))] = rng.randrange(256)
            try:
                codec.decode([altered], torch.empty_like(blocks))
            except DamagedBlock:
                continue
