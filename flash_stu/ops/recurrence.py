"""Linear recurrences in the outputs, y[t] = v[t] + sum_i y[t - i] M[i], without a step for every token.

Inside chunks the recurrence is solved by doubling: of two neighbouring stretches that are solved each for itself, the
second lacks its response to the last outputs of the first, which is one matrix product with a map that all stretches
share. From chunk to chunk the same product runs in order. A map from the last k outputs to the next s is found by
doubling too. So the result is the recurrence itself, whatever its poles: nothing is truncated and no power of a pole
is divided out. Sums are in float64: with two poles near 1 a response is the difference of terms as large as a chunk is
long. Cost is O(length k log chunk) per channel.

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
        with torch.autocast(v.device.type, enabled=False):
            v = torch.cat([add_taps(v[:, :reached], known, taps), v[:, reached:]], dim=1)
        if v.shape[1] == 1:
            return v
    return torch.ops.flash_stu.recurrence(v, taps)


@kept_op("flash_stu::recurrence")
def _solve(v: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    batch, length, channels = v.shape
    lags = len(taps)
    mixed = lags * (1 if taps.ndim == 2 else channels)  # numbers that an output is a combination of
    # to find the map over a chunk must not take longer than to apply it, nor fill the memory
    longest = min(_LONGEST, batch * length // (4 * mixed), _MAP // taps.numel())
    chunk = 1 << (max(longest, 1).bit_length() - 1)
    y = v.new_zeros((batch, -(-length // chunk) * chunk, channels), dtype=torch.float64)
    y[:, :length] = v
    free, span = _free_response(taps.double(), chunk), 1
    while span < chunk:
        stretches = y.view(batch, -1, 2 * span, channels)
        _respond(stretches[:, :, span:], stretches[:, :, max(span - lags, 0) : span], free)
        span *= 2
    for start in range(chunk, y.shape[1], chunk):
        _respond(y[:, None, start : start + chunk], y[:, None, max(start - lags, 0) : start], free)
    return y[:, :length].to(v.dtype).contiguous()


def _respond(onto: torch.Tensor, last: torch.Tensor, free: torch.Tensor) -> None:
    """Add to outputs (batch, stretches, span, channels) what the last ones before, likewise, give to them."""
    free = free[-last.shape[2] :].narrow(-2, 0, onto.shape[2])
    if free.ndim == 3:
        for known, response in zip(last.unbind(2), free, strict=True):
            onto.addcmul_(known[:, :, None], response)
    else:
        onto += (last.flatten(2) @ free.flatten(2).flatten(0, 1)).view(onto.shape)


def _free_response(taps: torch.Tensor, chunk: int) -> torch.Tensor:
    """Returns what each of the last outputs, oldest first, gives to the next `chunk`, a power of two.

    Args:
        taps: (lags, channels) or (lags, channels, channels).

    Returns:
        (lags, chunk, channels) or (lags, channels, chunk, channels).
    """
    lags, channels = taps.shape[:2]
    free = taps.flip(0).unsqueeze(-2)
    if taps.ndim == 2:
        form, one = "jrd,rsd->jsd", torch.eye(lags).to(taps)[:, :, None].expand(-1, -1, channels)
    else:
        form, one = "jirm,rmso->jiso", torch.eye(lags * channels).to(taps).unflatten(1, (lags, -1))
        one = one.unflatten(0, (lags, channels))
    while free.shape[-2] < chunk:
        last = torch.cat([one, free], dim=-2).narrow(-2, free.shape[-2], lags)
        free = torch.cat([free, torch.einsum(form, last, free)], dim=-2)
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
