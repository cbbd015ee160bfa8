"""The gated MLP of a block."""

import torch
from torch import nn
from torch.nn import functional as F

from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.layers.linear import DepthScaledLinear, FusedLinear


class GatedMLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x)).

    Args:
        config: hidden_size, intermediate_size and bias are read.

    Source: Shazeer 2020, GLU variants (arXiv 2002.05202), GEGLU.
    """

    def __init__(self, config: FlashSTUConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = FusedLinear("gate_up_proj", size, (inner, inner), config.bias)
        self.down_proj = DepthScaledLinear(inner, size, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden_size) to the same, token by token."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)
