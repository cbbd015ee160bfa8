"""Reading ahead changes when batches are read, and nothing else."""

import threading
import time

import pytest
import torch

from flash_stu.data import BatchLoader, Prefetcher


class Loader:
    """Gives the step's number as its batch, and notes which steps were read."""

    def __init__(self, broken: int | None = None, slow: threading.Event | None = None):
        self.read = []
        self._broken = broken
        self._slow = slow

    def batch(self, step):
        if self._slow is not None:
            self._slow.wait(20)
        if step == self._broken:
            raise OSError("the disk is gone")
        self.read.append(step)
        return torch.tensor([step])


def eventually(condition) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def test_batches_are_the_loaders(make_dataset):
    loader = BatchLoader(make_dataset(500, shard_tokens=40), 7, 6, seed=3)
    with Prefetcher(loader, 5, 40) as prefetcher:
        for step in range(5, 41):
            batch, waited = prefetcher.get(step)
            assert torch.equal(batch, loader.batch(step)) and batch.dtype == torch.int64
            assert waited >= 0


@pytest.mark.parametrize("depth", [1, 3])
def test_reads_ahead_but_not_further(depth):
    loader = Loader()
    with Prefetcher(loader, 0, 100, depth=depth) as prefetcher:
        assert eventually(lambda: len(loader.read) == depth)
        time.sleep(0.05)
        assert loader.read == list(range(depth))
        prefetcher.get(0)
        assert eventually(lambda: len(loader.read) == depth + 1)


def test_stops_after_the_last_step():
    loader = Loader()
    with Prefetcher(loader, 3, 4, depth=9) as prefetcher:
        assert [prefetcher.get(step)[0].item() for step in (3, 4)] == [3, 4]
        with pytest.raises(ValueError, match="step 5 was asked for; the next one is 5, the last 4"):
            prefetcher.get(5)
    assert loader.read == [3, 4]


def test_only_the_next_step_can_be_had():
    with Prefetcher(Loader(), 3, 9) as prefetcher:
        for wrong in (0, 2, 4, 10):
            with pytest.raises(ValueError, match=f"step {wrong} was asked for; the next one is 3"):
                prefetcher.get(wrong)
        assert prefetcher.get(3)[0].item() == 3
        with pytest.raises(ValueError):
            prefetcher.get(3)


def test_an_error_comes_at_its_step_and_stays():
    with Prefetcher(Loader(broken=2), 0, 9) as prefetcher:
        assert [prefetcher.get(step)[0].item() for step in (0, 1)] == [0, 1]
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                prefetcher.get(2)


def test_waiting_is_measured():
    gate = threading.Event()
    with Prefetcher(Loader(slow=gate), 0, 1) as prefetcher:
        threading.Timer(0.1, gate.set).start()
        assert prefetcher.get(0)[1] > 0.05


def test_closing_ends_the_thread():
    for depth in (1, 4):
        before = threading.active_count()
        with Prefetcher(Loader(), 0, 10**9, depth=depth) as prefetcher:
            prefetcher.get(0)
        assert threading.active_count() == before
    with pytest.raises(KeyError), Prefetcher(Loader(), 0, 9):
        raise KeyError("the caller's own error passes through")
    assert threading.active_count() == before


def test_outside_the_with_block():
    prefetcher = Prefetcher(Loader(), 0, 9)
    with pytest.raises(RuntimeError, match="outside the prefetcher's with block"):
        prefetcher.get(0)
    with prefetcher:
        prefetcher.get(0)
    with pytest.raises(RuntimeError, match="outside"):
        prefetcher.get(1)
