"""The size of a run and the time of a step, worked out from its config: nothing is read or written."""

import os

import torch
from tabulate import tabulate

from flash_stu.devices import default_device
from flash_stu.distributed import World
from flash_stu.errors import UserError
from flash_stu.filters.exponentials import tail_states
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.ops.conv.choice import CHUNK
from flash_stu.ops.cross_entropy.chunked import CHUNK_BYTES
from flash_stu.ops.parts import part_size
from flash_stu.training.initialization import build_model
from flash_stu.training.parallel import check_context, resolve_resharding, resolve_strategy
from flash_stu.training.run_config import RunConfig
from flash_stu.training.step_time import estimates, measured, table_of


def describe(config: RunConfig, processes: int) -> str:
    """Returns the resolved config and the size of the run, as --dry-run prints them.

    Raises:
        UserError: if the global batch does not divide over this many processes, or parallel.context does not divide
            them.
    """
    train, context = config.train, config.parallel.context
    check_context(config.parallel, processes)
    groups = processes // context
    sequences = config.sequences_per_step(processes)
    model = build_model(config.architecture())
    parameters = model.num_parameters()
    strategy = resolve_strategy(config.parallel, processes, parameters)
    if train.steps is None:
        length = f"{train.epochs:g} epochs; steps and tokens follow from the size of the data"
    else:
        length = f"{train.steps:,} steps, {train.steps * train.global_batch_size:,} tokens"
    memory = estimate_memory(model, config, strategy, processes)
    rows = {
        "parameters": f"{parameters:,} ({parameters / 1e6:.1f} M)",
        "training": length,
        "step": f"{train.global_batch_size:,} tokens = {sequences} sequences of {train.sequence_length:,} = "
        f"{groups} {'processes' if context == 1 else f'groups of {context} processes'} x {train.micro_batch_size} "
        f"sequences x {sequences // (groups * train.micro_batch_size)} accumulated",
        "strategy": strategy,
        "memory estimate": f"{sum(memory.values()) / 2**30:.1f} GiB per GPU ("
        + ", ".join(f"{name} {size / 2**30:.1f}" for name, size in memory.items())
        + ")",
    }
    sizes = tabulate(rows.items(), tablefmt="plain", disable_numparse=True)
    columns = estimates(config, processes, measured(default_device(), getattr(torch, train.dtype)))
    header, *parts = table_of(columns, config, processes)
    align = ["left", *["right"] * (len(header) - 1)]
    times = tabulate(parts, header, "plain", disable_numparse=True, colalign=align)
    return f"{config.to_yaml()}\n{sizes}\n\n{times}"


def check_size(config: RunConfig, world: World) -> None:
    """Compare weights, gradients and one moment in float32 with all the memory there is.

    Raises:
        UserError: if they need more.
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


def estimate_memory(model: FlashSTUForCausalLM, config: RunConfig, strategy: str, processes: int) -> dict[str, int]:
    """Estimates the bytes per GPU, by part, to choose a micro batch by.

    Parameters, gradients and the two moments of AdamW (Muon has one) are float32 and divided among the processes of
    a replica by FSDP, where gathered weights and unreduced gradients come on top: of two blocks and the embedding, or
    of the whole model where weights stay gathered or gradients are accumulated. For each token a block keeps about 7.5
    vectors of hidden_size and 4 of intermediate_size in compute precision; an attention block besides queries, keys,
    values and outputs, as its GPU kernels do, an STU block with output taps its outputs before rounding. Tokens are
    those of a part, where sequences are in parts; each piece but the last leaves `handed_on` to the next, kept until it
    is run again. With checkpointing it keeps its input, if selective also the results
    of its products, and one block at a time the rest.
    """
    train, shape = config.train, config.model
    parameters = model.num_parameters()
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in model.model.layers]
    size = 2 if train.dtype == "bfloat16" else 4
    states, gathered = parameters * 4 * (5 if config.optimizer.amsgrad else 4), 0
    if strategy == "fsdp":
        states //= processes // config.parallel.replicas
        in_turn = 2 * max(in_blocks) + parameters - sum(in_blocks)
        groups = processes // config.parallel.context
        accumulates = config.sequences_per_step(processes) > groups * train.micro_batch_size
        gathered = (in_turn if resolve_resharding(config, parameters) else parameters) * size
        gathered += (parameters if accumulates else in_turn) * 4  # gradients that are not reduced yet
    elif size == 2:
        gathered = parameters * 2  # autocast's copies
    parts = config.parallel.context * train.sequence_chunks
    tokens = train.micro_batch_size * (part_size(train.sequence_length, parts) if parts > 1 else train.sequence_length)
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    attends = [kind == "sliding_attention" for kind in shape["layer_types"]]
    solved = 4 * hidden * bool(model.config.stu_output_taps)
    blocks = [
        tokens * (size * (7.5 * hidden + 4 * inner) + (size * 4 * hidden if attention else solved))
        for attention in attends
    ]
    backend = "triton" if size == 2 else "chunked"  # on a GPU both take the former
    handed = sum(sum(handed_on(model.config, kind, size, backend)) for kind in model.config.block_types)
    between = (train.sequence_chunks - 1) * train.micro_batch_size * handed
    kept = {
        "none": 0,
        "selective": sum(
            tokens * (size * (2 * inner + hidden * (7 if attention else 4)) + solved * (not attention))
            for attention in attends
        ),
        "full": len(blocks) * tokens * size * hidden,
    }[train.activation_checkpointing]
    return {
        "states": states,
        "gathered and cast weights": gathered,
        "activations": int(max(blocks) + kept if train.activation_checkpointing != "none" else sum(blocks)),
        **({"states between pieces": between} if between else {}),
        "logits": min(size * tokens * shape["vocab_size"], CHUNK_BYTES["cuda"]),
    }


def handed_on(config: FlashSTUConfig, kind: str, size: int, backend: str) -> tuple[int, int]:
    """Returns the bytes of the halo and of the states that a layer hands from one part of a sequence to the next.

    Taps, which add a few tokens, are not counted.

    Args:
        config: of the model.
        kind: of the layer, one of config.block_types.
        size: bytes of a number in compute precision.
        backend: of the convolution, which sets the size of a chunk: "chunked" or "triton".
    """
    if kind == "sliding_attention":
        heads = config.num_key_value_heads or config.num_attention_heads
        return (config.sliding_window - 1) * 2 * heads * config.hidden_size // config.num_attention_heads * size, 0
    width, lags = config.stu_dilation * config.hidden_size, config.max_position_embeddings // config.stu_dilation
    if config.lds_state_dim:
        return 0, 8 * config.hidden_size * config.lds_state_dim
    if lags <= 2 * CHUNK[backend]:
        return (lags - 1) * width * size, 0
    signs = 2 if config.stu_branches == "separate" else 1
    return CHUNK[backend] * width * size, 4 * signs * tail_states(lags, CHUNK[backend] + 1) * width
