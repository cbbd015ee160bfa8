"""The optimizers, AdamW or Muon beside AdamW, and their learning rate, a pure function of the step."""

import math

import torch
from torch import nn

from flash_stu.model.layers.linear import FusedLinear
from flash_stu.model.pretrained import Block
from flash_stu.training.muon import Muon
from flash_stu.training.run_config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, steps: int) -> float:
    """Returns the learning rate of one optimizer step.

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


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Returns the optimizers of a model's parameters; each parameter is in exactly one of them.

    Parameters of two or more dimensions decay, norms and biases do not. With "muon", Muon takes the weight matrices of
    the blocks' linear layers, of fused ones the parts, and AdamW the rest: embedding and head, whose rows are used one
    at a time, the STU's coefficients and taps, which are no maps between features, and vectors. Muon's updates are
    scaled to the size of AdamW's, so that one learning rate and one weight decay serve both.

    Call it after the parallel strategy was applied, since sharding replaces the parameters.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101); Muon: Jordan et al. 2024, with the scaling of Liu et al. 2025
    (arXiv 2502.16982), eq. 4.
    """
    matrices = _block_matrices(model) if config.name == "muon" else {}
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=config.momentum)
        )
    if others:
        optimizers.append(
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=config.learning_rate,
                betas=(config.betas[0], config.betas[1]),
                eps=config.eps,
                amsgrad=config.amsgrad,
                fused=others[0].is_cuda if config.fused == "auto" else config.fused,
            )
        )
    return optimizers


def _block_matrices(model: nn.Module) -> dict[torch.Tensor, tuple[int, ...]]:
    """Returns the trained weights of the linear layers within the model's blocks, and the rows of their parts."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    linears = [module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)]
    return {
        linear.weight: tuple(linear.parts.values()) if isinstance(linear, FusedLinear) else (linear.out_features,)
        for linear in linears
        if linear.weight.requires_grad
    }


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    """Use one learning rate for all parameters from the next step on."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value
