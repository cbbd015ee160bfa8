"""Batches read ahead by a thread."""

import threading
import time
from collections import deque

import torch

from flash_stu.data.loader import BatchLoader


class Prefetcher:
    """Reads the batches of consecutive steps in a thread, while the caller works on earlier ones.

    A context manager: the thread lives inside the with block.

    Args:
        loader: whose batches are read.
        first: the first step that will be asked for.
        last: the last one.
        pin_memory: put batches into page-locked memory, from which copies to a GPU run beside other work.
        depth: batches read ahead at most.
    """

    def __init__(self, loader: BatchLoader, first: int, last: int, pin_memory: bool = False, depth: int = 3):
        self._loader = loader
        self._next = first
        self._last = last
        self._pinned_for = torch.cuda.current_device() if pin_memory else None
        self._depth = depth
        self._ready: deque[torch.Tensor | Exception] = deque()
        self._changed = threading.Condition()
        self._open = False
        self._thread = threading.Thread(target=self._read_ahead, args=(first,), name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetcher":
        self._open = True
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._open = False
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(timeout=10)  # seconds; a read that hangs longer must not hang the caller

    def get(self, step: int) -> tuple[torch.Tensor, float]:
        """Hand over the batch of a step, see `BatchLoader.batch`; steps are asked for in order.

        Returns:
            the batch, and the seconds that the caller waited for it.

        Raises:
            ValueError: for any step but the next one.
            RuntimeError: outside the with block.
            Exception: what the loader raised at this step.
        """
        start = time.perf_counter()
        with self._changed:
            if step != self._next or step > self._last:
                raise ValueError(f"step {step} was asked for; the next one is {self._next}, the last {self._last}")
            self._changed.wait_for(lambda: self._ready or not self._open)
            if not self._open:
                raise RuntimeError(f"step {step} was asked for outside the prefetcher's with block")
            if isinstance(self._ready[0], Exception):
                raise self._ready[0]
            batch = self._ready.popleft()
            self._next += 1
            self._changed.notify_all()
        return batch, time.perf_counter() - start

    def _read_ahead(self, first: int) -> None:
        for step in range(first, self._last + 1):
            with self._changed:
                self._changed.wait_for(lambda: len(self._ready) < self._depth or not self._open)
                if not self._open:
                    return
            try:
                batch = self._loader.batch(step)
                if self._pinned_for is not None:
                    torch.cuda.set_device(self._pinned_for)  # a new thread starts with the first GPU
                    batch = batch.pin_memory()
            except Exception as error:
                batch = error
            with self._changed:
                if self._open:
                    self._ready.append(batch)
                    self._changed.notify_all()
            if isinstance(batch, Exception):
                return
