"""Causal convolution along the sequence, with a filter per channel: the one place that chooses the back end.

Any filter: `direct` (a sum over lags: the reference), `fft` (everywhere) and `flashfftconv` (CUDA, optional). Learned
combinations of spectral filters, which are a few taps and then a sum of decaying exponentials: those three, `chunked`
(matrix products, everywhere) and `triton` (the same as kernels, on a GPU).

A dilated filter has taps at every `dilation`-th lag only; the sequence then falls apart into `dilation` interleaved
ones, which convolve independently at that fraction of the length. An STU with shared branches is exactly that with
dilation 2 (the polyphase form). Dilation is an argument and is never guessed from zeros in the filter: a tap that
happens to be zero still has a gradient.
"""

import logging

import torch
from torch.nn.functional import pad

from flash_stu.errors import UserError
from flash_stu.ops import backends
from flash_stu.ops.conv import ANY_FILTER_BACKENDS, BACKENDS
from flash_stu.ops.conv.chunked import chunked_conv
from flash_stu.ops.conv.direct import direct_conv
from flash_stu.ops.conv.fft import fft_conv
from flash_stu.ops.conv.flashfft import flash_fft_conv
from flash_stu.ops.conv.tail import exponential_tail
from flash_stu.ops.taps import add_taps

_ANY_FILTER = {"direct": direct_conv, "fft": fft_conv, "flashfftconv": flash_fft_conv}
CHUNK = {"chunked": 32, "triton": 16}  # tokens of one phase; twice as many lags are near

# The fastest back end from so many tokens on, forward and backward, as scripts/bench/conv.py found it: torch 2.13 on
# one thread of a Xeon with AVX-512 (batch 1, 256 channels, dilation 2).
_FASTEST = {
    ("cpu", torch.float32): ((0, "fft"), (1024, "chunked")),
    ("cpu", torch.bfloat16): ((0, "fft"), (1024, "chunked")),
}
# An estimate from the instructions and the memory traffic of the compiled kernels, until a GPU was measured: tokens.
_TRITON_FROM = {("cuda", dtype): 1024 for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_log = logging.getLogger(__name__)
_explained: set[tuple[str, str, str, str]] = set()


def causal_conv(x: torch.Tensor, filters: torch.Tensor, backend: str = "auto", dilation: int = 1) -> torch.Tensor:
    """Convolve each channel with its own filter: y[t] = sum_j filters[j] * x[t - dilation * j].

    Args:
        x: inputs, (batch, length, channels), any floating dtype.
        filters: taps, (taps, channels); taps beyond the length are ignored, missing ones are zero.
        backend: one of ANY_FILTER_BACKENDS; "auto" takes flashfftconv for bf16 and fp16 on a GPU that has it, else fft.
        dilation: distance between taps, in tokens.

    Returns:
        outputs (batch, length, channels) in x's dtype; sums are accumulated in float32 (float64 for float64 inputs).

    Raises:
        UserError: if the channels differ, or the back end is unknown or not available.

    Source: Agarwal et al. 2023 (arXiv 2312.06837), eq. 3; polyphase split for even lags as in any multirate text.
    """
    if x.ndim != 3 or filters.ndim != 2 or x.shape[-1] != filters.shape[-1]:
        raise UserError(
            f"causal_conv takes x (batch, length, channels) and filters (taps, channels); "
            f"got {tuple(x.shape)} and {tuple(filters.shape)}"
        )
    _check(backend, ANY_FILTER_BACKENDS)
    run = _ANY_FILTER[_fastest_for_any_filter(x.device.type, x.dtype) if backend == "auto" else backend]
    batch, length, channels = x.shape
    if length == 0:
        return x
    steps = (length + dilation - 1) // dilation
    phases = pad(x, (0, 0, 0, steps * dilation - length)).unflatten(1, (steps, dilation))
    y = run(phases, filters[: phases.shape[1]])
    if torch.compiler.is_exporting():  # of an unknown length it cannot be proved that the slice below is inside
        token = torch.arange(length, device=x.device)
        return y[:, token // dilation, token % dilation]
    return y.reshape(batch, -1, channels)[:, :length]


def spectral_conv(
    x: torch.Tensor,
    filters: torch.Tensor,
    weights: torch.Tensor,
    backend: str = "auto",
    dilation: int = 1,
    both_signs: bool = False,
    smooth_tail: bool = True,
    taps: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve each channel d with the filter sum_k filters[:, k] weights[k, d]: the STU's convolution.

    Taps may come on top, y[t] += sum_i taps[i] x[t - i] with i in tokens. Those at multiples of the dilation are
    weights of filters that are one at one lag, at no cost; only the others are added in a pass of their own.

    Args:
        x: inputs, (batch, length, channels), any floating dtype.
        filters: spectral filters at lags 0, dilation, 2 dilation, ..., (lags, features); they get no gradient.
        weights: (features, channels).
        backend: one of BACKENDS; "auto" takes the fastest of those that were measured, or what is estimated to be it.
        dilation: distance between lags, in tokens.
        both_signs: whether the filters oscillate, as (-1)^t phi(t) and those of the hankel_l basis do at dilation 1;
            read by "chunked" and "triton" only.
        smooth_tail: whether the filters end in decaying exponentials, as all but those of the tensor basis do, which
            jump; "chunked" and "triton" take no others.
        taps: (lags in tokens, channels), see above.

    Returns:
        outputs (batch, length, channels) in x's dtype; sums are accumulated in float32 (float64 for float64 inputs).

    Raises:
        UserError: for shapes that do not fit together, a back end that is unknown or not available, or a sequence
            longer than the filters with a back end that would continue the filters as exponentials.

    Source: Liu et al. 2024, Flash STU (arXiv 2409.10489), section 3.2.
    """
    if filters.shape[1] != weights.shape[0]:
        raise UserError(
            f"spectral_conv takes filters (lags, features) and weights (features, channels); "
            f"got {tuple(filters.shape)} and {tuple(weights.shape)}"
        )
    steps, lags = (x.shape[1] + dilation - 1) // dilation, filters.shape[0]
    _check(backend, BACKENDS if smooth_tail else ANY_FILTER_BACKENDS)
    name = _fastest_for_spectral_filters(x, steps <= lags, smooth_tail) if backend == "auto" else backend
    wide = torch.promote_types(x.dtype, torch.float32)
    if name not in _ANY_FILTER and steps > lags:
        raise UserError(f"convolution back end {name!r} ends at the filters' {lags} lags; the sequence has {steps}")
    # between the lags chunk and 2 chunk near taps and exponentials have to agree
    reach = lags if name in _ANY_FILTER else min(CHUNK[name] + 1, lags)
    inner, outer = _split(taps, dilation, reach)
    if name in _ANY_FILTER:
        y = causal_conv(x, mix(filters[:steps], weights, inner, wide), name, dilation)
    else:
        y = _by_exponentials(x, filters, weights, inner, name, dilation, both_signs)
    if taps is None or not outer:
        return y
    return add_taps(y, x, torch.stack([taps[lag] for lag in outer]), outer)


def _by_exponentials(
    x: torch.Tensor,
    filters: torch.Tensor,
    weights: torch.Tensor,
    taps: torch.Tensor | None,
    name: str,
    dilation: int,
    both_signs: bool,
) -> torch.Tensor:
    chunk, wide = CHUNK[name], torch.promote_types(x.dtype, torch.float32)
    near, tail = mix(filters[: 2 * chunk], weights, taps, wide), filters.new_zeros((1, filters.shape[1]))
    near = pad(near, (0, 0, 0, 2 * chunk - near.shape[0]))
    decay = tail[:, 0].double()
    if len(filters) > 2 * chunk:
        decay, tail = exponential_tail(filters, chunk + 1, both_signs)
    readout = mix(tail, weights, None, wide)
    if name == "chunked":
        return chunked_conv(x, near, decay, readout, None, dilation)[0]
    from flash_stu.ops.conv.triton import triton_conv

    return triton_conv(x, near, decay, readout, dilation)


def _split(taps: torch.Tensor | None, dilation: int, reach: int) -> tuple[torch.Tensor | None, list[int]]:
    """Returns the taps that a dilated filter of `reach` lags has, one for each lag, and the lags of the others."""
    if taps is None:
        return None, []
    inner = taps[::dilation][:reach]
    return inner, [lag for lag in range(len(taps)) if lag % dilation or lag >= dilation * reach]


def any_filter_backend(backend: str) -> str:
    """Returns the back end of `causal_conv` that goes with one of BACKENDS: itself, or "auto" for the spectral ones."""
    return backend if backend in ANY_FILTER_BACKENDS else "auto"


def mix(filters: torch.Tensor, weights: torch.Tensor, taps: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Returns the channels' filters, with taps (at most as many as lags) on the first lags."""
    if taps is not None:
        ones = torch.eye(filters.shape[0], len(taps), dtype=filters.dtype, device=filters.device)
        filters, weights = torch.cat([filters, ones], dim=1), torch.cat([weights, taps.to(weights.dtype)])
    with torch.autocast(filters.device.type, enabled=False):
        return filters.to(dtype) @ weights.to(dtype)


def _check(backend: str, allowed: tuple[str, ...]) -> None:
    if backend not in allowed:
        raise UserError(f"convolution back end is {backend!r}; allowed: {', '.join(allowed)}")
    if backend in ("flashfftconv", "triton"):
        backends.require("convolution", backend)


def _fastest_for_any_filter(device: str, dtype: torch.dtype) -> str:
    half = dtype in (torch.bfloat16, torch.float16)
    return "flashfftconv" if half and device == "cuda" and backends.why_not("flashfftconv") is None else "fft"


def _fastest_for_spectral_filters(x: torch.Tensor, long_enough: bool, smooth_tail: bool) -> str:
    """The back end for inputs like x; the reason is logged, once for each case."""
    device, dtype = x.device.type, x.dtype
    if torch.compiler.is_exporting():
        return "fft"  # at every length
    if not long_enough:
        name, reason = _fastest_for_any_filter(device, dtype), "the sequence is longer than the filters"
    elif not smooth_tail:
        name, reason = _fastest_for_any_filter(device, dtype), "the filters do not end in exponentials"
    else:
        name, reason = _fastest_for_exponentials(device, dtype, x.shape[1])
    _explain_once(device, str(dtype).removeprefix("torch."), name, reason)
    return name


def _fastest_for_exponentials(device: str, dtype: torch.dtype, tokens: int) -> tuple[str, str]:
    """Returns the back end for filters that end in exponentials, and the reason."""
    case = device, dtype
    if case in _FASTEST:
        least, name = [row for row in _FASTEST[case] if row[0] <= tokens][-1]
        return name, f"the fastest measured from {least} tokens on"
    if case in _TRITON_FROM and tokens >= _TRITON_FROM[case] and backends.why_not("triton") is None:
        return "triton", f"by an estimate the fastest from {_TRITON_FROM[case]} tokens on, not measured yet"
    return _fastest_for_any_filter(device, dtype), "nothing was measured there"


@torch.compiler.assume_constant_result  # logging would break the graph
def _explain_once(device: str, dtype: str, name: str, reason: str) -> None:
    case = (device, dtype, name, reason)
    if case not in _explained:
        _explained.add(case)
        _log.debug("convolution on %s in %s: %s, %s", *case)
