"""A process that torchrun started ends when torchrun is gone, instead of training on with nobody in charge of it."""

import os
import select
import sys
import threading
import time
from contextlib import suppress

_PARENT = os.getppid()  # read before torch is imported: the parent may die during these seconds
_INTERVAL = 1.0  # seconds


def end_with_launcher() -> None:
    """End this process within seconds, from a thread, when the torchrun that started it has died.

    Nothing is done for a process that torchrun did not start: it may outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(_PARENT,), name="orphans", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_INTERVAL)
    message = f"error: torchrun (process {parent}) has died; process {os.getpid()}, which it started, ends too\n"
    with suppress(OSError, ValueError):
        descriptor = sys.__stderr__.fileno()
        if select.select([], [descriptor], [], 0)[1]:  # not a pipe that is full and nobody reads
            os.write(descriptor, message.encode())
    os._exit(1)
