"""Causal convolution through FlashFFTConv's fused CUDA kernels (Fu et al. 2023, arXiv 2311.05908).

Import of the package is left to the call: `flash_stu.ops.backends` tells whether it is there.
"""

from functools import cache

import torch
from torch import nn
from torch.nn.functional import pad


def flash_fft_conv(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """As `direct_conv`, for bf16 and fp16 on a GPU.

    Its FFT sizes are powers of two from 256 on; twice the padded length keeps the convolution from wrapping around.
    """
    batch, length, phases, _ = x.shape
    padded = max(128, 1 << (length - 1).bit_length())
    signal = pad(x.movedim(1, -1).flatten(0, 1), (0, padded - length)).contiguous()
    taps = pad(filters.float().t(), (0, padded - filters.shape[0])).contiguous()
    y = _plan(2 * padded, x.dtype, x.device)(signal, taps)[..., :length]
    return y.unflatten(0, (batch, phases)).movedim(-1, 1)


@cache
def _plan(size: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from flashfftconv import FlashFFTConv  # pyright: ignore[reportMissingImports] - optional

    return FlashFFTConv(size, dtype=dtype).to(device)
