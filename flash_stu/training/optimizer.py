"""AdamW and its learning rate, a pure function of the step."""

import math

import torch
from torch import nn

from flash_stu.training.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, steps: int) -> float:
    """The learning rate of one optimizer step.

    It rises in proportion to the step up to the peak at step warmup_steps, then falls to the minimum at the
    last step, along a line or half a cosine; "constant" stays at the peak.

    Args:
        step: 1 for the first step of the run.
        config: peak, minimum, warm-up and shape.
        steps: length of the run.
    """
    peak, floor, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if config.schedule == "constant":
        return peak
    progress = (step - warmup) / (steps - warmup)
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return floor + (peak - floor) * remaining


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over a model's parameters; those of two or more dimensions decay, norms and biases do not.

    Call it after the parallel strategy was applied, since sharding replaces the parameters.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=tuple(config.betas),
        eps=config.eps,
        amsgrad=config.amsgrad,
        fused=parameters[0].is_cuda if config.fused == "auto" else config.fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use one learning rate for all parameters from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = value
