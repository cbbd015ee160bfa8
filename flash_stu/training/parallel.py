"""Changes to a model for training, from outside: recomputation, compilation, precision, sharding, replicas.

The model is written for one device. `parallelize` applies in this order activation checkpointing and compilation of the
blocks, mixed precision, and the strategy: fully_shard (FSDP2) per block and then for the rest, or
DistributedDataParallel, or nothing. With several replicas the processes form a grid (HSDP): each row of it shards one
whole model, and the rows average their gradients.

With parallel.context the processes come in groups of neighbours that share their sequences. To a strategy they are
processes like others: parameters are sharded over them too, and gradients averaged.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flash_stu.distributed import World, join, local_device, world_size
from flash_stu.errors import UserError
from flash_stu.model.layers import InputOutputTaps
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.ops import kept
from flash_stu.training.initialization import initialize, read_initial_weights
from flash_stu.training.run_config import ParallelConfig, RunConfig, TrainConfig

_KEPT_BYTES = 8 << 30  # of gathered parameters: a tenth of an H100's memory
_DDP_LIMIT = 10**9  # parameters; with their gradients and AdamW's moments, 16 GB in float32


@contextmanager
def join_world(config: RunConfig) -> Iterator[World]:
    """Join the processes of a run, or be alone; leave them at the end.

    Each process takes the GPU of its local rank, or the CPU where there is none, and ends when torchrun has died.

    Raises:
        UserError: if there are several processes but no strategy for them, fewer GPUs than processes, or a group of
            parallel.context processes would not be whole.
    """
    check_context(config.parallel, world_size())
    strategy = config.parallel.strategy
    if world_size() > 1 and strategy == "none":
        raise UserError(f"parallel.strategy is 'none' for {world_size()} processes; allowed: 'auto', 'ddp', 'fsdp'")
    device = local_device("cuda" if torch.cuda.is_available() else "cpu")
    # longer than the watchdog's, whose message names the process that hangs
    timeout = timedelta(minutes=2 * config.parallel.timeout_minutes + 1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with join(device, backend, timeout, group_of_one=strategy in ("ddp", "fsdp")) as world:
        if config.parallel.context > 1:
            group, _ = dist.new_subgroups(config.parallel.context, timeout=timeout)
            world = replace(world, context=config.parallel.context, group=group)
        yield world


def check_context(parallel: ParallelConfig, processes: int) -> None:
    """Raise a UserError unless replicas are whole, and so are groups of parallel.context processes within one."""
    if processes % parallel.replicas:
        raise UserError(f"parallel.replicas is {parallel.replicas}; it must divide the {processes} processes")
    if processes // parallel.replicas % parallel.context:
        what = f"{processes} processes" + (f" / {parallel.replicas} replicas" if parallel.replicas > 1 else "")
        raise UserError(f"parallel.context is {parallel.context}; it must divide the {what}")


def resolve_strategy(parallel: ParallelConfig, processes: int, parameters: int) -> str:
    """Returns parallel.strategy; for "auto" that of the number of processes, replicas and parameters."""
    if parallel.strategy != "auto":
        return parallel.strategy
    if parallel.replicas > 1:
        return "fsdp"
    if processes == 1:
        return "none"
    return "ddp" if parameters <= _DDP_LIMIT else "fsdp"


def resolve_resharding(config: RunConfig, parameters: int) -> bool:
    """Returns whether FSDP frees the gathered parameters between forward and backward: reshard_after_forward."""
    setting = config.parallel.reshard_after_forward
    size = 2 if config.train.dtype == "bfloat16" else 4
    return parameters * size > _KEPT_BYTES if setting == "auto" else setting


def parallelize(model: FlashSTUForCausalLM, config: RunConfig, world: World) -> nn.Module:
    """Prepare a model for training on this world and give it its initial weights.

    Args:
        model: in float32 on the meta device, from `build_model`; changed in place.
        config: the run's; seed, train.initial_weights, dtype, compile, activation_checkpointing and the
            parallel section are read.
        world: the processes.

    Returns:
        the module to call. Parameters stay float32. With dtype bfloat16 the products run in bfloat16, and the residual
        stream is: by autocast from the embedding on, or by FSDP's mixed precision with float32 reduction.

    Raises:
        UserError: for replicas that do not divide the processes, initial weights that do not fit, or FSDP with taps of
            outputs and selective checkpointing.
    """
    strategy = resolve_strategy(config.parallel, world.size, model.num_parameters())
    bfloat16 = config.train.dtype == "bfloat16"
    _transform_blocks(model, config.train)
    if strategy == "fsdp":
        _shard(model, config, world)
    if config.train.initial_weights is None:
        initialize(model, world.device, config.seed)
    else:
        read_initial_weights(model, world.device, config.train.initial_weights)
    if bfloat16 and strategy != "fsdp":
        model.model.embed_tokens.register_forward_hook(lambda _module, _inputs, x: x.bfloat16())
        model.forward = torch.autocast(world.device.type, torch.bfloat16)(model.forward)
    if strategy == "ddp":
        devices = [world.device] if world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    return model


def _transform_blocks(model: FlashSTUForCausalLM, config: TrainConfig) -> None:
    """Apply train.activation_checkpointing and then train.compile to every block, in place."""
    for block in model.model.layers:
        if config.activation_checkpointing != "none":
            block.forward = _recomputed(block.forward, config.activation_checkpointing)
        if config.compile:  # the function, not the module: FSDP's hooks stay outside
            block.forward = torch.compile(block.forward)


def _recomputed(forward: Callable[..., torch.Tensor], mode: str) -> Callable[..., torch.Tensor]:
    """Returns a function that keeps only its inputs, and if selective its products, and recomputes the rest."""
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept.policy)

    # a function of its own: torch.compile skips a partial of checkpoint
    def run(*inputs: Any, **named: Any) -> torch.Tensor:
        return checkpoint(forward, *inputs, use_reentrant=False, **options, **named)

    return run


def _shard(model: FlashSTUForCausalLM, config: RunConfig, world: World) -> None:
    replicas = config.parallel.replicas
    if world.size % replicas:
        raise UserError(f"parallel.replicas is {replicas}; it must divide the {world.size} processes")
    if model.config.stu_output_taps and config.train.activation_checkpointing == "selective":
        # these taps are gathered within what is recomputed, where torch counts the operators
        raise UserError(
            "train.activation_checkpointing is 'selective', which FSDP does not do for model.stu_output_taps; "
            "allowed: 'none', 'full', or another parallel.strategy"
        )
    shape, names = (replicas, world.size // replicas), ("replicate", "shard")
    first = 0 if replicas > 1 else 1
    mesh = init_device_mesh(world.device.type, shape[first:], mesh_dim_names=names[first:])
    # The filters are an input of every block and must stay float32, so inputs are not cast to bfloat16;
    # the activations are bfloat16 already, since the embedding's weights are.
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.train.dtype == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": resolve_resharding(config, model.num_parameters()),
    }
    # Coefficients of a recurrence stay float32 too, see flash_stu.model.layers.taps.
    unrounded = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        for module in block.modules():
            if isinstance(module, InputOutputTaps) and module.M_y is not None:
                fully_shard(module, mp_policy=unrounded, **options)
        fully_shard(block, mp_policy=precision, **options)
    fully_shard(model, mp_policy=precision, **options)


def set_gradient_sync(model: nn.Module, enabled: bool, config: RunConfig) -> None:
    """Set whether the next backward reduces gradients: only that of a step's last micro batch needs to.

    Parameters that FSDP keeps gathered between forward and backward stay so between the micro batches too.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        model.set_reshard_after_backward(enabled or resolve_resharding(config, parameters))
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
