"""The recurrence S[t] = decay * S[t - 1] + x[t] over a sequence, every channel with a decay of its own.

It is taken chunk by chunk: inside a chunk by a matrix of the decay's powers, from chunk to chunk by the same recurrence
on the chunks' last states, whose decay is the power of the chunk's length. There is no loop over time, and no division
by a power that underflows.
"""

import torch

_CHUNK = 32


def diagonal_scan(x: torch.Tensor, decay: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Returns the states after every input, (batch, time, channels), differentiable in all arguments.

    Args:
        x: inputs, (batch, time, channels).
        decay: in [-1, 1], (channels,).
        state: before the first input, (batch, channels).
    """
    length = x.shape[1]
    if length == 0:
        return x
    if length <= _CHUNK:
        return _inside(x, decay) + _powers(decay, length) * state[:, None]
    rest = -length % _CHUNK
    chunks = torch.nn.functional.pad(x, (0, 0, 0, rest)).unflatten(1, (-1, _CHUNK))
    states = _inside(chunks, decay)
    ends = diagonal_scan(states[:, :-1, -1], decay**_CHUNK, state)
    before = torch.cat([state[:, None], ends], dim=1)
    return (states + _powers(decay, _CHUNK) * before[:, :, None]).flatten(1, 2)[:, :length]


def _powers(decay: torch.Tensor, count: int) -> torch.Tensor:
    """Returns decay, decay^2, ..., (count, channels)."""
    return decay.expand(count, -1).cumprod(dim=0)


def _inside(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Returns the states from rest within the last axis but one, (..., time, channels)."""
    length = x.shape[-2]
    powers = torch.cat([torch.ones_like(decay)[None], _powers(decay, length - 1)])
    lag = torch.arange(length, device=x.device)
    lag = lag[:, None] - lag
    matrix = powers[lag.clamp(min=0)] * (lag >= 0)[..., None]  # (time, time, channels)
    return torch.einsum("tsc,...sc->...tc", matrix, x)
