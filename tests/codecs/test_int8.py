from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from anaphora.codecs.int8 import Int8


def test_a_channel_that_stands_out_leaves_the_others_their_precision() -> None:
    """With one scale for the token and no rotation they would lose up to 1000 / 127 / 2."""
    torch.manual_seed(0)
    blocks = torch.randn((1, 4, 2, 2, 16, 64))
    blocks[..., 5] = 1000.0
    out = torch.empty_like(blocks)
    Int8().decode(Int8().encode(blocks), out)
    assert (out - blocks).abs().max() < 2.5
    assert (out - blocks).square().mean().sqrt() < 0.5


@pytest.mark.parametrize("head_dim", [1, 7, 48, 64, 96, 128])
def test_any_size_of_head_is_within_a_hundredth_of_its_largest_value(head_dim: int) -> None:
    torch.manual_seed(0)
    blocks = torch.randn((2, 3, 2, 2, 16, head_dim))
    out = torch.empty_like(blocks)
    Int8().decode(Int8().encode(blocks), out)
    assert ((out - blocks).abs() <= 0.015 * blocks.abs().amax(-1, keepdim=True) + 1e-6).all()
