"""The STU's convolution: filters that are learned combinations of constant spectral filters.

Back ends are those of flash_stu.ops.conv.causal, which convolve with any filter, and two that use what a spectral
filter is, a few taps and then a sum of decaying exponentials: `chunked` (matrix products, everywhere) and `triton`
(the same as one kernel, on a GPU). "auto" takes the fastest of those that were measured.
"""

import logging
from functools import cache

import torch
from torch.nn.functional import pad

from flash_stu.errors import UserError
from flash_stu.filters.exponentials import exponential_tail
from flash_stu.ops import backends
from flash_stu.ops.conv.causal import BACKENDS as GENERIC_BACKENDS
from flash_stu.ops.conv.causal import causal_conv
from flash_stu.ops.conv.causal import choose as choose_generic
from flash_stu.ops.conv.chunked import chunked_conv

BACKENDS = (*GENERIC_BACKENDS, "chunked", "triton")
CHUNK = {"chunked": 32, "triton": 16}  # tokens of one phase; twice as many lags are near

# The fastest back end from so many tokens on, forward and backward, as scripts/bench/conv.py found it: torch 2.13 on
# one thread of a Xeon with AVX-512 (batch 1, 256 channels, dilation 2). A GPU has no row until it was measured.
_FASTEST = {
    ("cpu", torch.float32): ((0, "fft"), (1024, "chunked")),
    ("cpu", torch.bfloat16): ((0, "fft"), (1024, "chunked")),
}
_log = logging.getLogger(__name__)


def spectral_conv(
    x: torch.Tensor,
    filters: torch.Tensor,
    weights: torch.Tensor,
    backend: str = "auto",
    dilation: int = 1,
    both_signs: bool = False,
) -> torch.Tensor:
    """Convolve each channel d with the filter sum_k filters[:, k] weights[k, d].

    Args:
        x: inputs, (batch, length, channels), any floating dtype.
        filters: spectral filters at lags 0, dilation, 2 dilation, ..., (lags, features); they get no gradient.
        weights: (features, channels).
        backend: one of BACKENDS.
        dilation: distance between lags, in tokens.
        both_signs: whether the filters oscillate, as (-1)^t phi(t) and those of the hankel_l basis do at dilation 1;
            read by "chunked" and "triton" only.

    Returns:
        outputs (batch, length, channels) in x's dtype; sums are accumulated in float32 (float64 for float64 inputs).

    Raises:
        UserError: for shapes that do not fit together, a back end that is unknown or not available, or a sequence
            longer than the filters with one that would go on as exponentials beyond them.

    Source: Liu et al. 2024, Flash STU (arXiv 2409.10489), section 3.2.
    """
    if filters.shape[1] != weights.shape[0]:
        raise UserError(
            f"spectral_conv takes filters (lags, features) and weights (features, channels); "
            f"got {tuple(filters.shape)} and {tuple(weights.shape)}"
        )
    steps = -(-x.shape[1] // dilation)
    name = choose(backend, x, steps <= filters.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    if name not in ("chunked", "triton"):
        return causal_conv(x, _mix(filters[:steps], weights, wide), name, dilation)
    if steps > filters.shape[0]:
        raise UserError(
            f"convolution back end {name!r} ends at the filters' {filters.shape[0]} lags; the sequence has {steps}"
        )
    chunk = CHUNK[name]
    near, tail = filters[: 2 * chunk], filters.new_zeros((1, filters.shape[1]))
    near = pad(near, (0, 0, 0, 2 * chunk - near.shape[0]))
    decay = tail[:, 0].double()
    if filters.shape[0] > 2 * chunk:
        decay, tail = exponential_tail(filters, chunk + 1, both_signs)
    readout = _mix(tail, weights, wide)
    if name == "chunked":
        return chunked_conv(x, _mix(near, weights, wide), decay, readout, None, dilation)[0]
    from flash_stu.ops.conv.triton import triton_conv

    return triton_conv(x, near, weights, decay, readout, dilation)


def _mix(filters: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast(filters.device.type, enabled=False):
        return filters.to(dtype) @ weights.to(dtype)


def for_any_filter(backend: str) -> str:
    """What a choice among BACKENDS means where filters are not spectral: a back end of causal_conv."""
    return backend if backend in GENERIC_BACKENDS else "auto"


def choose(backend: str, x: torch.Tensor, within_filters: bool) -> str:
    """The back end for inputs like x; "auto" explains itself in a debug line, once for each case."""
    if backend not in BACKENDS:
        raise UserError(f"convolution back end is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "triton":
        backends.require("convolution", backend)
    if backend != "auto":
        return backend
    measured = _FASTEST.get((x.device.type, x.dtype))
    if not within_filters:
        name, reason = choose_generic("auto", x), "the sequence is longer than the filters"
    elif measured is None:
        name, reason = choose_generic("auto", x), "nothing was measured there"
    else:
        least, name = [row for row in measured if row[0] <= x.shape[1]][-1]
        reason = f"the fastest measured from {least} tokens on"
    _explain(x.device.type, str(x.dtype), name, reason)
    return name


@torch.compiler.assume_constant_result  # logging would break the graph
def _explain(*case: str) -> None:
    _explain_once(*case)


@cache
def _explain_once(device: str, dtype: str, name: str, reason: str) -> None:
    _log.debug("convolution on %s in %s: %s, %s", device, dtype.removeprefix("torch."), name, reason)
