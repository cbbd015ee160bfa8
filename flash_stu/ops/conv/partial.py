"""The STU's convolution over one part of a sequence, see flash_stu.ops.parts.

The part is convolved with a chunk of inputs before it, its halo. What is older reaches it through the states of the
filters' exponentials alone, which sum up everything but the halo:

    Z[j] = sum_n decay[j]^n x[start - (chunk + 1) dilation - n dilation]        per phase and channel

Each part contributes to the states of later ones with the tokens from its halo's first on, and hands its own halo's
worth of last tokens to the next: so the contributions tile the sequence, whatever its parts' lengths.

Filters that are only a few taps, with no exponentials, take a halo of all their lags.
"""

import torch
from torch.nn.functional import pad

from flash_stu.errors import UserError
from flash_stu.filters.exponentials import powers
from flash_stu.ops import backends
from flash_stu.ops.conv import PARTIAL_BACKENDS
from flash_stu.ops.conv.choice import CHUNK, causal_conv, mix
from flash_stu.ops.conv.chunked import ChunkedState, chunked_conv
from flash_stu.ops.conv.tail import exponential_tail
from flash_stu.ops.parts import Past

_STEPS = 1024  # of a phase, in a product of inputs with powers of the decays
_DENORMAL = 1e-30  # smaller powers are zero: arithmetic with denormals is slow


class PartialConv:
    """The convolution of one part with combinations of spectral filters; what it needs of the past is fetched once.

    Args:
        x: inputs of the part, (batch, tokens, channels).
        filters: see spectral_conv.
        past: the parts before.
        backend: one of PARTIAL_BACKENDS.
        dilation, both_signs, smooth_tail: see spectral_conv.

    Raises:
        UserError: for a back end, or filters, that need the whole sequence.
    """

    def __init__(
        self,
        x: torch.Tensor,
        filters: torch.Tensor,
        past: Past,
        backend: str = "auto",
        dilation: int = 1,
        both_signs: bool = False,
        smooth_tail: bool = True,
    ) -> None:
        if not smooth_tail:
            raise UserError("filter_basis 'tensor' has no states that stand for the past of a sequence in parts")
        self.x, self.dilation, self.both_signs = x, dilation, both_signs
        self.name = _choose(backend, x)
        self.chunk, lags = CHUNK[self.name], len(filters)
        self.far = None
        if lags <= 2 * self.chunk:
            self.history = past.halo(x, (lags - 1) * dilation)
            return
        span = self.chunk * dilation
        history = past.halo(x, span)
        self.history = pad(history, (0, 0, span - history.shape[1], 0))
        decay, _ = exponential_tail(filters[:, :1], self.chunk + 1, both_signs)
        steps = x.shape[1] // dilation
        seen = torch.cat([self.history, x], dim=1)[:, : steps * dilation]
        self.far = past.states(decayed_sums(seen, decay, dilation), decay, steps)

    def __call__(self, filters: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Returns the part's outputs (batch, tokens, channels) for filters and weights as in spectral_conv."""
        wide = torch.promote_types(self.x.dtype, torch.float32)
        if self.far is None:
            extended = torch.cat([self.history, self.x], dim=1)
            y = causal_conv(extended, mix(filters, weights, None, wide), "auto", self.dilation)
            return y[:, self.history.shape[1] :]
        near = filters[: 2 * self.chunk]
        decay, tail = exponential_tail(filters, self.chunk + 1, self.both_signs)
        taps, readout = mix(near, weights, None, wide), mix(tail, weights, None, wide)
        if self.name == "chunked":
            state = ChunkedState(self.history, self.x[:, :0], self.far)
            return chunked_conv(self.x, taps, decay, readout, state, self.dilation)[0]
        from flash_stu.ops.conv.triton import triton_conv

        extended = torch.cat([self.history, self.x], dim=1)
        y = triton_conv(extended, taps, decay, readout, self.dilation)[:, self.history.shape[1] :]
        return (y + free_response(self.far, decay, readout, self.x.shape[1])).to(y.dtype)


def _choose(backend: str, x: torch.Tensor) -> str:
    if backend == "auto":
        return "triton" if x.is_cuda and backends.why_not("triton") is None else "chunked"
    if backend not in PARTIAL_BACKENDS:
        allowed = ", ".join(PARTIAL_BACKENDS)
        raise UserError(f"convolution back end {backend!r} needs the whole sequence; allowed for parts: {allowed}")
    if backend == "triton":
        backends.require("convolution", backend)
    return backend


def decayed_sums(x: torch.Tensor, decay: torch.Tensor, dilation: int) -> torch.Tensor:
    """Sum up inputs by their age: sum_n decay[j]^n x[last - n dilation] for the last token of every phase.

    Args:
        x: (batch, length, channels), the length a multiple of the dilation.
        decay: constants (states,), float64.
        dilation: number of phases.

    Returns:
        (batch, dilation, channels, states), float32 (float64 for float64 inputs).
    """
    batch, length, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    steps = length // dilation
    size = min(_STEPS, steps)
    kernel = _powers(decay, size, wide).flip(0).t()  # the last token of a segment has the power 0
    rows = x.view(batch, steps, dilation * channels) if x.is_contiguous() else x.reshape(batch, steps, -1)
    total = x.new_zeros((batch, len(decay), dilation * channels), dtype=wide)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, steps, size):
            segment = rows[:, start : start + size].to(wide)
            over = powers(decay, decay.new_tensor([segment.shape[1]]))[0].to(wide)
            total = torch.matmul(kernel[:, size - segment.shape[1] :], segment) + over[:, None] * total
    return total.view(batch, len(decay), dilation, channels).permute(0, 2, 3, 1)


def free_response(far: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, length: int) -> torch.Tensor:
    """Returns what the states give to a part's outputs: sum_j decay[j]^n readout[j] Z[j] at step n.

    Args:
        far: (batch, dilation, channels, states).
        decay: (states,), float64.
        readout: (states, channels).
        length: tokens of the part.

    Returns:
        (batch, length, channels), in the states' dtype.
    """
    steps = -(-length // far.shape[1])
    with torch.autocast(far.device.type, enabled=False):
        weighted = (far * readout.t()).permute(0, 3, 1, 2).flatten(2)  # (batch, states, dilation * channels)
        y = torch.matmul(_powers(decay, steps, far.dtype), weighted)
    return y.view(far.shape[0], -1, far.shape[2])[:, :length]


def _powers(decay: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    kernel = powers(decay, count)
    return torch.where(kernel.abs() < _DENORMAL, 0, kernel).to(dtype)
