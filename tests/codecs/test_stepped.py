from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("zstandard")

import torch
from hypothesis import given
from hypothesis import strategies as st

from anaphora.codecs.stepped import Int3, Int4

QUARTER_OCTAVE = 2**0.25
"""A step may be that much longer than it is meant to be."""


@given(st.integers(0, 2**31), st.sampled_from((Int4(), Int3())), st.floats(1e-3, 1e3), st.floats(1, 60))
def test_no_value_is_off_by_more_than_half_a_step_of_its_token(
    seed: int, codec: Int4 | Int3, size: float, outlier: float
) -> None:
    torch.manual_seed(seed)
    blocks = size * torch.randn((1, 2, 2, 2, 8, 32))
    blocks[..., 3] *= outlier
    out = torch.empty_like(blocks)
    codec.decode(codec.encode(blocks), out)
    root_mean_square = blocks.square().mean(-1, keepdim=True).sqrt()
    largest = blocks.abs().amax(-1, keepdim=True)
    for kind, share in ((0, codec.key_step), (1, codec.value_step)):
        step = torch.maximum(share * root_mean_square, largest / 127)[:, :, kind] * QUARTER_OCTAVE
        assert ((out - blocks)[:, :, kind].abs() <= 0.5001 * step).all()


def test_what_all_tokens_of_a_block_have_in_common_costs_keys_little() -> None:
    torch.manual_seed(0)
    moving = torch.randn((1, 4, 2, 3, 16, 64))
    common = 20 * torch.randn((1, 4, 2, 3, 1, 64))
    fine = Int4().encode(moving + 0.0 * common)[0]
    # Steps are shares of the size, which the common part raises: made as much shorter, they are as long as before.
    ratio = ((moving + common).square().mean() / moving.square().mean()).sqrt().item()

    class Finer(Int4):
        key_step = Int4.key_step / ratio
        value_step = Int4.value_step

    keys_bytes = int.from_bytes(Finer().encode(moving + common)[0][:4], "little")
    assert keys_bytes < 1.35 * int.from_bytes(fine[:4], "little")


def test_a_token_of_zeros_among_others_stays_zero() -> None:
    blocks = torch.randn((1, 2, 2, 2, 8, 32))
    blocks[..., 2, :] = 0.0
    out = torch.empty_like(blocks)
    Int3().decode(Int3().encode(blocks), out)
    assert not out[..., 2, :].any()
