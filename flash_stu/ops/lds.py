"""Diagonal linear dynamical systems over a sequence, and the steps of generation.

A system with dilation d runs d interleaved sequences,

    S[t] = decay * S[t - d] + x[t]        y[t] = sum_j readout[j] * S[t][j].

Its state is therefore the last d values of S, kept as a tuple, oldest first; a step replaces the oldest one, so that
nothing is copied for the others.

States are float32, but sums over them are taken in float64: a fitted readout has terms a hundred times larger than
their sum, and the cancellation would cost the digits that the fit is good for.

Source: Shah et al. 2025, SpectraLDS (arXiv 2505.17868), section 4.
"""

import torch

State = tuple[torch.Tensor, ...]


def powers(decay: torch.Tensor, length: int) -> torch.Tensor:
    """decay^0 .. decay^(length-1) as (length, states), float64."""
    exponents = torch.arange(length, dtype=torch.float64, device=decay.device)
    return decay.double() ** exponents[:, None]


def zero_state(batch: int, states: int, channels: int, dilation: int, device) -> State:
    """The state before the first token: `dilation` tensors (batch, states, channels), float32."""
    shape = (batch, states, channels)
    return tuple(torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(dilation))


def lds_scan(x: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
    """Run the system token by token: the reference the other forms are held against.

    Args:
        x: inputs, (batch, length, channels).
        decay: eigenvalues in (-1, 1), (states,).
        readout: per-channel output weights, (states, channels).
        state: the last `dilation` states, oldest first, each (batch, states, channels), float32 or float64.

    Returns:
        outputs (batch, length, channels) in x's dtype, and the state after the last token.
    """
    outputs = []
    for t in range(x.shape[1]):
        state = lds_advance(x[:, t], decay, state)
        outputs.append((readout.double() * state[-1]).sum(dim=1))
    return torch.stack(outputs, dim=1).to(x.dtype), state


def lds_advance(x: torch.Tensor, decay: torch.Tensor, state: State) -> State:
    """Take in one token x (batch, channels): the oldest state becomes the newest."""
    return (*state[1:], torch.addcmul(x[:, None].to(state[0].dtype), decay[:, None], state[0]))


def final_state(x: torch.Tensor, decay: torch.Tensor, state: State) -> State:
    """The state after a whole sequence, as one matrix product per phase instead of a loop.

    Args:
        x: inputs, (batch, length, channels).
        decay: (states,).
        state: the state before the sequence, as in lds_scan.

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
        carried = kernel[-1][:, None] * state[newest % dilation]
        result.append((carried + torch.matmul(kernel[:-1].flip(0).t(), inputs)).to(state[0].dtype))
    return tuple(result)


def free_response(decay: torch.Tensor, readout: torch.Tensor, state: State, length: int) -> torch.Tensor:
    """What the system still puts out without further input: y[t] = sum_j readout[j] decay[j]^n S[t - n d][j].

    Args:
        decay: (states,).
        readout: (states, channels).
        state: as in lds_scan.
        length: tokens to run.

    Returns:
        outputs (batch, length, channels), float64.
    """
    dilation = len(state)
    steps = -(-length // dilation)
    kernel = powers(decay, steps + 1)[1:]
    phases = [torch.matmul(kernel, readout.double() * slot) for slot in state]
    return torch.stack(phases, dim=2).flatten(1, 2)[:, :length]
