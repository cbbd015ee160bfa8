"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

PyTorch has a kernel of it for GPUs. On a CPU it takes nine passes over the tensor forward and twenty backward; here,
where there are many rows, three and seven. For the one row of a decoding step the operations are what takes the time:
three instead of ten.

Source: Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_MANY = 2**14  # numbers, from which on passes over them take longer than launching operations


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns the normalised x (..., size) in its dtype; weight is (size,), of the same."""
    exact = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    if x.device.type == "cpu" and exact and not torch.compiler.is_compiling():
        if x.numel() >= _MANY:
            return _RMSNorm.apply(x, weight, eps)
        if x.numel() == x.shape[-1] and not torch.is_grad_enabled():
            norm = torch.linalg.vector_norm(x).item()
            return (x * weight).mul_((norm * norm / x.shape[-1] + eps) ** -0.5)
    return F.rms_norm(x, weight.shape, weight, eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        product = grad * unit
        mean = (product @ weight).unsqueeze(-1).div_(-x.shape[-1])
        return torch.addcmul(grad * weight, unit, mean).mul_(scale), product.flatten(0, -2).sum(0), None
