"""The norm of the residual stream."""

import torch
from torch import nn

from flash_stu.ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm with outputs of the inputs' dtype, whatever that of the weight, and faster on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the normalised x (..., size)."""
        weight = self.weight
        return rms_norm(x, weight if weight.dtype == x.dtype else weight.to(x.dtype), self.eps)  # pyright: ignore[reportArgumentType] - never None
