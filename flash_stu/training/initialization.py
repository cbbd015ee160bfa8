"""Initial weights: the same for every number of processes, and no process ever holds the whole model.

The model is built on the meta device and sharded there. Then one module at a time gets real tensors on the CPU, drawn
from a generator that is seeded by the run's seed and the module's name, and this process's part of them moves to its
device. So the weights depend neither on the order of the modules nor on the number of processes or the kind of device.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flash_stu.errors import UserError
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.layers.linear import separate_layers
from flash_stu.model.loading import resolve_model_dir
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.model.weights import StoredTensor, check_finite, find_tensors


def build_model(config: FlashSTUConfig) -> FlashSTUForCausalLM:
    """Returns a model on the meta device: shapes and names, without memory for its tensors."""
    with torch.device("meta"):
        return FlashSTUForCausalLM(config)


@torch.no_grad()
def initialize(model: FlashSTUForCausalLM, device: torch.device, seed: int) -> None:
    """Give a model on the meta device, sharded by FSDP2 or not, its initial weights, in place."""

    def fill(module: nn.Module, name: str) -> None:
        for layer_name, layer in separate_layers(module, name):
            torch.manual_seed(_module_seed(seed, layer_name))
            model.initialize_module(layer)

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
def read_initial_weights(model: FlashSTUForCausalLM, device: torch.device, directory: str | Path) -> None:
    """Give a model on the meta device the weights of a model directory or finished run, one module at a time.

    Raises:
        UserError: if a weight is missing there, has another shape or is not finite.
    """
    stored = check_initial_weights(directory)

    def fill(module: nn.Module, name: str) -> None:
        layers = [(name, module)] if f"{name}.weight" in stored else separate_layers(module, name)
        for weight, tensor in ((f"{layer}.{key}", t) for layer, part in layers for key, t in _own_tensors(part)):
            if weight not in stored and model.may_be_missing(weight):
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


def _materialize(model: nn.Module, device: torch.device, fill: Callable[[nn.Module, str], None]) -> None:
    """Replace every meta tensor by this process's part of a real one that `fill(module, name)` has written."""
    placed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by the meta tensor, so that tied weights stay one
    for name, module in model.named_modules():
        own = list(_own_tensors(module))
        if any(id(tensor) not in placed for _, tensor in own):
            for key, tensor in own:
                setattr(module, key, _like(tensor, torch.empty(tensor.shape, dtype=tensor.dtype)))
            fill(module, name)
            for key, tensor in own:
                if id(tensor) not in placed:
                    part = _local_part(getattr(module, key).data, tensor, device)
                    placed[id(tensor)] = tensor, _like(tensor, part)
        for key, tensor in own:
            setattr(module, key, placed[id(tensor)][1])


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a module's parameters and buffers by name, without those of the modules in it; tied ones too."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def _like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns the value as a parameter if the tensor is one."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _local_part(full: torch.Tensor, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    full = full.to(device)
    if isinstance(tensor, DTensor):  # every process has the same values: nothing needs to be sent
        return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return full


def _module_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
