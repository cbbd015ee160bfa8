"""A few taps of a sequence added to another one: y[t] + sum_i x[t - i] taps[i], per channel or by matrices.

`tapped` is the definition in plain operations, which torch.compile fuses with what is around it; it runs on GPUs and
for matrices. On a CPU taps per channel go through the sequence block by block, so that a block stays in the processor's
cache while all taps are added to it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import pad

_ELEMENTS = 2**18  # numbers in a block: fewer cost more in calls, more leave the cache


def add_taps(y: torch.Tensor, x: torch.Tensor, taps: torch.Tensor, lags: list[int] | None = None) -> torch.Tensor:
    """Add the newest inputs to outputs: y[t] + sum_i x[t - lags[i]] taps[i], products of channels or with matrices.

    Args:
        y: (batch, length, channels), any floating dtype.
        x: (batch, past + length, channels): the inputs of y's tokens and those before them; what is older is zero.
        taps: (lags, channels), or matrices (lags, channels, channels) applied from the right.
        lags: of the taps, in tokens; None for 0, 1, ...

    Returns:
        a new tensor like y; sums are in float32 (float64 for float64 outputs).
    """
    if taps.ndim == 2 and not y.is_cuda:
        return torch.ops.flash_stu.add_taps(y, x, taps.to(_wide(y)), _or_all(lags, taps))
    return tapped(y, x, taps, lags)


def tapped(y: torch.Tensor, x: torch.Tensor, taps: torch.Tensor, lags: list[int] | None = None) -> torch.Tensor:
    """As `add_taps`, in plain operations."""
    total = y.to(_wide(y))
    for part, tap in zip(_delayed(x, y.shape[1], _or_all(lags, taps)), taps, strict=True):
        term = part * tap if taps.ndim == 2 else part @ tap.to(part.dtype)
        total = total + term.to(total.dtype)
    return total.to(y.dtype)


def tap_gradients(grad: torch.Tensor, x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of `taps` at lags 0, 1, ... from that of the outputs of `add_taps`, float32 or float64."""
    lags = _or_all(None, taps)
    if taps.ndim == 2 and not grad.is_cuda:
        return torch.ops.flash_stu.add_taps_backward(grad, x, taps, lags)[1]
    parts = _delayed(x, grad.shape[1], lags)
    form = "btd,btd->d" if taps.ndim == 2 else "bti,bto->io"
    return torch.stack([torch.einsum(form, part, grad) for part in parts])


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _or_all(lags: list[int] | None, taps: torch.Tensor) -> list[int]:
    return list(range(len(taps))) if lags is None else lags


def _delayed(x: torch.Tensor, length: int, lags: list[int]) -> Iterator[torch.Tensor]:
    """Yield the `length` inputs that end so many tokens before the last."""
    x = pad(x, (0, 0, max(length + max(lags, default=0) - x.shape[1], 0), 0))
    end = x.shape[1]
    for lag in lags:
        yield x[:, end - lag - length : end - lag]


def _blocks(x: torch.Tensor) -> Iterator[tuple[int, int]]:
    batch, length, channels = x.shape
    size = max(_ELEMENTS // (batch * channels), 1)
    for start in range(0, length, size):
        yield start, min(start + size, length)


@torch.library.custom_op("flash_stu::add_taps", mutates_args=())
def _add(y: torch.Tensor, x: torch.Tensor, taps: torch.Tensor, lags: list[int]) -> torch.Tensor:
    result, past = torch.empty_like(y, memory_format=torch.contiguous_format), x.shape[1] - y.shape[1]
    for start, stop in _blocks(y):
        to = result[:, start:stop]
        block = to.copy_(y[:, start:stop]) if y.dtype == taps.dtype else y[:, start:stop].to(taps.dtype)
        for lag, tap in zip(lags, taps, strict=True):
            first = max(start, lag - past)
            if first < stop:
                block[:, first - start :].addcmul_(x[:, first + past - lag : stop + past - lag].to(taps.dtype), tap)
        if block is not to:
            to.copy_(block)
    return result


@_add.register_fake
def _(y: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.custom_op("flash_stu::add_taps_backward", mutates_args=())
def _add_backward(
    grad: torch.Tensor, x: torch.Tensor, taps: torch.Tensor, lags: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_x, grad_taps = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(taps)
    length, past = grad.shape[1], x.shape[1] - grad.shape[1]
    for start, stop in _blocks(x):
        to, own = grad_x[:, start:stop], x[:, start:stop].to(taps.dtype)
        block = to.zero_() if x.dtype == taps.dtype else torch.zeros_like(own)
        for lag, tap, to_tap in zip(lags, taps, grad_taps, strict=True):
            shift = past - lag  # an input reaches the output so many places before it
            low, high = max(start, shift), min(stop, length + shift)
            if low < high:
                reached, inside = grad[:, low - shift : high - shift].to(taps.dtype), slice(low - start, high - start)
                block[:, inside].addcmul_(reached, tap)
                to_tap += (own[:, inside] * reached).sum(dim=(0, 1))
        if block is not to:
            to.copy_(block)
    return grad_x, grad_taps


@_add_backward.register_fake
def _(_: torch.Tensor, x: torch.Tensor, taps: torch.Tensor, _lags: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(taps)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    _, *tensors, ctx.lags = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return grad, *torch.ops.flash_stu.add_taps_backward(grad, *ctx.saved_tensors, ctx.lags), None


_add.register_autograd(_differentiate, setup_context=_save_inputs)
