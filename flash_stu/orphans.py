"""Ends a process that torchrun started when torchrun has died, which would otherwise train on unsupervised."""

import os
import select
import sys
import threading
import time
from contextlib import suppress

_PARENT = os.getppid()  # read before torch is imported: the parent may die during these seconds
_INTERVAL = 0.2  # seconds


def end_with_launcher() -> None:
    """End this process within a second, from a thread, when the torchrun that started it has died.

    Nothing is done for a process that torchrun did not start: it may outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(_PARENT,), name="orphans", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_INTERVAL)
    sys.excepthook = threading.excepthook = lambda *_: None  # of communication with processes that have ended already
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _say(f"error: torchrun (process {parent}) has died; the processes that it started end too")
    time.sleep(2 * _INTERVAL)  # until all have noticed
    os._exit(1)


def _say(line: str) -> None:
    """Write a line to stderr, unless that would block, as a full pipe that nobody reads does."""
    if sys.__stderr__ is None:
        return
    with suppress(OSError, ValueError):
        stderr = sys.__stderr__.fileno()
        if select.select([], [stderr], [], 0)[1]:
            os.write(stderr, f"{line}\n".encode())
