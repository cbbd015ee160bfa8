"""Functions run in processes of their own, started by a server that has imported torch already."""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait

import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.fsdp", "flash_stu.training"])


class ProcessError(RuntimeError):
    """A function failed in its process; the message ends with its traceback there."""


class Child:
    """A function running in a process of its own.

    Args:
        function: of a module's top level.
        arguments: for it; whatever can be pickled.
        environment: variables to set before.
    """

    def __init__(self, function: Callable, *arguments, environment: dict[str, str] | None = None) -> None:
        self.connection, there = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_run, args=(there, function, arguments, environment or {}), daemon=True)
        self.process.start()
        there.close()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.join()

    def result(self, timeout: float = 300.0):
        """Returns the function's result.

        Raises:
            ProcessError: if it raised, or the process died.
            TimeoutError: if it takes longer (in seconds).
        """
        if not self.connection.poll(timeout):
            raise TimeoutError(f"a process is not finished after {timeout} seconds")
        try:
            value, error = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            self.process.join()
            raise ProcessError(f"a process ended with exit code {self.process.exitcode}") from None
        self.process.join()
        if error:
            raise ProcessError(error)
        return value


def run_processes(world_size: int, function: Callable, *arguments, timeout: float = 300.0, grace: float = 1.0) -> list:
    """Run a function in every process of a world, with the environment that torchrun would set.

    Args:
        world_size: how many.
        function: of a module's top level; it joins the process group itself.
        arguments: for it, the same in every process; whatever can be pickled.
        timeout: in seconds, for all of it.
        grace: in seconds, for the others to say how it went for them when one has failed.

    Returns:
        what each returned, by rank.

    Raises:
        ProcessError: if it raised, or the process died, somewhere; the others are killed.
        TimeoutError: if it takes longer.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # like torchrun's: no race for a port
    common = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    children = [
        Child(function, *arguments, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]
    running = {child.connection: rank for rank, child in enumerate(children)}
    results, errors = [None] * world_size, []
    deadline = time.monotonic() + timeout
    try:
        while running:
            ready = wait(running, max(0.0, deadline - time.monotonic()))
            if not ready and not errors:
                raise TimeoutError(f"processes {sorted(running.values())} are not finished after {timeout} seconds")
            if not ready:
                break
            for connection in ready:
                rank = running.pop(connection)
                try:
                    results[rank] = children[rank].result()
                except ProcessError as error:
                    errors.append(f"process {rank}: {error}")
                    deadline = min(deadline, time.monotonic() + grace)
    finally:
        for child in children:
            child.kill()
    if errors:
        raise ProcessError("\n".join(errors))
    return results


def _run(connection, function: Callable, arguments: tuple, environment: dict[str, str]) -> None:
    import torch

    os.environ.update({"CUDA_VISIBLE_DEVICES": ""} | environment)  # there may be fewer GPUs than processes
    torch.set_num_threads(1)
    try:
        answer = function(*arguments), None
    except BaseException:
        answer = None, traceback.format_exc()
    connection.send_bytes(
        pickle.dumps(answer)
    )  # plainly: torch would share tensors' memory with a process about to end
    connection.close()
