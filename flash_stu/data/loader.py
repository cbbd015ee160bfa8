"""Batches: which tokens make up training step n."""

import functools

import numpy as np
import torch

from flash_stu.data.shards import TokenDataset
from flash_stu.errors import UserError


class BatchLoader:
    """Cuts a dataset into windows and determines from a step's number alone which of them are in its batch.

    Window w covers tokens w * sequence_length up to and including (w + 1) * sequence_length: neighbours share
    one token, so every token but the first and an incomplete last window is predicted once. An epoch visits
    every window once, in a permutation of its own; epochs follow each other without a break, inside a batch
    where need be. The batch of a step is the same for every number of ranks: rank r has its r-th part. So a
    run can stop anywhere and resume with another world size.

    A batch is read from memory-mapped files by the caller. The operating system is asked for the next step's windows
    meanwhile, so that a step does not wait for a disk or a network file system.

    Args:
        dataset: the tokens.
        sequence_length: tokens the model sees at a time.
        batch_size: windows in a step, over all ranks.
        seed: chooses the permutations; not negative.
        rank: index of this process.
        world_size: number of processes.

    Raises:
        UserError: if the batch cannot be divided among the ranks or the dataset is shorter than one window.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"batch_size is {batch_size}; it must be a multiple of the {world_size} processes")
        self.num_windows = (len(dataset) - 1) // sequence_length
        if self.num_windows < 1:
            raise UserError(
                f"the dataset has {len(dataset)} tokens, less than one window of sequence_length + 1 = "
                f"{sequence_length + 1}; choose a shorter sequence_length or more text"
            )
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self._local_size = batch_size // world_size
        self._local_start = rank * self._local_size
        self._permutation = functools.lru_cache(maxsize=2)(self._new_permutation)

    def batch(self, step: int) -> torch.Tensor:
        """Read this rank's part of a step's batch, (batch_size / world_size, sequence_length + 1), int64."""
        batch = torch.empty(self._local_size, self.sequence_length + 1, dtype=torch.int64)
        for start, row in zip(self._starts(step), batch.numpy(), strict=True):
            self.dataset.read(start, row)
        for start in self._starts(step + 1):
            self.dataset.read_ahead(start, self.sequence_length + 1)
        return batch

    def _starts(self, step: int) -> list[int]:
        """Returns where this rank's windows of a step begin in the dataset."""
        first = step * self.batch_size + self._local_start
        return [self._window(number) * self.sequence_length for number in range(first, first + self._local_size)]

    def _window(self, number: int) -> int:
        """Returns the window at an index of the endless sequence of epochs."""
        epoch, index = divmod(number, self.num_windows)
        return int(self._permutation(epoch)[index])

    def _new_permutation(self, epoch: int) -> np.ndarray:
        # sorting the raw bits: numpy promises that they never change, but not that its permutations do not
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_windows)
        return np.argsort(bits, kind="stable")
