"""Causal convolution along the sequence, one filter per channel.

Back ends: `direct` (a sum over lags: the oracle), `fft` (everywhere) and `flashfftconv` (CUDA, optional). A dilated
filter has taps at every `dilation`-th lag only; the sequence then falls apart into `dilation` interleaved ones, which
convolve independently at that fraction of the length. An STU with shared branches is exactly that with dilation 2 (the
polyphase form). Dilation is an argument and is never guessed from zeros in the filter: a tap that happens to be zero
still has a gradient.
"""

import torch
from torch.nn.functional import pad

from flash_stu.errors import UserError
from flash_stu.ops import backends
from flash_stu.ops.kept import kept_op

BACKENDS = ("auto", "direct", "fft", "flashfftconv")
_BLOCK = 64  # channels transformed at once on a CPU


def causal_conv(x: torch.Tensor, filters: torch.Tensor, backend: str = "auto", dilation: int = 1) -> torch.Tensor:
    """Convolve each channel with its own filter: y[t] = sum_j filters[j] * x[t - dilation * j].

    Args:
        x: inputs, (batch, length, channels), any floating dtype.
        filters: taps, (taps, channels); taps beyond the length are ignored, missing ones are zero.
        backend: one of BACKENDS; "auto" takes flashfftconv for bf16 and fp16 on a GPU that has it, else fft.
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
    run = _BACKENDS[choose(backend, x)]
    batch, length, channels = x.shape
    if length == 0:
        return x
    phases = pad(x, (0, 0, 0, -length % dilation)).unflatten(1, (-1, dilation))
    y = run(phases, filters[: phases.shape[1]])
    return y.reshape(batch, -1, channels)[:, :length]


def choose(backend: str, x: torch.Tensor) -> str:
    """The back end in use for inputs like x."""
    if backend not in BACKENDS:
        raise UserError(f"convolution back end is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "auto":
        half = x.dtype in (torch.bfloat16, torch.float16)
        return "flashfftconv" if half and x.is_cuda and backends.why_not("flashfftconv") is None else "fft"
    if backend == "flashfftconv":
        backends.require("convolution", backend)
    return backend


# The functions below convolve along axis 1 of x (batch, length, phases, channels): `phases` interleaved sequences.


def direct_conv(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """The definition, one lag at a time; filters (taps, channels) with at most as many taps as the length."""
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs, taps = x.to(wide), filters.to(wide)
    y = torch.zeros_like(inputs)
    for lag in range(taps.shape[0]):
        y = y + pad(inputs[:, : x.shape[1] - lag], (0, 0, 0, 0, lag, 0)) * taps[lag]
    return y.to(x.dtype)


def fft_conv(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """The same through real FFTs, padded so that nothing wraps around.

    One differentiable operator, so that torch.compile sees a single node and no complex arithmetic.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.ops.flash_stu.fft_conv(x.to(wide), filters.to(wide)).to(x.dtype)


def _fft_size(length: int, taps: int) -> int:
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
    """Undo _time_last."""
    batch, phases, channels, length = x.shape
    result = x.new_empty(batch, length, phases * channels)
    for to, of in zip(result, x.flatten(1, 2), strict=True):
        to.copy_(of.t())
    return result.view(batch, length, phases, channels)


def _blocks(x: torch.Tensor) -> list[slice]:
    """Channels whose spectra are held at once: on a CPU so few that they stay in the caches."""
    size = x.shape[-1] if x.is_cuda else _BLOCK
    return [slice(start, start + size) for start in range(0, x.shape[-1], size)]


@kept_op("flash_stu::fft_conv")
def _fft_conv(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    size, signal, taps = _fft_size(x.shape[1], filters.shape[0]), _time_last(x), filters.t().contiguous()
    for block in _blocks(x):
        part = signal[:, :, block]
        spectrum = torch.fft.rfft(part, n=size).mul_(torch.fft.rfft(taps[block], n=size))
        part.copy_(torch.fft.irfft(spectrum, n=size)[..., : x.shape[1]])
    return _time_first(signal)


@_fft_conv.register_fake
def _(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("flash_stu::fft_conv_backward", mutates_args=())
def _fft_conv_backward(grad: torch.Tensor, x: torch.Tensor, filters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The spectra are computed again rather than kept: a layer then holds its inputs, not four times their size.
    size, signal, taps = _fft_size(x.shape[1], filters.shape[0]), _time_last(x), filters.t().contiguous()
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
def _(grad: torch.Tensor, x: torch.Tensor, filters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(filters, memory_format=torch.contiguous_format),
    )


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.flash_stu.fft_conv_backward(grad, *ctx.saved_tensors)


_fft_conv.register_autograd(_differentiate, setup_context=_save_inputs)


def flash_fft_conv(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """The same through FlashFFTConv's fused CUDA kernels (Fu et al. 2023, arXiv 2311.05908), for bf16 and fp16.

    Its FFT sizes are powers of two from 256 on; twice the padded length keeps the convolution from wrapping around.
    """
    from flashfftconv import FlashFFTConv

    batch, length, phases, channels = x.shape
    padded = max(128, 1 << (length - 1).bit_length())
    key = (2 * padded, x.dtype, x.device)
    if key not in _FLASH_FFT_PLANS:
        _FLASH_FFT_PLANS[key] = FlashFFTConv(2 * padded, dtype=x.dtype).to(x.device)
    signal = pad(x.movedim(1, -1).flatten(0, 1), (0, padded - length)).contiguous()
    taps = pad(filters.float().t(), (0, padded - filters.shape[0])).contiguous()
    y = _FLASH_FFT_PLANS[key](signal, taps)[..., :length]
    return y.unflatten(0, (batch, phases)).movedim(-1, 1)


_FLASH_FFT_PLANS: dict = {}
_BACKENDS = {"direct": direct_conv, "fft": fft_conv, "flashfftconv": flash_fft_conv}
