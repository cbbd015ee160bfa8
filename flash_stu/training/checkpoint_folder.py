"""Checkpoints on disk: one directory step-N each, which gets that name when it is complete.

step-N/ holds safetensors files, each written by one process, with every tensor's place in the whole in their headers;
state.json, what else the run needs to continue; and the manifest of flash_stu.files, by which all of them are verified.
"""

import math
import os
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future as TorchFuture

from flash_stu import files, reading
from flash_stu.errors import UserError, writing
from flash_stu.model.layers.linear import join
from flash_stu.reading import DamagedError
from flash_stu.settings import first_problem

KIND = "checkpoint"
STATE = "state.json"


class RunState(BaseModel):
    """The state of a run besides its tensors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    step: int = Field(ge=0, description="optimizer steps done")
    seconds: float = Field(ge=0, allow_inf_nan=False, description="spent on them")
    run_id: str = Field(pattern="^[0-9a-z]+$", description="the name of the run in wandb")
    data: str = Field(description="hash of the tokens trained on")
    skipped: int = Field(ge=0, description="steps left out because loss or gradient was not finite")
    skipped_in_a_row: int = Field(ge=0, description="how many of them are the last ones")


def list_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, intact or not, oldest first.

    A step-N without any file of a checkpoint is left out.

    Raises:
        OSError: if the folder cannot be read.
    """
    steps = []
    for path in folder.iterdir() if folder.exists() else []:
        name = re.fullmatch(r"step-(0|[1-9][0-9]{,17})", path.name)
        if name and path.is_dir() and _has_parts(path):
            steps.append(int(name[1]))
    return sorted(steps)


def read_state(path: Path) -> RunState:
    """Returns the run state of a checkpoint; of its files, state.json alone is verified.

    Raises:
        OSError, DamagedError: if it is not what was written.
    """
    if STATE not in _manifest(path):
        raise DamagedError(f"{files.MANIFEST} does not name {STATE}")
    files.verify(path, [STATE])
    try:
        state = RunState.model_validate_json((path / STATE).read_bytes())
    except ValidationError as error:
        raise DamagedError(f"{STATE} is not a run state: {first_problem(error)}") from None
    if path.name != f"step-{state.step}":
        raise DamagedError(f"{STATE} is of step {state.step}")
    return state


def tensor_files(path: Path) -> list[str]:
    """Returns the names of a checkpoint's files of tensors, as the manifest has them; sorted.

    Raises:
        OSError, DamagedError: if the manifest is not what was written.
    """
    return sorted(name for name in _manifest(path) if name != STATE)


def open_reader(path: Path) -> tuple[HuggingFaceStorageReader, dict[str, TensorStorageMetadata]]:
    """Returns a reader of a checkpoint's tensors, and their descriptions by their names on disk.

    Raises:
        OSError, DamagedError: if a tensor is not there in full.
    """
    names = [str(path / name) for name in tensor_files(path)]
    reader = _Reader(str(path))
    reader.fs.ls = lambda _: names  # pyright: ignore[reportAttributeAccessIssue]  # other files may lie beside them
    saved: dict[str, TensorStorageMetadata] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise DamagedError(f"{name} is not a tensor")
        saved[name] = entry
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise DamagedError(f"a part of {name} is missing")
    return reader, saved


class _Reader(HuggingFaceStorageReader):
    """Reads layers that were not fused yet when the checkpoint was written as chunks of the tensors that they now are.

    Of a moment's numbers without rows, such as the count of steps, the first part's is everybody's.
    """

    def read_metadata(self) -> Metadata:
        metadata = super().read_metadata()
        tensors = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
        self._on_disk: dict[MetadataIndex, MetadataIndex] = {}
        fused: dict[str, dict[int, str]] = {}
        for name in tensors:
            if joined := join(name):
                fused.setdefault(joined[0], {})[joined[1]] = name
        for name, parts in fused.items():
            entries = [(part, tensors.pop(part)) for _, part in sorted(parts.items())]
            whole = TensorStorageMetadata(entries[0][1].properties, torch.Size(), [])
            for part, entry in entries[: None if entries[0][1].size else 1]:
                start = whole.size[0] if whole.size else 0
                for chunk in entry.chunks:
                    offsets = torch.Size([start + chunk.offsets[0], *chunk.offsets[1:]] if entry.size else [])
                    self._on_disk[MetadataIndex(name, offsets)] = MetadataIndex(part, chunk.offsets)
                    whole.chunks.append(ChunkStorageMetadata(offsets, chunk.sizes))
                whole.size = torch.Size([start + entry.size[0], *entry.size[1:]] if entry.size else [])
            tensors[name] = whole
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        places = [self._on_disk.get(item.storage_index, item.storage_index) for item in plan.items]
        items = [replace(item, storage_index=place) for item, place in zip(plan.items, places, strict=True)]
        return super().read_data(replace(plan, items=items), planner)


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns a model's parameters and buffers that a checkpoint holds, by their names on disk; tied ones once."""
    state = model.state_dict()  # first of all: FSDP brings the parameters back to their shards for it
    unique = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {f"model.{name}": tensor for name, tensor in state.items() if name in unique}


def check_weights(path: Path, saved: dict[str, TensorStorageMetadata], expected: dict[str, torch.Tensor]) -> None:
    """Compare names, shapes and dtypes of a checkpoint's weights with a model's, as `own_tensors` gives them.

    Raises:
        UserError: if they differ.
    """
    there = {name: (e.size, e.properties.dtype) for name, e in saved.items() if name.startswith("model.")}
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise UserError(f"the checkpoint {path} is another model's: they differ in {name}")


def begin(folder: Path, step: int, stack: ExitStack, report: Callable[[str], None]) -> Path:
    """Returns the directory into which to write a checkpoint; it gets its name when the stack is closed.

    Whatever has that name and is no intact checkpoint is reported and set aside.

    Raises:
        UserError: if it cannot be made.
    """
    path = folder / f"step-{step}"
    try:
        files.check_output(path, KIND, "checkpoint")
    except UserError:
        with writing(path):
            report(f"{path} is no intact checkpoint and in the way of one; renamed to {files.set_aside(path).name}")
    return stack.enter_context(files.replacing_directory(path, KIND, "checkpoint"))


def complete(path: Path, state: RunState, written: dict[str, dict[str, int]]) -> None:
    """Write the run state and the manifest into what `begin` returned.

    The files of tensors, which `written` describes (`reading.describe`) by their names, are on disk already.

    Raises:
        OSError: if that is not possible, or a file that another process wrote is not here.
    """
    (path / STATE).write_text(state.model_dump_json(indent=1) + "\n", encoding="utf-8")
    files.flush(path / STATE)
    files.seal(path, KIND, {**written, STATE: reading.describe(path / STATE)})


def prune(folder: Path, keep: int, keep_every: int | None) -> None:
    """Delete checkpoints but the newest `keep`, multiples of keep_every, and those with a file that is not ours."""
    for step in list_steps(folder)[:-keep]:
        if keep_every is None or step % keep_every:
            files.delete_directory(folder / f"step-{step}", KIND, contents=False)


def _manifest(path: Path) -> dict[str, dict[str, int]]:
    manifest = files.read_manifest(path)
    if manifest["kind"] != KIND:
        raise DamagedError(f"{files.MANIFEST} is of a {manifest['kind']}")
    return manifest["files"]


def _has_parts(path: Path) -> bool:
    """Returns whether a directory has some file of a checkpoint; True if it cannot be read."""
    with suppress(OSError):
        return any(name in (files.MANIFEST, STATE) or name.endswith(".safetensors") for name in os.listdir(path))
    return True
