"""Processes, devices and sharding: the one place that knows there may be more than one GPU.

The model is written for one device. `parallelize` applies, from outside and in this order, activation
checkpointing, compilation of each block, mixed precision, and the strategy: fully_shard (FSDP2) per block
and then for the rest, or DistributedDataParallel, or nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from flash_stu.errors import UserError
from flash_stu.training.config import RunConfig

_DDP_LIMIT = 10**9  # parameters; with their gradients and AdamW's moments, 16 GB in float32


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process got here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, *values: torch.Tensor | float) -> list[float]:
        """Sum scalars over all processes, in float64; every process gets the same sums."""
        total = torch.stack([torch.as_tensor(value, device=self.device).double() for value in values])
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def from_main(self, value: Any) -> Any:
        """The main process's value, on every process."""
        shared = [value]
        if self.size > 1:
            dist.broadcast_object_list(shared, src=0, device=self.device)
        return shared[0]


def world_size() -> int:
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join_world(config: RunConfig) -> Iterator[World]:
    """Join the processes that torchrun started, or be alone; leave them at the end.

    Each process takes the GPU of its local rank, or the CPU where there is none.

    Raises:
        UserError: if there are several processes but no strategy for them, or fewer GPUs than processes.
    """
    size, rank, local_rank = (
        world_size(),
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("LOCAL_RANK", "0")),
    )
    if size > 1 and config.parallel.strategy == "none":
        raise UserError(f"parallel.strategy is 'none' for {size} processes; allowed: 'auto', 'ddp', 'fsdp'")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this node has no GPU; only {torch.cuda.device_count()} are visible"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    world = World(rank, size, device)
    if size == 1 and config.parallel.strategy in ("auto", "none"):
        yield world
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.HashStore() if size == 1 else None,
        rank=rank if size == 1 else -1,
        world_size=size if size == 1 else -1,
        timeout=timedelta(minutes=config.parallel.timeout_minutes),
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()


def resolve_strategy(strategy: str, processes: int, parameters: int) -> str:
    """What "auto" means: nothing for one process, else DDP up to a billion parameters and FSDP beyond."""
    if strategy != "auto":
        return strategy
    if processes == 1:
        return "none"
    return "ddp" if parameters <= _DDP_LIMIT else "fsdp"


def parallelize(model: nn.Module, config: RunConfig, world: World) -> nn.Module:
    """Prepare a model, equal on every process, for training on this world.

    Args:
        model: a FlashSTUForCausalLM in float32 on the CPU; changed in place.
        config: the run's; train.dtype, compile, activation_checkpointing and parallel.strategy are read.
        world: the processes.

    Returns:
        the module to call. Parameters stay float32. With dtype bfloat16 the products run in bfloat16: by
        autocast, or by FSDP's mixed precision with float32 reduction, where the residual stream is bfloat16
        too.
    """
    strategy = resolve_strategy(config.parallel.strategy, world.size, model.num_parameters())
    bfloat16 = config.train.dtype == "bfloat16"
    model.to(world.device)
    for block in model.model.layers:
        if config.train.activation_checkpointing == "full":
            block.forward = _recomputed(block.forward)
        if config.train.compile:  # the function, not the module: FSDP's hooks stay outside
            block.forward = torch.compile(block.forward)
    if bfloat16 and strategy != "fsdp":
        model.forward = torch.autocast(world.device.type, torch.bfloat16)(model.forward)
    if strategy == "ddp":
        devices = [world.device] if world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    if strategy == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
        # The filters are an input of every block and must stay float32, so inputs are not cast to bfloat16;
        # the activations are bfloat16 already, since the embedding's weights are.
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bfloat16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=precision)
        fully_shard(model, mesh=mesh, mp_policy=precision)
    return model


def _recomputed(forward: Callable) -> Callable:
    """The same function, which keeps only its inputs and runs again for its gradient."""

    def run(*inputs):  # a function of its own: torch.compile skips a functools.partial of checkpoint
        return checkpoint(forward, *inputs, use_reentrant=False)

    return run


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Say whether the next backward reduces gradients: only that of a step's last micro batch needs to."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = enabled


def clip_gradients(model: nn.Module, max_norm: float | None) -> float:
    """Scale all gradients to a joint norm of at most max_norm, if given; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf") if max_norm is None else max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
