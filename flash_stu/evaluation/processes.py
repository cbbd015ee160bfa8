"""Several processes evaluating together: each runs a part of the requests, and all know all results.

Every process runs the same program on the same tasks; only the forward passes are divided. What they exchange are
plain numbers, so the group is gloo's wherever the model is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from flash_stu.distributed import process_group, read_launch
from flash_stu.errors import UserError
from flash_stu.model.loading import choose_device
from flash_stu.orphans import end_with_launcher

_TIMEOUT = timedelta(days=1)  # a process waits for the slowest; torchrun ends all when one fails


@dataclass(frozen=True)
class Processes:
    """The processes of an evaluation, seen from one of them."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list:
        """What every process passes here, by rank, on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process do something before the others: what it downloads or converts, they find."""
        if not self.is_main:
            self.gather(None)
        yield
        if self.is_main:
            self.gather(None)


ALONE = Processes()


@contextmanager
def join_processes(device: str | None) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that torchrun started, or be alone; each ends when torchrun has died.

    Args:
        device: what the user asked for; None for a GPU if there is one. Of several processes each takes the GPU of its
            local rank.

    Raises:
        UserError: for a device that is not here, or more processes than GPUs.
    """
    end_with_launcher()
    chosen = choose_device(device)
    launch = read_launch()
    size, local = launch.size, launch.local_rank
    if size == 1:
        yield ALONE, chosen
        return
    if chosen.type == "cuda":
        if chosen.index is not None:
            raise UserError(f"--device is {device!r} for {size} processes; allowed: cpu, cuda")
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU; only {torch.cuda.device_count()} are visible")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    with process_group(launch, "gloo", _TIMEOUT):
        yield Processes(launch.rank, size), chosen
