"""The chunked convolution of flash_stu.ops.chunked_conv as Triton kernels: one forward, one for all gradients.

One program takes one phase of one sequence and a block of channels, and goes through the chunks in order (backward: in
reverse) with the far states in registers: inputs are read, outputs written, and no state goes through memory. Near lags
are multiply-adds over shifted loads of the two chunks in the first-level cache; far ones are products of a chunk with
the exponentials, which all channels share, on the tensor cores. In bf16 and fp16 the factors of those products are
rounded to that dtype; it costs no more than their rounding if the weights are those of flash_stu.ops.exponentials,
whose terms do not cancel. Sums are float32.

Import this module only where flash_stu.backends has no objection to "triton". With TRITON_INTERPRET=1 it runs on a CPU.
"""

import torch
import triton
import triton.language as tl

from flash_stu.errors import UserError
from flash_stu.ops.chunked_conv import check_arguments, exponentials

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_CHANNELS = 32  # in a block
_WARPS = 4


def triton_conv(
    x: torch.Tensor, taps: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, dilation: int = 1
) -> torch.Tensor:
    """Convolve each channel with its own filter; arguments and result as chunked_conv's, without a state.

    Args:
        x: inputs, (batch, length, channels), float32, bf16 or fp16.
        taps: (2 * chunk, channels), the chunk a power of two from 16 on.
        decay: constants in (-1, 1), (states,); they get no gradient.
        readout: (states, channels).
        dilation: distance between lags, in tokens.

    Returns:
        outputs (batch, length, channels) in x's dtype.

    Raises:
        UserError: for shapes that do not fit together, a dtype or a chunk length that the kernels do not take.
    """
    check_arguments(x, taps, decay, readout)
    chunk = taps.shape[0] // 2
    if x.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise UserError(f"convolution back end 'triton' got {x.dtype}; allowed: {allowed}")
    if chunk < 16 or chunk & (chunk - 1):
        raise UserError(f"convolution back end 'triton' got chunks of {chunk}; allowed: powers of two from 16 on")
    if x.numel() == 0:
        return x
    return torch.ops.flash_stu.triton_conv(x, taps.float(), decay.double(), readout.float(), dilation)


@triton.jit
def _tile(pointer, steps, first, stop, channels, columns, step_stride):
    """Rows `steps` of a phase, zero outside of [first, stop)."""
    mask = ((steps >= first) & (steps < stop))[:, None] & (columns < channels)[None, :]
    return tl.load(pointer + steps[:, None].to(tl.int64) * step_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _forward_kernel(
    x, y, taps, into, out_of, over, readout, length, channels, dilation,
    CHUNK: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    row, phase = tl.program_id(0) // dilation, tl.program_id(0) % dilation
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < channels
    times, states = tl.arange(0, CHUNK), tl.arange(0, STATES)
    start = (row.to(tl.int64) * length + phase) * channels
    x, y = x + start, y + start
    stride = dilation * channels
    stop = (length - phase + dilation - 1) // dilation  # steps of this phase

    enter = tl.load(into + times[None, :] * STATES + states[:, None]).to(FACTOR)  # (states, chunk)
    leave = tl.load(out_of + states[None, :] * CHUNK + times[:, None]).to(FACTOR)  # (chunk, states)
    carry = tl.load(over + states)[:, None]
    weights = tl.load(readout + states[:, None] * channels + columns[None, :], mask=inside[None, :], other=0.0)
    z = tl.zeros((STATES, BLOCK), dtype=tl.float32)
    for begin in range(0, stop, CHUNK):
        steps = begin + times
        before = tl.maximum(begin - CHUNK, 0)
        total = tl.dot(leave, (weights * z).to(FACTOR), input_precision=PRECISION)
        for lag in range(0, 2 * CHUNK):
            tap = tl.load(taps + lag * channels + columns, mask=inside, other=0.0)
            total += _tile(x, steps - lag, before, stop, channels, columns, stride).to(tl.float32) * tap[None, :]
        mask = (steps < stop)[:, None] & inside[None, :]
        rows = y + steps[:, None].to(tl.int64) * stride
        tl.store(rows + columns[None, :], total.to(y.dtype.element_ty), mask=mask)
        earlier = _tile(x, steps - CHUNK, before, stop, channels, columns, stride)
        z = z * carry + tl.dot(enter, earlier.to(FACTOR), input_precision=PRECISION)


@triton.jit
def _backward_kernel(
    grad, x, grad_x, grad_taps, grad_readout, taps, into, out_of, over, readout, length, channels, dilation,
    CHUNK: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, phase = program // dilation, program % dilation
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < channels
    times, states, lags = tl.arange(0, CHUNK), tl.arange(0, STATES), tl.arange(0, 2 * CHUNK)
    start = (row.to(tl.int64) * length + phase) * channels
    x, grad, grad_x = x + start, grad + start, grad_x + start
    stride = dilation * channels
    stop = (length - phase + dilation - 1) // dilation

    enter = tl.load(into + times[:, None] * STATES + states[None, :]).to(FACTOR)  # (chunk, states)
    leave = tl.load(out_of + states[:, None] * CHUNK + times[None, :]).to(FACTOR)  # (states, chunk)
    carry = tl.load(over + states)[:, None]
    weights = tl.load(readout + states[:, None] * channels + columns[None, :], mask=inside[None, :], other=0.0)
    # what the outputs from two chunks later on ask of the states, before the weights
    q = tl.zeros((STATES, BLOCK), dtype=tl.float32)
    to_weights = tl.zeros((STATES, BLOCK), dtype=tl.float32)
    to_taps = tl.zeros((2 * CHUNK, BLOCK), dtype=tl.float32)
    chunks = (stop + CHUNK - 1) // CHUNK
    for index in range(0, chunks):
        begin = (chunks - 1 - index) * CHUNK
        steps = begin + times
        end = tl.minimum(begin + 2 * CHUNK, stop)
        total = tl.dot(enter, (weights * q).to(FACTOR), input_precision=PRECISION)
        for lag in range(0, 2 * CHUNK):
            tap = tl.load(taps + lag * channels + columns, mask=inside, other=0.0)
            total += _tile(grad, steps + lag, begin, end, channels, columns, stride).to(tl.float32) * tap[None, :]
        mask = (steps < stop)[:, None] & inside[None, :]
        rows = grad_x + steps[:, None].to(tl.int64) * stride
        tl.store(rows + columns[None, :], total.to(grad_x.dtype.element_ty), mask=mask)

        before = tl.maximum(begin - CHUNK, 0)
        for time in range(0, CHUNK):
            step = begin + time + tl.zeros((1,), dtype=tl.int32)
            g = _tile(grad, step, begin, stop, channels, columns, stride).to(tl.float32)
            to_taps += _tile(x, step - lags, before, stop, channels, columns, stride).to(tl.float32) * g

        own = _tile(x, steps, begin, stop, channels, columns, stride)
        to_weights += q * tl.dot(tl.trans(enter), own.to(FACTOR), input_precision=PRECISION)
        later = _tile(grad, steps + CHUNK, begin, stop, channels, columns, stride)
        q = q * carry + tl.dot(leave, later.to(FACTOR), input_precision=PRECISION)

    # every program writes a share of its own, so that the sum does not depend on who came first
    share = grad_taps + program.to(tl.int64) * 2 * CHUNK * channels
    tl.store(share + lags[:, None] * channels + columns[None, :], to_taps, mask=inside[None, :])
    share = grad_readout + program.to(tl.int64) * STATES * channels
    tl.store(share + states[:, None] * channels + columns[None, :], to_weights, mask=inside[None, :])


def _prepare(x: torch.Tensor, taps: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, dilation: int):
    """The constants with as many states as a power of two has, the grid, and what the kernels are compiled for."""
    chunk, channels = taps.shape[0] // 2, x.shape[-1]
    states = max(triton.next_power_of_2(len(decay)), 16)
    missing = states - len(decay)
    decay = torch.nn.functional.pad(decay, (0, missing))
    readout = torch.nn.functional.pad(readout, (0, 0, 0, missing)).contiguous()
    constants = (taps.contiguous(), *exponentials(decay, chunk, torch.float32), readout)
    grid = (x.shape[0] * dilation, triton.cdiv(channels, _CHANNELS))
    # the interpreter would multiply bf16 numbers as the integers that they are stored in
    factor = torch.float32 if x.dtype == torch.bfloat16 and not x.is_cuda else x.dtype
    options = {"CHUNK": chunk, "STATES": states, "BLOCK": _CHANNELS, "num_warps": _WARPS}
    options |= {"FACTOR": _DTYPES[factor], "PRECISION": "tf32x3"}  # the precision is read for float32 only
    return constants, grid, options


@torch.library.custom_op("flash_stu::triton_conv", mutates_args=())
def _conv(
    x: torch.Tensor, taps: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, dilation: int
) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    constants, grid, options = _prepare(x, taps, decay, readout, dilation)
    _forward_kernel[grid](x, y, *constants, x.shape[1], x.shape[2], dilation, **options)
    return y


@_conv.register_fake
def _(x, taps, decay, readout, dilation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("flash_stu::triton_conv_backward", mutates_args=())
def _conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    taps: torch.Tensor,
    decay: torch.Tensor,
    readout: torch.Tensor,
    dilation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    constants, grid, options = _prepare(x, taps, decay, readout, dilation)
    to_taps = taps.new_empty((grid[0], *taps.shape))
    to_readout = taps.new_empty((grid[0], options["STATES"], x.shape[2]))
    _backward_kernel[grid](
        grad, x, grad_x, to_taps, to_readout, *constants, x.shape[1], x.shape[2], dilation, **options
    )
    return grad_x, to_taps.sum(dim=0), to_readout.sum(dim=0)[: len(decay)].clone()


@_conv_backward.register_fake
def _(grad, x, taps, decay, readout, dilation):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, taps, readout))


def _save_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad: torch.Tensor):
    to_x, to_taps, to_readout = torch.ops.flash_stu.triton_conv_backward(grad, *ctx.saved_tensors, ctx.dilation)
    return to_x, to_taps, None, to_readout, None


_conv.register_autograd(_differentiate, setup_context=_save_inputs)
