"""The definition of a causal convolution, one lag at a time: the reference for the other back ends."""

import torch
from torch.nn.functional import pad


def direct_conv(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Convolve along axis 1: y[t] = sum_j filters[j] * x[t - j].

    Args:
        x: (batch, length, phases, channels): `phases` interleaved sequences.
        filters: (taps, channels) with at most as many taps as the length.

    Returns:
        outputs, in the shape and dtype of x; sums are in float32 (float64 for float64 inputs).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs, taps = x.to(wide), filters.to(wide)
    y = torch.zeros_like(inputs)
    for lag in range(taps.shape[0]):
        y = y + pad(inputs[:, : x.shape[1] - lag], (0, 0, 0, 0, lag, 0)) * taps[lag]
    return y.to(x.dtype)
