"""Diagonal linear dynamical systems over a sequence, and the steps of generation.

A system with dilation d runs d interleaved sequences,

    S[t] = decay * S[t - d] + x[t]        y[t] = sum_j readout[j] * S[t][j].

Its state is therefore the last d values of S, kept as a tuple, oldest first; a step replaces the oldest one, so that
nothing is copied for the others. Each is (batch, channels, states): what a channel sums up lies side by side, so that a
compiler makes one kernel of a step and its sum.

States are float32 unless asked otherwise, but sums over them are taken in float64: a fitted readout has terms a hundred
times larger than their sum, and the cancellation would cost the digits that the fit is good for.

Three forms agree: `lds_advance` token by token, `lds_chunked` (matrix products over chunks, the fastest for a long
input) and a convolution with `powers(decay) @ readout` (differentiable at the cost of an FFT), to which
`free_response` adds the outputs of the state before and `final_state` the state after.

Source: Shah et al. 2025, SpectraLDS (arXiv 2505.17868), section 4.
"""

import torch

from flash_stu.filters.exponentials import powers
from flash_stu.ops.conv.choice import causal_conv

State = tuple[torch.Tensor, ...]
_CHUNK = 64  # tokens of one phase in a chunk of lds_chunked
_SEGMENT = 8  # chunks that share one product with the Toeplitz matrices


def scale_rates(decay: torch.Tensor, log_factor: torch.Tensor) -> torch.Tensor:
    """Returns decays whose rates -log|decay| are multiplied by exp(log_factor).

    Any factor gives a stable system of the same signs, and log_factor 0 exactly the decays given, however close to 1
    they are.

    Args:
        decay: eigenvalues in (-1, 1), (states,).
        log_factor: (states,).

    Returns:
        float64, at most the largest float32 below 1 in magnitude.
    """
    rate = -decay.double().abs().clamp(min=torch.finfo(torch.float32).tiny).log()
    size = torch.exp(-rate * log_factor.double().exp())
    return decay.sign() * size.clamp(max=1 - 2.0**-24)


def zero_state(
    batch: int,
    channels: int,
    states: int,
    dilation: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> State:
    """Returns the state before the first token: `dilation` tensors (batch, channels, states)."""
    return tuple(torch.zeros((batch, channels, states), dtype=dtype, device=device) for _ in range(dilation))


def lds_advance(x: torch.Tensor, decay: torch.Tensor, state: State) -> State:
    """Returns the state after one more token x (batch, channels).

    The oldest of its tensors becomes the newest, in place where no gradient is taken.
    """
    oldest = state[0]
    x, decay = x[:, :, None].to(oldest.dtype), decay.to(oldest.dtype)
    if torch.is_grad_enabled():
        return (*state[1:], torch.addcmul(x, decay, oldest))
    torch.addcmul(x, decay, oldest, out=oldest)
    return (*state[1:], oldest)


def lds_chunked(
    x: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, state: State
) -> tuple[torch.Tensor, State]:
    """Run the system by matrix products: inside a chunk with the Toeplitz matrices of the impulse response, from chunk
    to chunk through the states.

    Cost is O(length * (chunk + 2 states) * channels), and memory beyond the outputs does not grow with the length.

    Args:
        x: inputs, (batch, length, channels).
        decay: eigenvalues in (-1, 1), (states,).
        readout: per-channel output weights, (states, channels).
        state: the last `dilation` states, oldest first, each (batch, channels, states), float32 or float64.

    Returns:
        outputs (batch, length, channels) in x's dtype, and the state after the last token.
    """
    dilation, length = len(state), x.shape[1]
    span = _CHUNK * dilation
    whole = length - length % span
    wide = torch.promote_types(x.dtype, torch.float32)
    kernel = powers(decay, _CHUNK + 1)
    taps = (kernel[:-1] @ readout.double()).to(wide)
    y = torch.empty_like(x, dtype=wide)
    if whole:
        into, out_of, over = kernel[:-1].flip(0).t().contiguous(), kernel[1:], kernel[-1][:, None]
        weights, toeplitz = readout.double(), _toeplitz(taps)
        now = torch.stack([slot.mT.double() for slot in state], dim=1)  # (batch, phases, states, channels)
        chunks, outputs = (tensor[:, :whole].unflatten(1, (-1, _CHUNK, dilation)) for tensor in (x, y))
        for first in range(0, chunks.shape[1], _SEGMENT):
            segment = slice(first, first + _SEGMENT)
            outputs[:, segment] = _inside_chunks(chunks[:, segment].to(wide), toeplitz)
            for i in range(chunks.shape[1])[segment]:
                outputs[:, i] += torch.matmul(out_of, weights * now).transpose(1, 2)
                now = torch.matmul(into, chunks[:, i].transpose(1, 2).double()) + over * now
        state = tuple(slot.to(state[0].dtype).mT.contiguous() for slot in now.unbind(1))
    if whole < length:
        rest = x[:, whole:]
        inner = causal_conv(rest.to(wide), taps, "fft", dilation)
        y[:, whole:] = inner + free_response(decay, readout, state, length - whole)
        state = final_state(rest, decay, state)
    return y.to(x.dtype), state


def _toeplitz(taps: torch.Tensor) -> torch.Tensor:
    """(lags, channels) -> (channels, lags, lags): entry [t, j] is what the j-th last input gives to output t."""
    padded = torch.cat([torch.zeros_like(taps[1:]), taps]).t().contiguous()
    return padded.unfold(1, taps.shape[0], 1).contiguous()


def _inside_chunks(chunks: torch.Tensor, toeplitz: torch.Tensor) -> torch.Tensor:
    """Convolve every chunk alone: (batch, chunks, time, phases, channels) to the same."""
    batch, number, time, phases, channels = chunks.shape
    columns = chunks.flip(2).permute(4, 2, 0, 1, 3).reshape(channels, time, -1)
    y = torch.bmm(toeplitz, columns)
    return y.view(channels, time, batch, number, phases).permute(2, 3, 1, 4, 0)


def final_state(x: torch.Tensor, decay: torch.Tensor, state: State) -> State:
    """Compute the state after a whole sequence, as one matrix product per phase instead of a loop.

    Args:
        x: inputs, (batch, length, channels).
        decay: (states,).
        state: the state before the sequence, as in lds_chunked.

    Returns:
        the state after it: S[T] = decay^n S[T - n d] + sum_i decay^i x[T - i d].
    """
    length, dilation = x.shape[1], len(state)
    result = []
    for age in range(dilation):  # the slot's newest input is at length - dilation + age
        newest = length - dilation + age
        if newest < 0:
            result.append(state[newest])
            continue
        inputs = x[:, newest % dilation : newest + 1 : dilation].double()
        kernel = powers(decay, inputs.shape[1] + 1)
        carried = kernel[-1] * state[newest % dilation]
        result.append((carried + torch.matmul(inputs.mT, kernel[:-1].flip(0))).to(state[0].dtype))
    return tuple(result)


def free_response(decay: torch.Tensor, readout: torch.Tensor, state: State, length: int) -> torch.Tensor:
    """Compute the outputs without further input: y[t] = sum_j readout[j] decay[j]^n S[t - n d][j].

    Args:
        decay: (states,).
        readout: (states, channels).
        state: as in lds_chunked.
        length: tokens to run.

    Returns:
        outputs (batch, length, channels), float64.
    """
    dilation = len(state)
    steps = -(-length // dilation)
    kernel = powers(decay, steps + 1)[1:]
    phases = [torch.matmul(kernel, readout.double() * slot.mT) for slot in state]
    return torch.stack(phases, dim=2).flatten(1, 2)[:, :length]
