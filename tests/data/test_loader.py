"""Batches are a pure function of (seed, step, rank, world size)."""

import numpy as np
import pytest
import torch

from flash_stu.data import BatchLoader
from flash_stu.errors import UserError

LENGTH, BATCH = 7, 6
PINNED = [6, 3, 12, 11, 4, 10, 13, 9, 14, 15, 18, 0, 2, 17, 8, 7, 5, 1, 19, 16]


@pytest.fixture
def dataset(make_dataset):
    return make_dataset(20 * LENGTH + 5, shard_tokens=31)  # 20 windows and an incomplete one


def window_numbers(dataset, batch) -> list[int]:
    """Find which window of the dataset each row is, by its tokens."""
    rows = {dataset.window(i * LENGTH, LENGTH + 1).tobytes(): i for i in range(20)}
    return [rows[row.numpy().astype(np.uint16).tobytes()] for row in batch]


def test_shape_and_type(dataset):
    batch = BatchLoader(dataset, LENGTH, BATCH, seed=0).batch(3)
    assert batch.shape == (BATCH, LENGTH + 1)
    assert batch.dtype == torch.int64


def test_every_epoch_visits_every_window_once(dataset):
    loader = BatchLoader(dataset, LENGTH, BATCH, seed=0)
    assert loader.num_windows == 20
    order = [number for step in range(10) for number in window_numbers(dataset, loader.batch(step))]
    epochs = [order[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(20)]}) == 4


def test_the_order_never_changes(dataset):
    """Pinned, so that a run resumed after an upgrade sees the windows it has not seen yet."""
    loader = BatchLoader(dataset, LENGTH, 20, seed=7)
    assert window_numbers(dataset, loader.batch(0)) == PINNED


def test_a_step_does_not_depend_on_the_steps_before(dataset):
    loader = BatchLoader(dataset, LENGTH, BATCH, seed=0)
    in_order = [loader.batch(step) for step in range(12)]
    for step in (11, 0, 7, 3, 7):
        assert torch.equal(loader.batch(step), in_order[step])
        assert torch.equal(BatchLoader(dataset, LENGTH, BATCH, seed=0).batch(step), in_order[step])
    assert not torch.equal(BatchLoader(dataset, LENGTH, BATCH, seed=1).batch(0), in_order[0])


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_same_batch(dataset, world_size):
    whole = BatchLoader(dataset, LENGTH, BATCH, seed=5)
    ranks = [BatchLoader(dataset, LENGTH, BATCH, 5, rank, world_size) for rank in range(world_size)]
    for step in range(8):
        assert torch.equal(torch.cat([loader.batch(step) for loader in ranks]), whole.batch(step))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_next_batch_is_read_ahead(dataset, monkeypatch, rank):
    ahead = []
    monkeypatch.setattr(type(dataset), "read_ahead", lambda _, start, length: ahead.append((start, length)))
    loader = BatchLoader(dataset, LENGTH, BATCH, 0, rank, 2)
    for step in range(8):
        expected = [dataset.window(*window).tolist() for window in ahead]
        ahead.clear()
        batch = loader.batch(step)
        assert step == 0 or batch.tolist() == expected


def test_batch_larger_than_the_dataset(dataset):
    numbers = window_numbers(dataset, BatchLoader(dataset, LENGTH, 50, seed=0).batch(0))
    assert sorted(numbers[:20]) == sorted(numbers[20:40]) == list(range(20))


def test_permutation_is_computed_once_an_epoch(dataset, monkeypatch):
    epochs = []
    original = BatchLoader._new_permutation
    monkeypatch.setattr(
        BatchLoader, "_new_permutation", lambda self, epoch: epochs.append(epoch) or original(self, epoch)
    )
    loader = BatchLoader(dataset, LENGTH, BATCH, seed=0)
    for step in range(7):
        loader.batch(step)
    assert epochs == [0, 1, 2]


def test_shortest_dataset(make_dataset):
    tokens = make_dataset(LENGTH + 1)
    batch = BatchLoader(tokens, LENGTH, 2, seed=0).batch(0)
    assert batch.tolist() == [tokens.window(0, LENGTH + 1).tolist()] * 2


def test_refusals(dataset, make_dataset):
    with pytest.raises(UserError, match="batch_size is 6; it must be a multiple of the 4 processes"):
        BatchLoader(dataset, LENGTH, BATCH, seed=0, world_size=4)
    with pytest.raises(UserError, match="has 7 tokens, less than one window of .* = 8"):
        BatchLoader(make_dataset(LENGTH, name="short"), LENGTH, 1, seed=0)
