"""How much a model runs at a time: batches by a budget of tokens, smaller where a GPU's memory does not hold them."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from flash_stu.errors import UserError

_CPU_TOKENS = 4096  # more gains nothing on a CPU
_GPU_TOKENS = 65536  # halved until it fits

Item = TypeVar("Item")


class Budget:
    """Tokens in a forward pass, padding included, and optionally sequences.

    Attributes:
        tokens: at most, unless a single sequence is longer.
        rows: sequences at most; None for any number.
    """

    def __init__(self, tokens: int, rows: int | None = None) -> None:
        self.tokens, self.rows = tokens, rows

    @classmethod
    def automatic(cls, device: torch.device, rows: int | None = None) -> "Budget":
        """The one to begin with on a device."""
        return cls(_GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS, rows)

    def run(
        self, items: Sequence[Item], weight: Callable[[Item], int], function: Callable[[Sequence[Item]], object]
    ) -> None:
        """Call a function with batches of items, in order; a batch that the GPU's memory does not hold is halved.

        Args:
            items: heaviest first, so that the first of a batch says how wide it is.
            weight: tokens of an item.
            function: called with every batch; again with smaller ones where it ran out of memory.

        Raises:
            UserError: if there is no memory for a single item.
        """
        start = 0
        while start < len(items):
            widest = max(1, weight(items[start]))
            count = max(1, min(len(items) - start, self.tokens // widest, self.rows or len(items)))
            if self._fits(function, items[start : start + count]):
                start += count
            elif count == 1:
                raise UserError(f"the GPU's memory does not hold one sequence of {widest} tokens")
            else:
                self.tokens = max(1, min(self.tokens, count * widest) // 2)

    @staticmethod
    def _fits(function: Callable, batch: Sequence) -> bool:
        try:
            function(batch)
            return True
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()  # here, where no traceback holds on to tensors any more
        return False
