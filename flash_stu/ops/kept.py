"""The operators whose results selective activation checkpointing keeps.

They take long to compute for the memory that their results take: matrix products, attention and convolution. An
operator of this package that belongs to them is defined with `kept_op`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flex_attention",
    "flash_attn::_flash_attn_forward",
}


def kept_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Returns a decorator that defines a functional custom operator, "namespace::name", whose result is kept."""
    KEPT.add(name)
    return torch.library.custom_op(name, mutates_args=())


def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """The policy function of torch.utils.checkpoint.create_selective_checkpoint_contexts."""
    return CheckpointPolicy.MUST_SAVE if op.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
