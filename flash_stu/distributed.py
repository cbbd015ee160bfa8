"""The processes of a launch: what torchrun or a scheduler says in the environment, checked, and how they meet."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from flash_stu.errors import UserError

CONNECT_SECONDS = 30  # for the store at MASTER_ADDR to answer
MEET_SECONDS = 300  # for all processes to come: on many nodes their imports end minutes apart
_MOST_PROCESSES = 2**20


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
    return _number("WORLD_SIZE", 1, _MOST_PROCESSES, default=1)


def read_launch() -> Launch:
    """Returns this process's place, from WORLD_SIZE, RANK and LOCAL_RANK of the environment.

    Raises:
        UserError: if one of them is not what a launcher sets, or RANK is missing where there are several processes.
    """
    size = world_size()
    rank = _number("RANK", 0, size - 1, default=0 if size == 1 else None)
    return Launch(rank, size, _number("LOCAL_RANK", 0, size - 1, default=0))


@contextmanager
def process_group(launch: Launch, backend: str, timeout: timedelta, device: torch.device | None = None) -> Iterator:
    """Join the process group of a launch, of one process too; leave it at the end.

    Args:
        launch: from `read_launch`.
        backend: "gloo" or "nccl".
        timeout: of every collective operation.
        device: the GPU that NCCL is to use.

    Raises:
        UserError: if MASTER_ADDR and MASTER_PORT are missing or lead nowhere, or the others do not come in time.
    """
    store = dist.HashStore() if launch.size == 1 else _meet(launch)
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout, device_id=device
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _meet(launch: Launch) -> dist.Store:
    """The store that all processes share, once all are connected to it."""
    host, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT", 1, 65535)
    if not host:
        raise UserError(f"MASTER_ADDR is not set in the environment; {launch.size} processes need it to meet")
    _resolve(host)
    hosting = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun hosts it
    waiting = timedelta(seconds=MEET_SECONDS)
    try:
        with _silence():
            if hosting:
                store = dist.TCPStore("localhost", port, launch.size, True, waiting, multi_tenant=True)
            else:
                connecting = timedelta(seconds=CONNECT_SECONDS)
                dist.TCPStore(host, port, is_master=False, timeout=connecting, wait_for_workers=False)
                store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.size, timeout=waiting))
    except dist.DistError as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"the {launch.size} processes did not meet at MASTER_ADDR {host}, MASTER_PORT {port}: {reason}"
        ) from None
    return dist.PrefixStore("default_pg", store)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what torch's C++ writes to stderr at every attempt to connect off it; its last error is raised anyway."""
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
    if text is None and default is None:
        raise UserError(f"{name} is not set in the environment; a launcher such as torchrun sets it")
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise UserError(f"{name} is {text[:80]!r} in the environment; allowed: {low} to {high}")
    return int(text)
