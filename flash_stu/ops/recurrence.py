"""Linear recurrences in the outputs, y[t] = v[t] + sum_i y[t - i] M[i], without a step for every token.

Inside chunks the recurrence is solved by doubling: of two neighbouring stretches that are solved each for itself, the
second lacks its response to the last outputs of the first, which is one matrix product with a map that all stretches
share. From chunk to chunk the same product runs in order. A map from the last k outputs to the next s is found by
doubling too. So the result is the recurrence itself, whatever its poles: nothing is truncated and no power of a pole
is divided out. Cost is O(length k log chunk) per channel, and memory beyond the outputs does not grow with the length.

The gradient of v is the same recurrence, run from the end with the matrices transposed.

Source: Agarwal et al. 2023 (arXiv 2312.06837), eq. 6, for the recurrence; its parallel form is ours.
"""

from typing import Any

import torch
from torch.nn.functional import pad

from flash_stu.ops.kept import kept_op
from flash_stu.ops.taps import add_taps, tap_gradients

_LONGEST = 256  # tokens in a chunk
_MAP = 2**24  # numbers in the map over a chunk, at most


def recurrence(v: torch.Tensor, taps: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
    """Solve y[t] = v[t] + sum_i y[t - i] taps[i - 1] for a whole sequence.

    Args:
        v: (batch, length, channels), any floating dtype.
        taps: of the outputs 1, 2, ... tokens before, (lags, channels), or matrices (lags, channels, channels) applied
            from the right.
        past: the last `lags` outputs before the sequence, oldest first, (batch, lags, channels); None for zeros.

    Returns:
        y, (batch, length, channels), float32 (float64 for float64 inputs).
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    v, taps = v.to(wide), taps.to(wide)
    if v.shape[1] == 0 or len(taps) == 0:
        return v
    if past is not None:
        reached = min(len(taps), v.shape[1])
        known = pad(past.to(wide), (0, 0, 0, reached - 1))
        v = torch.cat([add_taps(v[:, :reached], known, taps), v[:, reached:]], dim=1)
        if v.shape[1] == 1:
            return v
    return torch.ops.flash_stu.recurrence(v, taps)


@kept_op("flash_stu::recurrence")
def _solve(v: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    # groups that do not mix come first: every channel is one, or all channels together are
    batch, length, channels = v.shape
    matrices = taps.t()[:, :, None, None] if taps.ndim == 2 else taps[None]
    groups, lags, size, _ = matrices.shape
    longest = min(_LONGEST, max(length // (4 * lags), 1), max(_MAP // (taps.numel() * size), 1))
    chunk = 1 << (longest.bit_length() - 1)
    y = v.new_zeros((groups, batch, -(-length // chunk) * chunk * size))
    y.view(groups, batch, -1, size)[:, :, :length] = v.view(batch, length, groups, size).permute(2, 0, 1, 3)
    with torch.autocast(v.device.type, enabled=False):
        free = _free_response(matrices, chunk).to(v.dtype)[:, None]
        span = size
        while span < chunk * size:
            stretches = y.view(groups, batch, -1, 2 * span)
            last = min(lags * size, span)
            stretches[..., span:] += stretches[..., span - last : span] @ free[:, :, -last:, :span]
            span *= 2
        for start in range(span, y.shape[-1], span):
            last = min(lags * size, start)
            y[..., start : start + span] += (y[..., None, start - last : start] @ free[:, :, -last:])[..., 0, :]
    return y.view(groups, batch, -1, size)[:, :, :length].permute(1, 2, 0, 3).reshape(v.shape).contiguous()


def _free_response(matrices: torch.Tensor, chunk: int) -> torch.Tensor:
    """Returns the maps from the last outputs to the next `chunk` without new inputs, both oldest first.

    Args:
        matrices: of the lags 1, 2, ..., (groups, lags, size, size).
        chunk: a power of two.

    Returns:
        (groups, lags * size, chunk * size), float64.
    """
    free = matrices.double().flip(1).flatten(1, 2)
    known = torch.eye(free.shape[1], dtype=free.dtype, device=free.device).expand(len(free), -1, -1)
    while free.shape[2] < chunk * matrices.shape[2]:
        last = torch.cat([known, free], dim=2)[:, :, -known.shape[2] :]
        free = torch.cat([free, last @ free], dim=2)
    return free


@_solve.register_fake
def _(v: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y, taps = ctx.saved_tensors
    back = taps if taps.ndim == 2 else taps.transpose(1, 2)
    to_v = torch.ops.flash_stu.recurrence(grad.flip(1), back).flip(1)
    return to_v, tap_gradients(to_v[:, 1:], y[:, :-1], taps)


_solve.register_autograd(_differentiate, setup_context=_save)
