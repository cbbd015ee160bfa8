"""A process that stands still ends the whole job, by name, instead of letting all others wait for it.

The training loop tells the watchdog of its process whenever it gets somewhere (`mark`). A thread of the watchdog posts
the newest mark, with a heartbeat, for the other processes to see. When a process has got nowhere for the time-out,
because it hangs or because it waits for one that does, its watchdog reads what all have posted, says who is behind,
and ends its process; the launcher ends the rest. This comes before the collectives' own time-outs, whose errors name
whoever waited.
"""

import os
import socket
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist

from flash_stu.training.parallel import World

EXIT_STATUS = 3
_LONGEST_INTERVAL = 10.0  # seconds between heartbeats


class Post(NamedTuple):
    """What a process has last said of itself."""

    beat: int
    marks: int
    mark: str
    host: str
    frame: str


class Watchdog:
    """Watches one process of several; a context manager. Alone, a process is not watched.

    Args:
        world: the processes.
        timeout: seconds without a mark after which the job ends.
        on_stall: what to do after the report; ends the process by default.
    """

    def __init__(self, world: World, timeout: float, on_stall=lambda: os._exit(EXIT_STATUS)) -> None:
        self.world, self.timeout, self.on_stall = world, timeout, on_stall
        self.interval = min(timeout / 8, _LONGEST_INTERVAL)
        self._marks, self._mark, self._marked_at = 0, "starting", time.monotonic()
        self._beat = 0
        self._watched = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def mark(self, what: str) -> None:
        """Say what this process is about to do; to be called by all processes alike."""
        self._marks, self._mark, self._marked_at = self._marks + 1, what, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.world.size > 1:
            self._store = _open_store()
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self.interval):
            self._post()
            if time.monotonic() - self._marked_at > self.timeout:
                self._report()
                self.on_stall()
                return

    def _post(self) -> None:
        self._beat += 1
        frame = traceback.extract_stack(sys._current_frames()[self._watched])[-1]
        fields = (self._beat, self._marks, self._mark, socket.gethostname(), f"{frame.name} ({frame.filename})")
        self._store.set(str(self.world.rank), "\n".join(map(str, fields)))

    def _read(self) -> dict[int, Post]:
        posts = {}
        for rank in range(self.world.size):
            if self._store.check([str(rank)]):
                beat, marks, *rest = self._store.get(str(rank)).decode().split("\n")
                posts[rank] = Post(int(beat), int(marks), *rest)
        return posts

    def _report(self) -> None:
        """Compare what the processes post; the first of those that still do says it."""
        before = self._read()
        for _ in range(3):
            time.sleep(self.interval)
            self._post()
        posts = self._read()
        beats = {rank: post.beat for rank, post in before.items()}
        silent = [r for r in range(self.world.size) if r not in posts or posts[r].beat == beats.get(r)]
        if self.world.rank == min(set(posts) - set(silent), default=self.world.rank):
            print(describe_stall(posts, silent, self.timeout, self.world.size), file=sys.stderr, flush=True)
        else:
            time.sleep(self.interval)  # whoever ends first takes the others along: let it finish its sentence


def describe_stall(posts: dict[int, Post], silent: list[int], timeout: float, size: int) -> str:
    """Name the processes that hold up the others.

    Args:
        posts: what each process posted last; a process that never did is missing.
        silent: processes whose heartbeat has stopped.
        timeout: seconds.
        size: number of processes.
    """
    head = f"error: training has stood still for {timeout:g} s; this ends it. "
    if silent:
        who = "; ".join(f"process {r} of {size}{_where(posts.get(r))} does not respond" for r in silent)
        return head + who
    furthest = max(post.marks for post in posts.values())
    behind = {rank: post for rank, post in posts.items() if post.marks < furthest}
    if behind:
        return head + "; ".join(f"process {r} of {size}{_where(p)} is in {p.frame}" for r, p in behind.items())
    frames = {}
    for rank, post in posts.items():
        frames.setdefault(post.frame, []).append(str(rank))
    places = "; ".join(f"{', '.join(ranks)} in {frame}" for frame, ranks in frames.items())
    return f"{head}All processes got to {next(iter(posts.values())).mark}; they are: {places}"


def _where(post: Post | None) -> str:
    return f" (host {post.host}, {post.mark})" if post else ""


def _open_store() -> dist.Store:
    """A connection of the watchdog's own to the launcher's key-value store, so that no other use of it can block it."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    return dist.PrefixStore(f"flash_stu/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
