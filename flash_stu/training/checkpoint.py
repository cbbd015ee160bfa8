"""Checkpoints: everything a run needs to go on as if it had never stopped, without pickle.

checkpoints/step-N/ holds model.safetensors and optimizer.safetensors (whole tensors, whatever the sharding,
so that any number of processes can load them) and progress.json with the sizes and checksums of both. The
folder is written under a temporary name and renamed when everything is on disk: a folder of that name is
complete.
"""

import json
import os
import re
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from flash_stu.errors import UserError
from flash_stu.training.parallel import World

_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
_READ_BYTES = 1 << 24


def gather_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights and buffers as whole CPU tensors, tied ones once; empty except on the main process."""
    state = get_model_state_dict(model, options=_GATHER)
    unique = {name.removeprefix("module.") for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name: tensor.contiguous() for name, tensor in state.items() if name in unique}


def save(folder: Path, step: int, model: nn.Module, optimizer, progress: dict, keep: int, world: World) -> None:
    """Write the checkpoint of a step and delete the oldest ones; to be called by every process.

    Args:
        folder: the run's checkpoints/.
        step: optimizer steps done.
        model: as parallelize returned it.
        optimizer: its optimizer.
        progress: what else to keep, for JSON.
        keep: how many checkpoints to leave, this one included.
        world: the processes.

    Raises:
        UserError: if the files cannot be written; the checkpoints before are intact then.
    """
    weights = gather_model(model)
    moments = get_optimizer_state_dict(model, optimizer, options=_GATHER).get("state", {})
    if world.is_main:
        tensors = {
            "model.safetensors": weights,
            "optimizer.safetensors": {
                f"{name}/{key}": value for name, entry in moments.items() for key, value in entry.items()
            },
        }
        try:
            _write(folder, step, tensors, progress)
        except (OSError, SafetensorError) as error:
            raise UserError(f"the checkpoint of step {step} cannot be written to {folder}: {error}") from error
        for old in list_steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step-{old}")
    world.barrier()


def resume(folder: Path, model: nn.Module, optimizer, world: World, report=print) -> dict | None:
    """Load the newest intact checkpoint; to be called by every process.

    A damaged checkpoint is reported by name, set aside as step-N.damaged, and the one before it is tried.

    Returns:
        the progress saved with it, and "step"; None if there is no checkpoint.

    Raises:
        UserError: if there are checkpoints but none is intact.
    """
    steps = list_steps(folder) if world.is_main else []
    tensors, progress = {}, None
    for step in reversed(steps):
        try:
            tensors, progress = _read(folder / f"step-{step}")
            break
        except (OSError, ValueError) as error:
            report(f"damaged checkpoint {folder / f'step-{step}'}: {error}; trying the one before it")
    if steps and not progress:
        raise UserError(f"{folder}: none of its {len(steps)} checkpoints is intact; remove them to start again")
    for damaged in (folder / f"step-{step}" for step in steps if step > progress["step"]):
        aside = damaged.with_name(f"{damaged.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(damaged, aside)
    progress = world.from_main(progress)
    if progress:
        _load(model, optimizer, tensors, world)
    return progress


def list_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def _write(folder: Path, step: int, tensors: dict[str, dict], progress: dict) -> None:
    final, temporary = folder / f"step-{step}", folder / f".step-{step}.tmp"
    for stale in [final, *folder.glob(".step-*.tmp")]:
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {}
    for name, values in tensors.items():
        save_file(values, temporary / name)
        files[name] = {"bytes": (temporary / name).stat().st_size, "crc32": _crc32(temporary / name)}
    (temporary / "progress.json").write_text(json.dumps({**progress, "step": step, "files": files}, indent=2))
    for path in [*temporary.iterdir(), temporary]:
        _flush_to_disk(path)
    os.rename(temporary, final)
    _flush_to_disk(folder)


def _read(path: Path) -> tuple[dict[str, dict], dict]:
    """Tensors by file and the progress of one checkpoint.

    Raises:
        OSError, ValueError: if anything is missing or not as it was written.
    """
    progress = json.loads((path / "progress.json").read_text())
    if not isinstance(progress, dict) or "files" not in progress:
        raise ValueError("progress.json names no files")
    files = progress.pop("files")
    for name, expected in files.items():
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size} bytes instead of {expected['bytes']}")
        if _crc32(path / name) != expected["crc32"]:
            raise ValueError(f"{name} was altered: its checksum differs")
    return {name: load_file(path / name) for name in files}, progress


def _load(model: nn.Module, optimizer, tensors: dict[str, dict], world: World) -> None:
    """Give every process its part of the tensors that the main process read."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world.size > 1, strict=False)
    weights, moments = tensors.get("model.safetensors", {}), {}
    for name, value in tensors.get("optimizer.safetensors", {}).items():
        parameter, _, key = name.rpartition("/")
        moments.setdefault(parameter, {})[key] = value
    set_model_state_dict(model, weights, options=options)
    # the hyperparameters are the config's, not the checkpoint's
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    state = {"state": moments, "param_groups": groups} if world.is_main else {}
    set_optimizer_state_dict(model, optimizer, state, options=options)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            value = zlib.crc32(block, value)
    return value


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
