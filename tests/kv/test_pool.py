import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anaphora.kv.pool import KVPool, KVShape

SIZE = 4


def make_pool() -> KVPool:
    shape = KVShape(num_layers=2, num_kv_heads=3, head_dim=5, dtype=torch.float32)
    return KVPool(shape, arena_tokens=64, num_blocks=10, block_size=SIZE, device=torch.device("cpu"))


def write(pool: KVPool, start: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in range(pool.shape.num_layers):
        for tensor in (pool.keys[layer], pool.values[layer]):
            tensor[:, start : start + length] = torch.rand((3, length, 5), generator=generator)


def read(pool: KVPool, start: int, length: int) -> torch.Tensor:
    return torch.stack(
        [torch.stack((pool.keys[i], pool.values[i]))[:, :, start : start + length] for i in range(pool.shape.num_layers)]
    )


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(10)), st.integers(1, 7), st.integers(0, 20))
def test_what_is_saved_into_any_blocks_is_loaded_back_unchanged(blocks: list[int], count: int, start: int) -> None:
    pool = make_pool()
    write(pool, start, count * SIZE, seed=count)
    before = read(pool, start, count * SIZE).clone()
    pool.save(blocks[:count], start)
    write(pool, 0, 64, seed=99)
    pool.load(blocks[:count], 30)
    assert torch.equal(read(pool, 30, count * SIZE), before)


def test_loading_a_part_of_the_chain_gives_that_part() -> None:
    pool = make_pool()
    write(pool, 0, 3 * SIZE, seed=1)
    pool.save([7, 2, 5], 0)
    pool.load([2, 5], 40)
    assert torch.equal(read(pool, 40, 2 * SIZE), read(pool, SIZE, 2 * SIZE))


def test_moving_an_extent_copies_its_positions() -> None:
    pool = make_pool()
    write(pool, 3, 9, seed=2)
    pool.move(3, 40, 9)
    assert torch.equal(read(pool, 40, 9), read(pool, 3, 9))


def test_bytes_per_token_count_keys_and_values_of_all_layers() -> None:
    assert KVShape(30, 3, 64, torch.bfloat16).bytes_per_token == 23_040
