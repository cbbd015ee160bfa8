"""Ends a job in which a process makes no progress, and names that process.

The training loop reports progress to the watchdog of its process (`mark`). A thread of the watchdog posts the newest
mark, with a heartbeat, to the other processes. When a process has made no progress for the time-out, because it hangs
or because it waits for one that does, its watchdog reads what all have posted, prints which process is behind, and ends
its own; the launcher ends the rest. The collectives' own time-outs are longer: their errors name whoever waited.

Where the loss of a process breaks the others' connections, as with gloo, their errors say only that: the watchdog then
names whose heartbeat has stopped, without waiting for the time-out.
"""

import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from sys import _current_frames  # documented, in spite of its name
from typing import NamedTuple

import torch.distributed as dist

from flash_stu.distributed import World, end_if_orphaned, launcher_store

EXIT_STATUS = 3
_LONGEST_INTERVAL = 5.0  # seconds between heartbeats; torchrun gives the survivors of a process 30 to say something


class Post(NamedTuple):
    """The last post of a process."""

    beat: int
    marks: int
    mark: str
    host: str
    frame: str


class Watchdog:
    """Ends the job after `timeout` seconds without a mark, or when a process is lost.

    A context manager. Alone, a process is not watched.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self.world, self.timeout = world, timeout
        self.interval = min(timeout / 8, _LONGEST_INTERVAL)
        self._marks, self._mark, self._marked_at = 0, "", 0.0
        self._beat = 0
        self._watched = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def mark(self, what: str) -> None:
        """Report what this process is about to do; to be called by all processes alike."""
        self._marks, self._mark, self._marked_at = self._marks + 1, what, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.world.size > 1:
            self.mark("starting")
            self._store = launcher_store("flash_stu/watchdog")
            self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.world.size > 1 and _is_broken_connection(error) and self._report("a connection to a process broke"):
            os._exit(EXIT_STATUS)

    def _run(self) -> None:
        while not self._closed.wait(self.interval):
            with suppress(dist.DistError):  # without its store, a later report says so
                self._post()
            if time.monotonic() - self._marked_at > self.timeout:
                self._report(f"training has stood still for {self.timeout:g} s", stalled=True)
                return os._exit(EXIT_STATUS)

    def _post(self) -> None:
        self._beat += 1
        frame = traceback.extract_stack(_current_frames()[self._watched])[-1]
        fields = (self._beat, self._marks, self._mark, socket.gethostname(), f"{frame.name} ({frame.filename})")
        self._store.set(str(self.world.rank), "\n".join(map(str, fields)))

    def _read(self) -> dict[int, Post]:
        posts: dict[int, Post] = {}
        for rank in range(self.world.size):
            if self._store.check([str(rank)]):
                beat, marks, *rest = self._store.get(str(rank)).decode().split("\n")
                posts[rank] = Post(int(beat), int(marks), *rest)
        return posts

    def _report(self, what: str, stalled: bool = False) -> bool:
        """Compare what the processes post; the first that still does prints the result.

        Returns:
            whether there is one: where nothing has `stalled`, a process that does not respond.
        """
        try:
            before = self._read()
            for _ in range(3):
                time.sleep(self.interval)
                self._post()
            posts = self._read()
        except dist.DistError:
            self._say(what, f"The store at {os.environ['MASTER_ADDR']}, of torchrun or process 0, does not respond")
            return True
        beats = {rank: post.beat for rank, post in before.items()}
        silent = [r for r in range(self.world.size) if r not in posts or posts[r].beat == beats.get(r)]
        if not (silent or stalled):
            return False
        if self.world.rank == min(set(posts) - set(silent), default=self.world.rank):
            self._say(what, describe_stall(posts, silent, self.world.size))
        else:
            time.sleep(self.interval)  # whoever ends first takes the others along: let it print first
        return True

    def _say(self, what: str, who: str) -> None:
        """Print the reason for the end, unless it is the launcher's, which says so itself."""
        end_if_orphaned()
        print(f"error: {what}; this ends it. {who}", file=sys.stderr, flush=True)


def _is_broken_connection(error: BaseException | None) -> bool:
    """Gloo raises plain RuntimeErrors, with the place in its source."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def describe_stall(posts: dict[int, Post], silent: list[int], size: int) -> str:
    """Returns which processes hold up the others.

    It is told what each process posted last, if it ever did, and which heartbeats have stopped.
    """
    if silent:
        return "; ".join(f"process {r} of {size}{_where(posts.get(r))} does not respond" for r in silent)
    furthest = max(post.marks for post in posts.values())
    behind = {rank: post for rank, post in posts.items() if post.marks < furthest}
    if behind:
        return "; ".join(f"process {r} of {size}{_where(p)} is in {p.frame}" for r, p in behind.items())
    frames: dict[str, list[str]] = {}
    for rank, post in posts.items():
        frames.setdefault(post.frame, []).append(str(rank))
    places = "; ".join(f"{', '.join(ranks)} in {frame}" for frame, ranks in frames.items())
    return f"All processes got to {next(iter(posts.values())).mark}; they are: {places}"


def _where(post: Post | None) -> str:
    return f" (host {post.host}, {post.mark})" if post else ""
