"""Activation checkpointing and compilation of a model's blocks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.ops import kept
from flash_stu.training.run_config import TrainConfig


def transform_blocks(model: FlashSTUForCausalLM, config: TrainConfig) -> None:
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
