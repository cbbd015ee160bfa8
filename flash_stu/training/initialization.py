"""Initial weights: the same for every number of processes, and no process ever holds the whole model.

The model is built on the meta device and sharded there. Then one module at a time gets real tensors on the CPU, drawn
from a generator that is seeded by the run's seed and the module's name, and this process's part of them moves to its
device. So neither the order of the modules nor the number of processes or the kind of device has a say in the weights.
"""

import hashlib
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flash_stu.errors import UserError
from flash_stu.model.loading import resolve_model_dir
from flash_stu.model.weights import StoredTensor, check_finite, find_tensors


@torch.no_grad()
def initialize(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give a model on the meta device its initial weights.

    Args:
        model: a FlashSTUForCausalLM built on the meta device, its parameters sharded by FSDP2 or not; changed in place.
        device: this process's.
        seed: of the run.
    """

    def fill(module: nn.Module, name: str) -> None:
        torch.manual_seed(_module_seed(seed, name))
        model._init_weights(module)

    _materialize(model, device, fill)


def check_initial_weights(directory: str | Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a model directory or of a finished training run by name; loads nothing.

    Raises:
        UserError: if there is no model, or a file of its weights is missing or damaged.
    """
    try:
        return find_tensors(resolve_model_dir(directory))
    except UserError as error:
        raise UserError(f"train.initial_weights: {error}") from None


@torch.no_grad()
def read_initial_weights(model: nn.Module, device: torch.device, directory: str | Path) -> None:
    """Give a model on the meta device the weights of a transformers directory, one module at a time.

    Args:
        model, device: see `initialize`.
        directory: a model directory or a finished training run, in safetensors.

    Raises:
        UserError: if a weight is missing there, has another shape or is not finite.
    """
    stored = check_initial_weights(directory)

    def fill(module: nn.Module, name: str) -> None:
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            weight = f"{name}.{key}"
            if tensor is None:
                continue
            if weight not in stored and any(re.search(key, weight) for key in model._keys_to_ignore_on_load_missing):
                tensor.zero_()  # as they are in a distilled model that is made trainable
                continue
            if weight not in stored:
                raise UserError(f"train.initial_weights {directory} has no weight {weight}")
            with safe_open(stored[weight].file, framework="pt") as file:
                value = file.get_tensor(weight)
            if value.shape != tensor.shape:
                raise UserError(
                    f"train.initial_weights {directory}: {weight} has shape {tuple(value.shape)}, "
                    f"the model's {tuple(tensor.shape)}"
                )
            check_finite({weight: value}, f"train.initial_weights {directory}")
            tensor.copy_(value)

    _materialize(model, device, fill)


def _materialize(model: nn.Module, device: torch.device, fill) -> None:
    """Replace every meta tensor by this process's part of a real one that `fill(module, name)` has written."""
    placed = {}  # by the meta tensor, so that tied weights stay one tensor
    for name, module in model.named_modules():
        own = [
            (registry, key, tensor)
            for registry in (module._parameters, module._buffers)
            for key, tensor in registry.items()
            if tensor is not None
        ]
        if any(id(tensor) not in placed for _, _, tensor in own):
            for registry, key, tensor in own:
                registry[key] = _like(tensor, torch.empty(tensor.shape, dtype=tensor.dtype))
            fill(module, name)
            for registry, key, tensor in own:
                if id(tensor) not in placed:
                    placed[id(tensor)] = tensor, _like(tensor, _local_part(registry[key].data, tensor, device))
        for registry, key, tensor in own:
            registry[key] = placed[id(tensor)][1]


def _like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A parameter if the tensor was one, else a plain tensor."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _local_part(full: torch.Tensor, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    full = full.to(device)
    if isinstance(tensor, DTensor):  # every process has the same values: nothing needs to be sent
        return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return full


def _module_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
