"""Cutting and putting together parameters."""

from __future__ import annotations

import pytest
import torch

from mlm_cli.parallel.layers import new_parameter
from mlm_cli.parallel.random import initial_weight, key_of
from mlm_cli.parallel.shard import Shard, assemble, full_shape, slice_full

CASES = [Shard(0), Shard(1), Shard(0, (8, 4, 4)), Shard(1, (12, 4)), None]


@pytest.mark.parametrize("shard", CASES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_put_together_are_the_whole(shard: Shard | None, size: int) -> None:
    full = torch.arange(16.0 * 16).view(16, 16)
    assert assemble([slice_full(full, shard, rank, size) for rank in range(size)], shard).equal(full)


def test_blocks_are_cut_separately() -> None:
    full = torch.arange(8.0)[:, None]
    rows = slice_full(full, Shard(0, (4, 2, 2)), rank=1, size=2)
    assert rows.flatten().tolist() == [2, 3, 5, 7]


def test_full_shape_of_a_slice() -> None:
    assert full_shape(new_parameter(3, 5, init=0.1, shard=Shard(1)), 4) == (3, 20)
    assert full_shape(new_parameter(3, 5, init=0.1), 4) == (3, 5)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(0)
    first = initial_weight("layers.0.mlp.up.weight", (64, 32), 0.02, seed=7)
    torch.manual_seed(99)
    torch.randn(5)
    assert initial_weight("layers.0.mlp.up.weight", (64, 32), 0.02, seed=7).equal(first)
    assert not initial_weight("layers.1.mlp.up.weight", (64, 32), 0.02, seed=7).equal(first)
    assert not initial_weight("layers.0.mlp.up.weight", (64, 32), 0.02, seed=8).equal(first)
    assert abs(first.std().item() - 0.02) < 0.002


def test_padding_rows_are_zero_and_do_not_shift_the_draw() -> None:
    narrow = initial_weight("embedding.word.weight", (100, 8), 0.02, seed=1, valid=100)
    wide = initial_weight("embedding.word.weight", (128, 8), 0.02, seed=1, valid=100)
    assert wide[:100].equal(narrow)
    assert not wide[100:].any()


def test_seed_key_is_pinned() -> None:
    """Initial weights of published runs hang on this number."""
    assert key_of(1234, "embedding.word.weight") == 8814447438119206153
