"""Saving and resuming: weights, moments and run state, in safetensors and JSON, without pickle.

Every process copies the tensors it holds to CPU memory and continues to train while a thread writes the copies, with
torch.distributed.checkpoint, into a safetensors file of its own; nothing is gathered. Each file says which part of
which tensor it holds, so any number of processes can load them, whatever their parallel strategy. See checkpoint_folder
for the files.

The thread is not dcp.async_save's, which ends when the tensors are written: manifest, renaming and pruning follow, with
an exchange between the processes each. get_optimizer_state_dict is not used because it takes a step to fill an
optimizer that has no state yet.
"""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future as TorchFuture
from torch.nn.parallel import DistributedDataParallel

from flash_stu import files, reading
from flash_stu.distributed import World
from flash_stu.errors import UserError, reason
from flash_stu.reading import DamagedError
from flash_stu.training import checkpoint_folder
from flash_stu.training.checkpoint_folder import RunState

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is no mistake

_FILE_BYTES = 1 << 27  # safetensors lays out a whole file in memory, and meanwhile no other thread can run Python

T = TypeVar("T")


class Checkpointer:
    """Saves and restores a model and its optimizers; every process makes the same calls in the same order.

    As a context manager it waits at the end for the last write.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        world: World,
        keep: int,
        keep_every: int | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        """Prepare; nothing is written yet.

        Args:
            folder: the run's checkpoints/, on a file system that all processes share.
            model: as parallelize returned it.
            optimizers: over disjoint parts of the model's parameters.
            world: the processes.
            keep: how many of the newest checkpoints stay.
            keep_every: checkpoints whose step is divisible by it stay too.
            report: gets a line about every damaged checkpoint, on the main process; called from any thread.
        """
        self.folder, self.optimizers, self.world = folder, optimizers, world
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.keep, self.keep_every, self.report = keep, keep_every, report
        # training communicates at the same time as the thread, so they cannot share a group
        group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._group = group if isinstance(group, dist.ProcessGroup) else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", _use, (world.device,))
        self._writing: Future | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, _: type | None, error: BaseException | None, *__: object) -> None:
        try:
            self.wait()
        except UserError as failure:
            if error is None:
                raise
            self._report(str(failure))
        finally:
            self._thread.shutdown()

    def save(self, state: RunState) -> None:
        """Begin to write the checkpoint of a step, replacing one that is there; returns when everything is copied.

        Raises:
            UserError: if the checkpoint before could not be written; those before that one are intact.
        """
        self.wait()
        tensors = checkpoint_folder.own_tensors(self.model) | self._moments()
        copies = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for index, (name, tensor) in enumerate(tensors.items())
            if isinstance(tensor, DTensor) or index % self.world.size == self.world.rank  # whole ones all could write
        }
        layout = _assign_files(tensors, _FILE_BYTES * self.world.size)
        self._writing = self._thread.submit(self._write, state, copies, layout)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: if it could not be written, on any process.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def resume(self) -> RunState | None:
        """Load the newest intact checkpoint into model and optimizers; their hyperparameters stay as they are.

        A damaged checkpoint is reported by name, set aside as step-N.damaged, and the one before it is tried.

        Returns:
            the run state saved with it; None if there is no checkpoint.

        Raises:
            UserError: if there are checkpoints but none is intact, or they are another model's.
            OSError: if the folder cannot be read or changed.
        """
        self._on_main(lambda: files.sweep_directory(self.folder))
        steps = self._on_main(lambda: checkpoint_folder.list_steps(self.folder))
        if not steps:
            return None
        damaged = []
        for path in (self.folder / f"step-{step}" for step in reversed(steps)):
            try:
                state = self._verify(path)
                break
            except (OSError, DamagedError) as error:
                self._report(f"damaged checkpoint {path}: {error}; trying the one before it")
                damaged.append(path)
        else:
            raise UserError(
                f"{self.folder}: none of its {len(steps)} checkpoints is intact; remove them to start again"
            )
        self._on_main(lambda: [files.set_aside(path) for path in damaged])
        with _naming(f"the checkpoint {path} cannot be loaded"):
            self._read(path)
        return state

    def _moments(self) -> dict[str, torch.Tensor]:
        """Returns the optimizers' tensors by their names on disk; none before the first step."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            f"optimizer.{names[parameter]}.{key}": tensor
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, tensor in state.items()
        }

    def _write(self, state: RunState, copies: dict[str, torch.Tensor], layout: dict[str, int]) -> None:
        """Write a checkpoint; runs in the thread."""
        with _naming(f"{self.folder / f'step-{state.step}'} cannot be written"), ExitStack() as stack:
            begin = checkpoint_folder.begin
            path = self._on_main(lambda: begin(self.folder, state.step, stack, self._report))
            writer = _Writer(str(path), layout, save_distributed=True)
            save(copies, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            parts = self._everywhere(lambda: {name: reading.describe(path / name) for name in writer.written})
            written = {name: entry for part in parts for name, entry in part.items()}
            self._on_main(lambda: self._complete(stack, path, state, written))

    def _complete(self, stack: ExitStack, path: Path, state: RunState, written: dict[str, dict[str, int]]) -> None:
        checkpoint_folder.complete(path, state, written)
        stack.close()
        checkpoint_folder.prune(self.folder, self.keep, self.keep_every)

    def _verify(self, path: Path) -> RunState:
        """Returns the run state of a checkpoint after comparing its files with the manifest, each process a part."""
        state, names = self._on_main(lambda: (checkpoint_folder.read_state(path), checkpoint_folder.tensor_files(path)))
        self._everywhere(lambda: files.verify(path, names[self.world.rank :: self.world.size]))
        return state

    def _read(self, path: Path) -> None:
        weights, parameters = checkpoint_folder.own_tensors(self.model), dict(self.model.named_parameters())
        states: dict[str, dict[str, torch.Tensor]] = {}  # of each parameter
        moments: dict[str, torch.Tensor] = {}  # of all, by their names on disk
        readers: list[HuggingFaceStorageReader] = []

        def prepare() -> None:
            reader, saved = checkpoint_folder.open_reader(path)
            readers.append(reader)
            checkpoint_folder.check_weights(path, saved, weights)
            for name, entry in saved.items():
                if name.startswith("optimizer."):
                    owner, key = name.removeprefix("optimizer.").rsplit(".", 1)
                    if owner not in parameters or entry.size not in (parameters[owner].shape, torch.Size()):
                        raise UserError(f"the checkpoint {path} is another model's: they differ in {name}")
                    moments[name] = states.setdefault(owner, {})[key] = _room(entry, parameters[owner])

        self._everywhere(prepare)
        load(weights | moments, storage_reader=readers[0], process_group=self._group, no_dist=self._group is None)
        names = {parameter: name for name, parameter in parameters.items()}
        for optimizer in self.optimizers:
            owners = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            state = {index: states[owner] for index, owner in enumerate(owners) if owner in states}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def _on_main(self, work: Callable[[], T]) -> T:
        """Run something on the main process alone; returns its result on every process, or raises as `_everywhere`."""
        results = self._everywhere(lambda: [work()] if self.world.is_main else [])
        return results[0][0]

    def _everywhere(self, work: Callable[[], T]) -> list[T]:
        """Run something on every process; returns the results by rank.

        Raises:
            UserError, OSError: on every process, if it failed on one.
        """
        if self._group is None:
            return [work()]
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        outcomes: list[Any] = [None] * self.world.size
        told = failure and (isinstance(failure, UserError), str(failure))
        dist.all_gather_object(outcomes, (result, told), group=self._group)
        for rank, (_, told) in enumerate(outcomes):
            if told is not None:
                by_user, reason = told
                raise UserError(reason) if by_user else OSError(f"process {rank}: {reason}") from failure
        return [result for result, _ in outcomes]

    def _report(self, line: str) -> None:
        if self.world.is_main:
            self.report(line)


class _Writer(HuggingFaceStorageWriter):
    """Remembers which files this process wrote."""

    written: frozenset[str] = frozenset()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        results = super().write_data(plan, planner)
        self.written = frozenset(result.storage_data.relative_path for result in results.value())
        return results


def _assign_files(tensors: dict[str, torch.Tensor], size: int) -> dict[str, int]:
    """Returns the number of each tensor's file, from 1 on, so that a file is about `size` bytes."""
    before = accumulate((tensor.nbytes for tensor in tensors.values()), initial=0)
    return {name: 1 + start // size for name, start in zip(tensors, before, strict=False)}


def _use(device: torch.device) -> None:
    """Select a thread's GPU: a thread begins with the first one, and would allocate memory there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _room(entry: TensorStorageMetadata, parameter: nn.Parameter) -> torch.Tensor:
    """Returns an empty tensor for one of an optimizer's, sharded like the parameter if it has the same shape."""
    if entry.size == parameter.shape:
        return torch.empty_like(parameter, dtype=entry.properties.dtype)
    return torch.empty(entry.size, dtype=entry.properties.dtype)


@contextmanager
def _naming(failure: str) -> Iterator[None]:
    """Turn any error into one line with its cause; of a failed checkpoint, that of its first process."""
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise UserError(f"{failure}: {reason(cause)}") from error
