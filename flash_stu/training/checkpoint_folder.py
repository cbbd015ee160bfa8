"""Checkpoints on disk: one folder step-N each, complete as soon as it has that name.

step-N/ holds safetensors files, each written by one process, with every tensor's place in the whole in their
headers, and progress.json: what the run wants to know besides its tensors, the step, and the files' sizes and
checksums. What is being written or deleted, or was when a process got killed, is hidden: .step-N.tmp, .step-N.old.
"""

import json
import os
import re
import shutil
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from flash_stu.errors import UserError

_READ_BYTES = 1 << 24


def list_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def load_weights(step_dir: Path) -> dict[str, torch.Tensor]:
    """Whole weights and buffers of one checkpoint on the CPU, by the model's names; tied ones once.

    Raises:
        UserError: if the checkpoint is not there or not as it was written.
    """
    try:
        verify(step_dir, read_progress(step_dir)["files"])
    except (OSError, ValueError) as error:
        raise UserError(f"damaged checkpoint {step_dir}: {error}") from error
    reader = HuggingFaceStorageReader(str(step_dir))
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("model.")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def read_progress(path: Path) -> dict:
    """progress.json of one checkpoint.

    Raises:
        OSError, ValueError: if it is missing or not what was written.
    """
    progress = json.loads((path / "progress.json").read_text())
    if not isinstance(progress, dict) or not {"step", "files"} <= progress.keys():
        raise ValueError("progress.json is not complete")
    return progress


def describe(path: Path) -> dict[str, int]:
    """Size and checksum of a file, for progress.json."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            value = zlib.crc32(block, value)
    return {"bytes": path.stat().st_size, "crc32": value}


def verify(path: Path, files: dict[str, dict[str, int]]) -> None:
    """Compare files of one checkpoint with their descriptions.

    Raises:
        OSError, ValueError: if one is missing or differs.
    """
    for name, expected in files.items():
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size} bytes instead of {expected['bytes']}")
        if describe(path / name) != expected:
            raise ValueError(f"{name} was altered: its checksum differs")


def begin(folder: Path, step: int) -> Path:
    """Make the folder into which to write a checkpoint; clears away what killed processes left."""
    clear(folder)
    temporary = folder / f".step-{step}.tmp"
    temporary.mkdir(parents=True)
    return temporary


def complete(temporary: Path, progress: dict) -> None:
    """Write progress.json, and give the folder that `begin` made its final name when all of it is on disk.

    Args:
        temporary: the folder; its other files are on disk already.
        progress: what progress.json says, "step" and "files" included.

    Raises:
        OSError: if it cannot be written, or a file that another process wrote is not here.
    """
    for name, expected in progress["files"].items():
        if (temporary / name).stat().st_size != expected["bytes"]:
            raise OSError(f"{name} is not as it was written")
    with (temporary / "progress.json").open("w") as file:
        json.dump(progress, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(temporary)
    final = temporary.with_name(f"step-{progress['step']}")
    if final.exists():
        _hide(final)
    os.rename(temporary, final)
    _flush_folder(final.parent)


def prune(folder: Path, keep: int, keep_every: int | None) -> None:
    """Delete old checkpoints.

    Args:
        folder: where they are.
        keep: how many of the newest stay.
        keep_every: those whose step is divisible by it stay too.
    """
    for step in list_steps(folder)[:-keep]:
        if keep_every is None or step % keep_every:
            _hide(folder / f"step-{step}")
    clear(folder)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to step-N.damaged, where a person can look at it."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)


def clear(folder: Path) -> None:
    """Delete the hidden folders: what no longer counts, or was not completed before a process was killed."""
    for path in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")]:
        shutil.rmtree(path, ignore_errors=True)


def _hide(path: Path) -> None:
    """Rename a checkpoint that `clear` shall delete: a half deleted one must not look complete."""
    os.rename(path, path.with_name(f".{path.name}.old"))


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
