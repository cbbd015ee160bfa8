"""Positions in attention: rotary embedding of queries and keys, and ALiBi's slopes."""

import math

import torch


def rotary_angles(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position and frequency.

    Args:
        positions: token positions, (batch, length), integers; any size, nothing is tabulated.
        head_dim: size of a head, even.
        theta: base of the geometric frequencies theta^(-2i / head_dim).

    Returns:
        cosines and sines (batch, 1, length, head_dim), float32, as `rotate` takes them: each twice, the first sine
        with a minus.

    Source: Su et al. 2021, RoFormer (arXiv 2104.09864), section 3.2.
    """
    # float64 frequencies: at position 10^6 a float32 angle is off by 0.06 rad
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[:, None, :, None].double() * theta**-exponent
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of queries or keys (batch, heads, length, head_dim)."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return torch.addcmul(wide * cos, torch.cat([second, first], dim=-1), sin).to(x.dtype)


def alibi_slopes(heads: int, scale: float = 1.0, device: torch.device | str | None = None) -> torch.Tensor:
    """Compute ALiBi's slopes for any number of heads: geometric, the extra ones from the next power of two.

    Args:
        heads: number of attention heads.
        scale: factor on all slopes; below 1 the bias reaches further (arXiv 2310.13017 uses 0.25).
        device: where they are computed.

    Returns:
        (heads,), float32.

    Source: Press et al. 2022 (arXiv 2108.12409), section 3.
    """
    power = 1 << int(math.log2(heads))
    regular = torch.arange(1, power + 1, device=device) * (8 / power)
    extra = (2 * torch.arange(heads - power, device=device) + 1) * (4 / power)
    return torch.exp2(-torch.cat([regular, extra])) * scale
