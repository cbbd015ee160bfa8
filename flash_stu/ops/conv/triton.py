"""The chunked convolution of flash_stu.ops.conv.chunked as Triton kernels: one forward, one for all gradients.

One program takes one phase of one sequence and a block of channels, and goes through the chunks in order (backward: in
reverse) with the far states in registers: inputs are read, outputs written, and no state goes through memory. All
products are on the tensor cores. Far lags are products of a chunk with the exponentials, which all channels share.
Near lags have a Toeplitz matrix of their own for every channel; but all of those are combinations of the features'
matrices, so that a chunk is multiplied by each of these and the channels' weights are applied to the results. That is
the STU's definition read literally, and keeps 64 shifted loads and multiply-adds per output off the slow path.

In bf16 and fp16 the factors of the products are rounded to that dtype; it costs no more than their rounding if the
readout is that of flash_stu.filters.exponentials, whose terms do not cancel. Sums are float32.

Import this module only where flash_stu.ops.backends accepts "triton". With TRITON_INTERPRET=1 it runs on a CPU.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from flash_stu.errors import UserError
from flash_stu.ops.conv.chunked import chunk_maps
from flash_stu.ops.kept import kept_op

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Fewest instructions for an H100 among those tried that spill no registers, at 24 features in bf16; not yet timed.
_CHANNELS = 64  # in a block
_WARPS = 4
_UNROLL = tl.constexpr(4)  # features


def triton_conv(
    x: torch.Tensor,
    near: torch.Tensor,
    weights: torch.Tensor,
    decay: torch.Tensor,
    readout: torch.Tensor,
    dilation: int = 1,
) -> torch.Tensor:
    """As chunked_conv with the taps near @ weights and without a state.

    Args:
        x: inputs, (batch, length, channels), float32, bf16 or fp16.
        near: constant features at lags 0 .. 2 chunk - 1, (2 * chunk, features), the chunk a power of two from 16 on.
        weights: (features, channels).
        decay: constants in (-1, 1), (states,); they get no gradient, nor does `near`.
        readout: weights of the exponentials from lag chunk + 1 on, (states, channels).
        dilation: distance between lags, in tokens.

    Returns:
        outputs (batch, length, channels) in x's dtype.

    Raises:
        UserError: for shapes that do not fit together, a dtype or a chunk length that the kernels do not take.
    """
    _check(x, near, weights, decay, readout)
    if x.numel() == 0:
        return x
    return torch.ops.flash_stu.triton_conv(x, near.float(), weights.float(), decay.double(), readout.float(), dilation)


def _check(
    x: torch.Tensor, near: torch.Tensor, weights: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor
) -> None:
    channels, features = x.shape[-1], near.shape[-1]
    if x.ndim != 3 or weights.shape != (features, channels) or readout.shape != (len(decay), channels):
        raise UserError(
            f"triton_conv takes x (batch, length, channels), near (2 chunk, features), weights (features, channels), "
            f"decay (states,) and readout (states, channels); got {tuple(x.shape)}, {tuple(near.shape)}, "
            f"{tuple(weights.shape)}, {tuple(decay.shape)} and {tuple(readout.shape)}"
        )
    if decay.requires_grad or near.requires_grad:
        raise UserError("triton_conv gives its decays and features no gradient")
    if x.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise UserError(f"convolution back end 'triton' got {x.dtype}; allowed: {allowed}")
    chunk = near.shape[0] / 2
    if chunk < 16 or int(chunk) & (int(chunk) - 1) or chunk % 1:
        raise UserError(f"convolution back end 'triton' got chunks of {chunk:g}; allowed: powers of two from 16 on")


@triton.jit
def _tile(
    pointer: tl.tensor,
    steps: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    channels: tl.tensor,
    columns: tl.tensor,
    step_stride: tl.tensor,
) -> tl.tensor:
    """Rows `steps` of a phase, zero outside of [first, stop)."""
    mask = ((steps >= first) & (steps < stop))[:, None] & (columns < channels)[None, :]
    return tl.load(pointer + steps[:, None].to(tl.int64) * step_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _forward_kernel(
    x: tl.tensor,
    y: tl.tensor,
    bands: tl.tensor,
    weights: tl.tensor,
    into: tl.tensor,
    out_of: tl.tensor,
    over: tl.tensor,
    readout: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    dilation: tl.tensor,
    CHUNK: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTOR: tl.constexpr,
    FEATURES: tl.constexpr,
) -> None:
    row, phase = tl.program_id(0) // dilation, tl.program_id(0) % dilation
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < channels
    times, span, states = tl.arange(0, CHUNK), tl.arange(0, 2 * CHUNK), tl.arange(0, STATES)
    start = (row.to(tl.int64) * length + phase) * channels
    x, y = x + start, y + start
    stride = dilation * channels
    stop = (length - phase + dilation - 1) // dilation  # steps of this phase

    entry = times[:, None] * 2 * CHUNK + span[None, :]  # of a feature's band
    enter = tl.load(into + times[None, :] * STATES + states[:, None]).to(FACTOR)  # (states, chunk)
    leave = tl.load(out_of + states[None, :] * CHUNK + times[:, None]).to(FACTOR)  # (chunk, states)
    carry = tl.load(over + states)[:, None]
    ahead = tl.load(readout + states[:, None] * channels + columns[None, :], mask=inside[None, :], other=0.0)
    z = tl.zeros((STATES, BLOCK), dtype=tl.float32)
    for begin in range(0, stop, CHUNK):
        window = _tile(x, begin - CHUNK + span, 0, stop, channels, columns, stride).to(FACTOR)
        total = tl.dot(leave, (ahead * z).to(FACTOR), input_precision=PRECISION)
        for feature in tl.range(0, FEATURES, loop_unroll_factor=_UNROLL):
            band = tl.load(bands + feature * 2 * CHUNK * CHUNK + entry)
            weight = tl.load(weights + feature * channels + columns, mask=inside, other=0.0)
            total += tl.dot(band, window, input_precision=PRECISION) * weight[None, :]
        steps = begin + times
        mask = (steps < stop)[:, None] & inside[None, :]
        rows = y + steps[:, None].to(tl.int64) * stride
        tl.store(rows + columns[None, :], total.to(y.dtype.element_ty), mask=mask)
        earlier = _tile(x, steps - CHUNK, 0, stop, channels, columns, stride).to(FACTOR)
        z = z * carry + tl.dot(enter, earlier, input_precision=PRECISION)


@triton.jit
def _backward_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    grad_x: tl.tensor,
    grad_weights: tl.tensor,
    grad_readout: tl.tensor,
    bands: tl.tensor,
    weights: tl.tensor,
    into: tl.tensor,
    out_of: tl.tensor,
    over: tl.tensor,
    readout: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    dilation: tl.tensor,
    CHUNK: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTOR: tl.constexpr,
    FEATURES: tl.constexpr,
    KINDS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    row, phase = program // dilation, program % dilation
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < channels
    times, span, states = tl.arange(0, CHUNK), tl.arange(0, 2 * CHUNK), tl.arange(0, STATES)
    kinds = tl.arange(0, KINDS)
    start = (row.to(tl.int64) * length + phase) * channels
    x, grad, grad_x = x + start, grad + start, grad_x + start
    stride = dilation * channels
    stop = (length - phase + dilation - 1) // dilation

    entry = times[:, None] * 2 * CHUNK + span[None, :]
    enter = tl.load(into + times[:, None] * STATES + states[None, :]).to(FACTOR)  # (chunk, states)
    leave = tl.load(out_of + states[:, None] * CHUNK + times[None, :]).to(FACTOR)  # (states, chunk)
    carry = tl.load(over + states)[:, None]
    ahead = tl.load(readout + states[:, None] * channels + columns[None, :], mask=inside[None, :], other=0.0)
    # the gradient of the states from the outputs two chunks later and on, before the readout
    q = tl.zeros((STATES, BLOCK), dtype=tl.float32)
    to_readout = tl.zeros((STATES, BLOCK), dtype=tl.float32)
    to_weights = tl.zeros((KINDS, BLOCK), dtype=tl.float32)
    chunks = (stop + CHUNK - 1) // CHUNK
    for index in range(0, chunks):
        begin = (chunks - 1 - index) * CHUNK
        steps = begin + times
        own = _tile(x, steps, 0, stop, channels, columns, stride)
        window = _tile(grad, begin + span, 0, stop, channels, columns, stride).to(FACTOR)
        total = tl.dot(enter, (ahead * q).to(FACTOR), input_precision=PRECISION)
        for feature in tl.range(0, FEATURES, loop_unroll_factor=_UNROLL):
            band = tl.load(bands + feature * 2 * CHUNK * CHUNK + entry)
            weight = tl.load(weights + feature * channels + columns, mask=inside, other=0.0)
            asked = tl.dot(band, window, input_precision=PRECISION)  # the inputs' gradient from this feature's outputs
            total += asked * weight[None, :]
            share = tl.sum(asked * own.to(tl.float32), axis=0)
            to_weights += tl.where(kinds[:, None] == feature, share[None, :], 0.0)
        mask = (steps < stop)[:, None] & inside[None, :]
        rows = grad_x + steps[:, None].to(tl.int64) * stride
        tl.store(rows + columns[None, :], total.to(grad_x.dtype.element_ty), mask=mask)

        to_readout += q * tl.dot(tl.trans(enter), own.to(FACTOR), input_precision=PRECISION)
        later = _tile(grad, steps + CHUNK, 0, stop, channels, columns, stride).to(FACTOR)
        q = q * carry + tl.dot(leave, later, input_precision=PRECISION)

    # every program writes a share of its own, so that the sum does not depend on who came first
    share = grad_weights + program.to(tl.int64) * FEATURES * channels
    mask = (kinds < FEATURES)[:, None] & inside[None, :]
    tl.store(share + kinds[:, None] * channels + columns[None, :], to_weights, mask=mask)
    share = grad_readout + program.to(tl.int64) * STATES * channels
    tl.store(share + states[:, None] * channels + columns[None, :], to_readout, mask=inside[None, :])


def _bands(near: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns every feature's matrices (features, chunk, 2 chunk) twice: from the inputs of the chunk before and the
    own one to outputs, and back from the outputs of the own chunk and the next to inputs."""
    chunk = near.shape[0] // 2
    taps = pad(near.t(), (2 * chunk, 2 * chunk)).to(dtype)  # [2 chunk + lag]
    times, span = torch.arange(chunk, device=near.device)[:, None], torch.arange(2 * chunk, device=near.device)
    return taps[:, 2 * chunk + times + chunk - span].contiguous(), taps[:, 2 * chunk + span - times].contiguous()


class _Launch(NamedTuple):
    """Arguments that the two kernels share.

    Attributes:
        bands: matrices of the forward and the backward pass, see _bands.
        constants: weights, the maps of chunk_maps and the readout, with as many states as a power of two has.
        grid: programs of a launch.
        options: constants that the kernels are compiled for.
    """

    bands: tuple[torch.Tensor, torch.Tensor]
    constants: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    grid: tuple[int, int]
    options: dict[str, Any]

    def run(self, kernel: Any, *operands: Any, **options: Any) -> None:
        kernel[self.grid](*operands, **self.options, **options)


def _prepare(
    x: torch.Tensor,
    near: torch.Tensor,
    weights: torch.Tensor,
    decay: torch.Tensor,
    readout: torch.Tensor,
    dilation: int,
) -> _Launch:
    chunk, channels = near.shape[0] // 2, x.shape[-1]
    states = max(_next_power_of_2(len(decay)), 16)
    missing = states - len(decay)
    maps = chunk_maps(pad(decay, (0, missing)), chunk, torch.float32)
    # the interpreter would multiply bf16 numbers as the integers that they are stored in
    factor = torch.float32 if x.dtype == torch.bfloat16 and not x.is_cuda else x.dtype
    options = {
        "CHUNK": chunk,
        "STATES": states,
        "BLOCK": _CHANNELS,
        "FEATURES": near.shape[1],
        "FACTOR": _DTYPES[factor],
        "PRECISION": "tf32x3",  # read for float32 only
        "num_warps": _WARPS,
        "num_stages": 2,
    }
    return _Launch(
        _bands(near, factor),
        (weights.contiguous(), *maps, pad(readout, (0, 0, 0, missing)).contiguous()),
        (x.shape[0] * dilation, -(-channels // _CHANNELS)),
        options,
    )


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@kept_op("flash_stu::triton_conv")
def _conv(
    x: torch.Tensor,
    near: torch.Tensor,
    weights: torch.Tensor,
    decay: torch.Tensor,
    readout: torch.Tensor,
    dilation: int,
) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    launch = _prepare(x, near, weights, decay, readout, dilation)
    launch.run(_forward_kernel, x, y, launch.bands[0], *launch.constants, *x.shape[1:], dilation)
    return y


@_conv.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("flash_stu::triton_conv_backward", mutates_args=())
def _conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    near: torch.Tensor,
    weights: torch.Tensor,
    decay: torch.Tensor,
    readout: torch.Tensor,
    dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    launch = _prepare(x, near, weights, decay, readout, dilation)
    to_weights = weights.new_empty((launch.grid[0], *weights.shape))
    to_readout = weights.new_empty((launch.grid[0], launch.options["STATES"], x.shape[2]))
    results = (grad_x, to_weights, to_readout)
    operands = (grad, x, *results, launch.bands[1], *launch.constants, *x.shape[1:], dilation)
    launch.run(_backward_kernel, *operands, KINDS=_next_power_of_2(near.shape[1]))
    return grad_x, to_weights.sum(dim=0), to_readout.sum(dim=0)[: len(decay)].clone()


@_conv_backward.register_fake
def _(*operands: Any) -> tuple[torch.Tensor, ...]:
    _, x, _, weights, _, readout, _ = operands
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weights, readout))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    *tensors, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    to_x, to_weights, to_readout = torch.ops.flash_stu.triton_conv_backward(grad, *ctx.saved_tensors, ctx.dilation)
    return to_x, None, to_weights, None, to_readout, None


_conv.register_autograd(_differentiate, setup_context=_save_inputs)
