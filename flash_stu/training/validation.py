"""What a run is validated on."""

import numpy as np
import torch

from flash_stu.data import TokenDataset
from flash_stu.errors import UserError
from flash_stu.training.config import RunConfig
from flash_stu.training.parallel import World


class ValidationWindows:
    """The same windows at every validation, evenly spread over the split."""

    def __init__(self, dataset: TokenDataset, config: RunConfig) -> None:
        self.dataset = dataset
        self.length = config.train.sequence_length
        self.batch_size = config.train.micro_batch_size
        available = (len(dataset) - 1) // self.length
        if available < 1:
            raise UserError(
                f"train.sequence_length is {self.length}; the validation split has only {len(dataset)} tokens"
            )
        wanted = config.train.validation_tokens
        count = available if wanted is None else min(available, max(1, wanted // self.length))
        self.starts = [i * available // count * self.length for i in range(count)]
        self.tokens_per_byte = len(dataset) / dataset.num_bytes

    def batches(self, world: World):
        """Yield (windows, how many of them count, from the front) for this process.

        Every process gets the same number of batches, since a forward pass may have to be made by all
        together, and all batches have one shape, since compiled blocks would be compiled again for another:
        the last ones are filled up with copies.
        """
        for first in range(0, len(self.starts), self.batch_size * world.size):
            begin = first + world.rank * self.batch_size
            starts = self.starts[begin : begin + self.batch_size]
            filled = starts + self.starts[:1] * (self.batch_size - len(starts))
            windows = [self.dataset.window(start, self.length + 1) for start in filled]
            yield torch.from_numpy(np.stack(windows).astype(np.int64)), len(starts)
