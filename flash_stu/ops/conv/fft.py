"""Causal convolution through real FFTs, padded so that nothing wraps around.

One differentiable operator, so that torch.compile sees a single node and no complex arithmetic.
"""

from typing import Any

import torch

from flash_stu.ops.kept import kept_op

_BLOCK = 64  # channels transformed at once on a CPU


def fft_conv(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """As `direct_conv`: x (batch, length, phases, channels), filters (taps, channels)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.ops.flash_stu.fft_conv(x.to(wide), filters.to(wide)).to(x.dtype)


def fft_size(length: int, taps: int) -> int:
    """The smallest product of 2, 3 and 5 that holds the linear convolution; anything shorter lets the end wrap."""
    needed, best = length + taps - 1, 1 << (length + taps - 2).bit_length()
    for five in (1, 5, 25):
        for three in (1, 3, 9):
            best = min(best, five * three << max(-(-needed // (five * three)) - 1, 0).bit_length())
    return max(best, 1)


def _time_last(x: torch.Tensor) -> torch.Tensor:
    """(batch, length, phases, channels) to (batch, phases, channels, length).

    Strided transforms are several times slower, and so is a permutation where a plain transposition would do.
    """
    batch, length, phases, channels = x.shape
    result = x.new_empty(batch, phases * channels, length)
    for to, of in zip(result, x.flatten(2), strict=True):
        to.copy_(of.t())
    return result.view(batch, phases, channels, length)


def _time_first(x: torch.Tensor) -> torch.Tensor:
    """Invert _time_last."""
    batch, phases, channels, length = x.shape
    result = x.new_empty(batch, length, phases * channels)
    for to, of in zip(result, x.flatten(1, 2), strict=True):
        to.copy_(of.t())
    return result.view(batch, length, phases, channels)


def _blocks(x: torch.Tensor) -> list[slice]:
    """Returns blocks of channels whose spectra are held together: on a CPU so few that they stay in the caches."""
    size = x.shape[-1] if x.is_cuda else _BLOCK
    return [slice(start, start + size) for start in range(0, x.shape[-1], size)]


@kept_op("flash_stu::fft_conv")
def _fft_conv(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    size, signal, taps = fft_size(x.shape[1], filters.shape[0]), _time_last(x), filters.t().contiguous()
    for block in _blocks(x):
        part = signal[:, :, block]
        spectrum = torch.fft.rfft(part, n=size).mul_(torch.fft.rfft(taps[block], n=size))
        part.copy_(torch.fft.irfft(spectrum, n=size)[..., : x.shape[1]])
    return _time_first(signal)


@_fft_conv.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("flash_stu::fft_conv_backward", mutates_args=())
def _fft_conv_backward(grad: torch.Tensor, x: torch.Tensor, filters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The spectra are computed again rather than kept: a layer then holds its inputs, not four times their size.
    size, signal, taps = fft_size(x.shape[1], filters.shape[0]), _time_last(x), filters.t().contiguous()
    grad_signal, grad_taps = _time_last(grad), torch.empty_like(taps)
    for block in _blocks(x):
        part = grad_signal[:, :, block]
        outer = torch.fft.rfft(part, n=size)
        inner = torch.fft.rfft(signal[:, :, block], n=size).conj_physical_().mul_(outer).sum(dim=(0, 1))
        grad_taps[block] = torch.fft.irfft(inner, n=size)[..., : taps.shape[1]]
        outer.mul_(torch.fft.rfft(taps[block], n=size).conj_physical_())
        part.copy_(torch.fft.irfft(outer, n=size)[..., : x.shape[1]])
    return _time_first(grad_signal), grad_taps.t().contiguous()


@_fft_conv_backward.register_fake
def _(_grad: torch.Tensor, x: torch.Tensor, filters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(filters, memory_format=torch.contiguous_format),
    )


def _save_inputs(ctx: Any, inputs: tuple[torch.Tensor, ...], **_: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.flash_stu.fft_conv_backward(grad, *ctx.saved_tensors)


_fft_conv.register_autograd(_differentiate, setup_context=_save_inputs)
