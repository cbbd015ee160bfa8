"""The processes that were started together: their ranks, how they meet, and what they exchange."""

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from flash_stu.errors import UserError

T = TypeVar("T")

_PARENT = os.getppid()  # may die while the rest is imported
_WATCH_SECONDS = 0.2  # between two looks at it
_ORPHANED = threading.Lock()
_PAUSE = 1.0  # seconds
CONNECT_SECONDS = 30  # for the store at MASTER_ADDR to answer
MEET_SECONDS = 300  # for all processes to come: on many nodes their imports end minutes apart
_MAX_PROCESSES = 2**20


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def world_size() -> int:
    """Returns how many processes were started together; 1 without a launcher.

    Raises:
        UserError: if the environment's WORLD_SIZE is no such number.
    """
    return _number("WORLD_SIZE", 1, _MAX_PROCESSES, default=1)


def read_launch() -> Launch:
    """Returns this process's place, from WORLD_SIZE, RANK and LOCAL_RANK of the environment.

    Raises:
        UserError: if one of them is not what a launcher sets, or RANK is missing where there are several processes.
    """
    size = world_size()
    rank = _number("RANK", 0, size - 1, default=0 if size == 1 else None)
    return Launch(rank, size, _number("LOCAL_RANK", 0, size - 1, default=0))


@dataclass(frozen=True)
class World:
    """The processes that work together, seen from one of them.

    Attributes:
        rank, size: of this process, and how many they are.
        device: of this process.
        context: how many neighbours share each sequence.
        group: these, where they are several.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    context: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def data_rank(self) -> int:
        """The place of this process's sequences among those of a batch."""
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        """How many processes, or groups of those that share a sequence, a batch is divided among."""
        return self.size // self.context

    @property
    def sequence_group(self) -> dist.ProcessGroup:
        """The processes that share this one's sequences."""
        if self.group is None:
            raise ValueError("context is 1: no process shares a sequence with this one")
        return self.group

    @property
    def is_main(self) -> bool:
        """True for the process that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            dist.barrier()

    def sum(self, *values: torch.Tensor | float) -> list[float]:
        """Sum scalars over all processes, in float64; every process gets the same sums."""
        total = torch.stack([torch.as_tensor(value, device=self.device).double() for value in values])
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def from_main(self, value: Any) -> Any:
        """Returns the main process's value on every process."""
        shared = [value]
        if self.size > 1:
            dist.broadcast_object_list(shared, src=0, device=self.device)
        return shared[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Run something on the main process alone; returns its result on every process.

        Raises:
            Exception: on the main process, as the work raised it.
            SystemExit: on the others, with status 2, if the work raised an error: the main process reports it.
        """
        result = None
        if self.is_main:
            try:
                result = work()
            except Exception:
                self.from_main((None, True))
                raise
        result, failed = self.from_main((result, False))
        if failed:
            time.sleep(_PAUSE)  # torchrun ends all as soon as one ends: let the main process finish its message
            raise SystemExit(2)
        return result

    def gather(self, value: Any) -> list[Any]:
        """Returns what every process passes here, by rank, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
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


def local_device(kind: str) -> torch.device:
    """Returns this process's device: the GPU of its local rank for "cuda", or the CPU.

    Raises:
        UserError: if there are fewer GPUs than processes.
    """
    if kind != "cuda":
        return torch.device("cpu")
    launch, visible = read_launch(), torch.cuda.device_count()
    if launch.local_rank >= visible:
        raise UserError(f"process {launch.local_rank} of this machine has no GPU; only {visible} are visible")
    return torch.device("cuda", launch.local_rank)


@contextmanager
def join(device: torch.device, backend: str, timeout: timedelta, group_of_one: bool = False) -> Iterator[World]:
    """Join the processes that were started together, or be alone; leave them at the end.

    A process that torchrun started ends when torchrun has died.

    Args:
        device: this process's.
        backend: "gloo" or "nccl".
        timeout: of every collective operation.
        group_of_one: make a process group for a single process too.

    Raises:
        UserError: if MASTER_ADDR and MASTER_PORT are missing or lead nowhere, or the others do not come in time.
    """
    end_with_launcher()
    launch = read_launch()
    world = World(launch.rank, launch.size, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.size == 1 and not group_of_one:
        yield world
        return
    store = HashStore() if launch.size == 1 else _meet(launch)
    dist.init_process_group(
        backend,
        store=store,
        rank=launch.rank,
        world_size=launch.size,
        timeout=timeout,
        device_id=device if backend == "nccl" else None,
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()


def end_with_launcher() -> None:
    """End this process within a second, from a thread, when the torchrun that started it has died.

    It would train on unsupervised. A process that torchrun did not start may outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch_launcher, name="orphans", daemon=True).start()


def _watch_launcher() -> None:
    while True:
        end_if_orphaned()
        time.sleep(_WATCH_SECONDS)


def end_if_orphaned() -> None:
    """End this process if the torchrun that started it has died; of several threads the first says so."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.getppid() == _PARENT:
        return
    _ORPHANED.acquire()  # never released: another thread waits here for the end
    sys.excepthook = threading.excepthook = lambda *_: None  # of communication with processes that have ended already
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _say(f"error: torchrun (process {_PARENT}) has died; the processes that it started end too")
    time.sleep(2 * _WATCH_SECONDS)  # until all have noticed
    os._exit(1)


def _say(line: str) -> None:
    """Write a line to stderr, unless that would block, as a full pipe that nobody reads does."""
    if sys.__stderr__ is None:
        return
    with suppress(OSError, ValueError):
        stderr = sys.__stderr__.fileno()
        if select.select([], [stderr], [], 0)[1]:
            os.write(stderr, f"{line}\n".encode())


def launcher_store(prefix: str) -> Store:
    """Returns a new connection to the launcher's key-value store, so that no other use of it can block this one.

    All keys begin with the prefix; a restart of the processes gets keys of its own.
    """
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    return PrefixStore(f"{prefix}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _meet(launch: Launch) -> Store:
    """Returns the store that all processes share, once all are connected to it."""
    host, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT", 1, 65535)
    if not host:
        raise UserError(f"MASTER_ADDR is not set in the environment; {launch.size} processes need it to meet")
    _resolve(host)
    hosting = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun hosts it
    waiting = timedelta(seconds=MEET_SECONDS)
    try:
        with _silence():
            if hosting:
                store = TCPStore("localhost", port, launch.size, True, waiting, multi_tenant=True)
            else:
                connecting = timedelta(seconds=CONNECT_SECONDS)
                TCPStore(host, port, is_master=False, timeout=connecting, wait_for_workers=False)
                store, _, _ = next(rendezvous("env://", launch.rank, launch.size, timeout=waiting))
    except dist.DistError as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"the {launch.size} processes did not meet at MASTER_ADDR {host}, MASTER_PORT {port}: {reason}"
        ) from None
    return PrefixStore("default_pg", store)


@contextmanager
def _silence() -> Iterator[None]:
    """Discard what torch's C++ writes to stderr at every attempt to connect; its last error is raised anyway."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _resolve(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise UserError(f"MASTER_ADDR is {host!r}: {reason}") from None


def _number(name: str, low: int, high: int, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None:
        if default is None:
            raise UserError(f"{name} is not set in the environment; a launcher such as torchrun sets it")
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise UserError(f"{name} is {text[:80]!r} in the environment; allowed: {low} to {high}")
    return int(text)
