"""PyTorch's Muon, whose Newton-Schulz iteration runs in float32 on a CPU.

PyTorch runs it in bfloat16, which a CPU without bfloat16 units emulates at many times the cost of a training step.
"""

from collections.abc import Callable

import torch


class Muon(torch.optim.Muon):
    """torch.optim.Muon with Nesterov momentum and updates scaled to the size of AdamW's.

    Args:
        params: matrices, all on one device.
        lr: learning rate.
        weight_decay: factor on lr times the weights.
        momentum: of the gradients' running mean.

    Source: Jordan et al. 2024; the scaling is that of Liu et al. 2025 (arXiv 2502.16982), eq. 4.
    """

    def __init__(self, params: list[torch.Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(params, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
        self._on_cpu = params[0].device.type == "cpu"

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step; see torch.optim.Optimizer."""
        if not self._on_cpu:
            return super().step(closure)
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(
                    p.grad.lerp(mean, group["momentum"]), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)
        return loss


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
