"""PyTorch's Muon for fused layers too, and with a Newton-Schulz iteration that runs in float32 on a CPU.

PyTorch takes a weight as one matrix, and runs the iteration in bfloat16, which a CPU without bfloat16 units emulates at
many times the cost of a training step.
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch.distributed.tensor import DTensor


class Muon(torch.optim.Muon):
    """torch.optim.Muon with Nesterov momentum and updates scaled to the size of AdamW's.

    Args:
        matrices: weights, all on one device; of each the rows of the matrices that lie in it one below the other.
        lr: learning rate.
        weight_decay: factor on lr times the weights.
        momentum: of the gradients' running mean.

    Source: Jordan et al. 2024; the scaling is that of Liu et al. 2025 (arXiv 2502.16982), eq. 4.
    """

    def __init__(
        self, matrices: Mapping[torch.Tensor, tuple[int, ...]], lr: float, weight_decay: float, momentum: float
    ) -> None:
        super().__init__(list(matrices), lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
        self._rows = dict(matrices)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step; see torch.optim.Optimizer."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])
                update = update.float() if p.device.type == "cpu" else update.bfloat16()
                options = group["ns_coefficients"], group["ns_steps"], group["eps"]
                turned = [
                    orthogonalize(part, *options).to(p.dtype) * (0.2 * max(part.shape) ** 0.5)
                    for part in _split(update, self._rows[p])
                ]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.cat(turned), alpha=-group["lr"])
        return loss


def _split(matrix: torch.Tensor, rows: tuple[int, ...]) -> list[torch.Tensor]:
    """Returns the parts of a matrix, each sharded as the whole is."""
    if len(rows) == 1:
        return [matrix]
    parts = matrix.split(rows)
    if isinstance(matrix, DTensor):
        return [cast(DTensor, part).redistribute(matrix.device_mesh, matrix.placements) for part in parts]
    return list(parts)


def orthogonalize(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Returns a matrix with the singular vectors of `matrix`, and singular values near 1.

    Args:
        matrix: (rows, columns).
        coefficients: a, b, c of a step: a singular value s becomes a s + b s^3 + c s^5.
        steps: how many.
        eps: least norm that `matrix` is divided by beforehand.
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
