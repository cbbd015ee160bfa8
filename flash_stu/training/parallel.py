"""Processes, devices and sharding: the one place that knows there may be more than one GPU.

The model is written for one device. `parallelize` applies, from outside and in this order, activation
checkpointing, compilation of each block, mixed precision, and the strategy: fully_shard (FSDP2) per block
and then for the rest, or DistributedDataParallel, or nothing. With several replicas the processes form a
grid (HSDP): each row of it shards one whole model, and the rows average their gradients.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flash_stu.distributed import process_group, read_launch, world_size
from flash_stu.errors import UserError
from flash_stu.ops import kept
from flash_stu.orphans import end_with_launcher
from flash_stu.training.config import ParallelConfig, RunConfig
from flash_stu.training.initialization import initialize, read_initial_weights

T = TypeVar("T")

_PAUSE = 1.0  # seconds
_KEPT_BYTES = 8 << 30  # of gathered parameters: a tenth of an H100's memory
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

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something on the main process alone; returns its result on every process.

        Raises:
            Exception: on the main process, whatever the work raised.
            SystemExit: on the others, if it raised anything: they end with status 2, and one message is enough.
        """
        result, failure = None, None
        if self.is_main:
            try:
                result = work()
            except Exception as error:
                failure = error
        result, failed = self.from_main((result, failure is not None))
        if failed and not self.is_main:
            time.sleep(_PAUSE)  # torchrun ends all as soon as one ends: let the main process finish its message
            raise SystemExit(2)
        if failed:
            raise failure
        return result


@contextmanager
def join_world(config: RunConfig) -> Iterator[World]:
    """Join the processes that torchrun started, or be alone; leave them at the end.

    Each process takes the GPU of its local rank, or the CPU where there is none, and ends when torchrun has died.

    Raises:
        UserError: if there are several processes but no strategy for them, or fewer GPUs than processes.
    """
    end_with_launcher()
    size = world_size()
    if size > 1 and config.parallel.strategy == "none":
        raise UserError(f"parallel.strategy is 'none' for {size} processes; allowed: 'auto', 'ddp', 'fsdp'")
    launch = read_launch()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if launch.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {launch.local_rank} of this node has no GPU; only {torch.cuda.device_count()} are visible"
            )
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    world = World(launch.rank, size, device)
    if size == 1 and config.parallel.strategy in ("auto", "none"):
        yield world
        return
    gpu = device if device.type == "cuda" else None
    # later than the watchdog's, which knows who is to blame
    timeout = timedelta(minutes=2 * config.parallel.timeout_minutes + 1)
    with process_group(launch, "gloo" if gpu is None else "nccl", timeout, gpu):
        yield world


def resolve_strategy(parallel: ParallelConfig, processes: int, parameters: int) -> str:
    """What "auto" means: nothing for one process; DDP up to a billion parameters, FSDP beyond, or for replicas."""
    if parallel.strategy != "auto":
        return parallel.strategy
    if parallel.replicas > 1:
        return "fsdp"
    if processes == 1:
        return "none"
    return "ddp" if parameters <= _DDP_LIMIT else "fsdp"


def resolve_resharding(config: RunConfig, parameters: int) -> bool:
    """Whether FSDP frees the gathered parameters between forward and backward: parallel.reshard_after_forward."""
    setting = config.parallel.reshard_after_forward
    size = 2 if config.train.dtype == "bfloat16" else 4
    return parameters * size > _KEPT_BYTES if setting == "auto" else setting


def check_size(config: RunConfig, world: World) -> None:
    """Refuse a model that cannot be held: weights, gradients and one moment in float32, against all memory there is.

    Raises:
        UserError: with the number of weights.
    """
    weights = config.architecture().count_weights()
    sharded = resolve_strategy(config.parallel, world.size, weights) == "fsdp"
    needed = 12 * weights // (world.size // config.parallel.replicas or 1 if sharded else 1)
    if world.device.type == "cuda":
        available = torch.cuda.get_device_properties(world.device).total_memory
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UserError(
            f"the model of section model has {weights:,} weights; training needs more than {needed / 2**30:,.0f} GiB "
            f"per process, {world.device} has {available / 2**30:,.0f}"
        )


def parallelize(model: nn.Module, config: RunConfig, world: World) -> nn.Module:
    """Prepare a model for training on this world and give it its initial weights.

    Args:
        model: a FlashSTUForCausalLM in float32 on the meta device; changed in place.
        config: the run's; seed, train.initial_weights, dtype, compile, activation_checkpointing and the
            parallel section are read.
        world: the processes.

    Returns:
        the module to call. Parameters stay float32. With dtype bfloat16 the products run in bfloat16: by
        autocast, or by FSDP's mixed precision with float32 reduction, where the residual stream is bfloat16
        too.

    Raises:
        UserError: for replicas that do not divide the processes, or initial weights that do not fit.
    """
    strategy = resolve_strategy(config.parallel, world.size, model.num_parameters())
    bfloat16 = config.train.dtype == "bfloat16"
    for block in model.model.layers:
        if config.train.activation_checkpointing != "none":
            block.forward = _recomputed(block.forward, config.train.activation_checkpointing)
        if config.train.compile:  # the function, not the module: FSDP's hooks stay outside
            block.forward = torch.compile(block.forward)
    if strategy == "fsdp":
        _shard(model, config, world)
    if config.train.initial_weights is None:
        initialize(model, world.device, config.seed)
    else:
        read_initial_weights(model, world.device, config.train.initial_weights)
    if bfloat16 and strategy != "fsdp":
        model.forward = torch.autocast(world.device.type, torch.bfloat16)(model.forward)
    if strategy == "ddp":
        devices = [world.device] if world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    return model


def _shard(model: nn.Module, config: RunConfig, world: World) -> None:
    replicas = config.parallel.replicas
    if world.size % replicas:
        raise UserError(f"parallel.replicas is {replicas}; it must divide the {world.size} processes")
    if replicas > 1:
        mesh = init_device_mesh(
            world.device.type, (replicas, world.size // replicas), mesh_dim_names=("replicate", "shard")
        )
    else:
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    # The filters are an input of every block and must stay float32, so inputs are not cast to bfloat16;
    # the activations are bfloat16 already, since the embedding's weights are.
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.train.dtype == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    options = {"mesh": mesh, "mp_policy": precision}
    options["reshard_after_forward"] = resolve_resharding(config, model.num_parameters())
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)


def _recomputed(forward: Callable, mode: str) -> Callable:
    """The same function, which keeps only its inputs, and if selective its products, and recomputes the rest."""
    options = {}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept.policy)

    def run(*inputs):  # a function of its own: torch.compile skips a functools.partial of checkpoint
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return run


def set_gradient_sync(model: nn.Module, enabled: bool, config: RunConfig) -> None:
    """Set whether the next backward reduces gradients: only that of a step's last micro batch needs to.

    Parameters that FSDP keeps gathered between forward and backward stay so between the micro batches too.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        model.set_reshard_after_backward(enabled or resolve_resharding(config, model.num_parameters()))
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = enabled


def free_gathered(model: nn.Module) -> None:
    """Free the parameters that FSDP keeps gathered after a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradients(model: nn.Module, max_norm: float | None) -> float:
    """Scale all gradients to a joint norm of at most max_norm, if given; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf") if max_norm is None else max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
