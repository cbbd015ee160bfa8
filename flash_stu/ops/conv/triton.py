"""The chunked convolution of flash_stu.ops.conv.chunked as Triton kernels.

A sequence is cut into segments of whole chunks, one program for each, so that a launch fills a GPU whatever the batch:

1. `_ends_kernel`: the far states that each segment alone gives to the next, which need no other segment;
2. `_outputs_kernel`: the states before the segment, a sum over the earlier ends; then its outputs, chunk by chunk with
   the states in registers. Near lags are sums of shifted rows in float32, far lags products on the tensor cores.

The gradient of the inputs is the same convolution of the outputs' gradient with time reversed, so the same two kernels
compute it. The other two are correlations: `_tap_gradient_kernel` for the near lags, `_readout_gradient_kernel` for the
states. Every program writes a share of its own, so that the sum does not depend on who came first.

In bf16 and fp16 the factors of the far lags' products are rounded to that dtype; it costs no more than their rounding
if the readout is that of flash_stu.filters.exponentials, whose terms do not cancel. Sums are float32.

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
# Chosen by counting registers and instructions of kernels compiled for an H100; not timed yet.
_CHANNELS = 32  # in a block
_STATES = 32  # in a block, where states need not be summed
_TIMES = tl.constexpr(8)  # steps at once in the taps' gradient
_UNROLL = tl.constexpr(4)  # lags
_WARPS = 32  # of a launch for each multiprocessor, if the sequence is long enough
_CHUNKS = 8  # in a segment, at least


def triton_conv(
    x: torch.Tensor, taps: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, dilation: int = 1
) -> torch.Tensor:
    """As chunked_conv without a state.

    Args:
        x: inputs, (batch, length, channels), float32, bf16 or fp16.
        taps: the filter's near lags, (2 * chunk, channels), the chunk a power of two from 16 on.
        decay: constants in (-1, 1), (states,); they get no gradient.
        readout: weights of the exponentials from lag chunk + 1 on, (states, channels).
        dilation: distance between lags, in tokens.

    Returns:
        outputs (batch, length, channels) in x's dtype.

    Raises:
        UserError: for shapes that do not fit together, a dtype or a chunk length that the kernels do not take.
    """
    _check(x, taps, decay, readout)
    if x.numel() == 0:
        return x
    return torch.ops.flash_stu.triton_conv(x, taps.float(), decay.double(), readout.float(), dilation)


def _check(x: torch.Tensor, taps: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor) -> None:
    channels = x.shape[-1]
    if x.ndim != 3 or taps.ndim != 2 or taps.shape[1] != channels or readout.shape != (len(decay), channels):
        raise UserError(
            f"triton_conv takes x (batch, length, channels), taps (2 chunk, channels), decay (states,) and readout "
            f"(states, channels); got {tuple(x.shape)}, {tuple(taps.shape)}, {tuple(decay.shape)} and "
            f"{tuple(readout.shape)}"
        )
    if decay.requires_grad:
        raise UserError("triton_conv gives its decays no gradient")
    if x.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise UserError(f"convolution back end 'triton' got {x.dtype}; allowed: {allowed}")
    chunk = taps.shape[0] / 2
    if chunk < 16 or int(chunk) & (int(chunk) - 1) or chunk % 1:
        raise UserError(f"convolution back end 'triton' got chunks of {chunk:g}; allowed: powers of two from 16 on")


@triton.jit
def _place(
    length: tl.tensor, channels: tl.tensor, dilation: tl.tensor, sequences: tl.tensor, BLOCK: tl.constexpr
) -> tuple:
    """Returns which channels, sequence (a phase of a row of the batch) and segment are this program's; and of the
    sequence the offset of its first step, the distance of its steps and their number."""
    blocks = (channels + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    sequence, segment = program // blocks % sequences, program // blocks // sequences
    row, phase = sequence // dilation, sequence % dilation
    start = (row.to(tl.int64) * length + phase) * channels
    return columns, sequence, segment, start, dilation * channels, (length - phase + dilation - 1) // dilation


@triton.jit
def _steps(
    pointer: tl.tensor,
    begin: tl.tensor,
    times: tl.tensor,
    stop: tl.tensor,
    stride: tl.tensor,
    columns: tl.tensor,
    channels: tl.tensor,
) -> tl.tensor:
    """Loads the steps begin + times of a sequence, (times, columns), zero outside of [0, stop)."""
    known = (begin + times >= 0) & (begin + times < stop)
    mask = known[:, None] & (columns < channels)[None, :]
    return tl.load(
        pointer + begin.to(tl.int64) * stride + (times[:, None] * stride + columns[None, :]), mask=mask, other=0.0
    )


@triton.jit
def _states_before(
    ends: tl.tensor,
    across: tl.tensor,
    sequence: tl.tensor,
    segment: tl.tensor,
    sequences: tl.tensor,
    states: tl.tensor,
    columns: tl.tensor,
    channels: tl.tensor,
    STATES: tl.constexpr,
) -> tl.tensor:
    """Returns the states before a segment, (states, columns), from what each earlier one gives."""
    carry = tl.load(across + states)[:, None]
    mask = (columns < channels)[None, :]
    z = carry * tl.zeros_like(columns)[None, :].to(tl.float32)
    for earlier in range(segment):
        rows = ((earlier * sequences + sequence).to(tl.int64) * STATES + states) * channels
        z = z * carry + tl.load(ends + rows[:, None] + columns[None, :], mask=mask, other=0.0)
    return z


@triton.jit
def _ends_kernel(
    x: tl.tensor,
    ends: tl.tensor,
    into: tl.tensor,
    over: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    dilation: tl.tensor,
    sequences: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    STATES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTOR: tl.constexpr,
    REVERSE: tl.constexpr,
) -> None:
    place = _place(length, channels, dilation, sequences, BLOCK)
    columns, sequence, segment, start, stride, stop = place
    if REVERSE:
        start += (stop - 1) * stride
        stride = -stride
    times, states = tl.arange(0, CHUNK), tl.program_id(1) * TILE + tl.arange(0, TILE)
    enter = tl.load(into + times[None, :] * STATES + states[:, None]).to(FACTOR)
    carry = tl.load(over + states)[:, None]
    z = tl.zeros((TILE, BLOCK), dtype=tl.float32)
    for index in range(chunks):  # the outputs of a chunk see the states of two chunks before
        begin = (segment * chunks + index - 1) * CHUNK
        earlier = _steps(x + start, begin, times, stop, stride, columns, channels).to(FACTOR)
        z = z * carry + tl.dot(enter, earlier, input_precision=PRECISION)
    rows = ((segment * sequences + sequence).to(tl.int64) * STATES + states) * channels
    tl.store(ends + rows[:, None] + columns[None, :], z, mask=(columns < channels)[None, :])


@triton.jit
def _outputs_kernel(
    x: tl.tensor,
    y: tl.tensor,
    ends: tl.tensor,
    taps: tl.tensor,
    readout: tl.tensor,
    into: tl.tensor,
    out_of: tl.tensor,
    over: tl.tensor,
    across: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    dilation: tl.tensor,
    sequences: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTOR: tl.constexpr,
    REVERSE: tl.constexpr,
) -> None:
    place = _place(length, channels, dilation, sequences, BLOCK)
    columns, sequence, segment, start, stride, stop = place
    if REVERSE:
        start += (stop - 1) * stride
        stride = -stride
    x, y = x + start, y + start
    width = (channels + BLOCK - 1) // BLOCK * BLOCK  # of taps and readout
    times, states = tl.arange(0, CHUNK), tl.arange(0, STATES)
    enter = tl.load(into + times[None, :] * STATES + states[:, None]).to(FACTOR)  # (states, chunk)
    leave = tl.load(out_of + states[None, :] * CHUNK + times[:, None]).to(FACTOR)  # (chunk, states)
    carry = tl.load(over + states)[:, None]
    ahead = tl.load(readout + states[:, None] * width + columns[None, :])
    z = _states_before(ends, across, sequence, segment, sequences, states, columns, channels, STATES)
    inside = (columns < channels)[None, :]
    offsets = times[:, None] * stride + columns[None, :]
    origin = segment * chunks * CHUNK
    for done in range(0, tl.minimum(stop - origin, chunks * CHUNK), CHUNK):
        begin = origin + done
        near = tl.zeros((CHUNK, BLOCK), dtype=tl.float32)
        row, tap = x + begin.to(tl.int64) * stride, taps + columns
        first = -tl.minimum(begin, CHUNK)  # of the steps that are not in the states
        for lag in tl.range(0, 2 * CHUNK, loop_unroll_factor=_UNROLL):
            known = (times >= first + lag) & (times < stop - begin + lag)
            shifted = tl.load(row + offsets, mask=known[:, None] & inside, other=0.0)
            near += shifted.to(tl.float32) * tl.load(tap)[None, :]
            row -= stride
            tap += width
        total = near + tl.dot(leave, (ahead * z).to(FACTOR), input_precision=PRECISION)
        mask = (times < stop - begin)[:, None] & inside
        tl.store(y + begin.to(tl.int64) * stride + offsets, total.to(y.dtype.element_ty), mask=mask)
        earlier = _steps(x, begin - CHUNK, times, stop, stride, columns, channels).to(FACTOR)
        z = z * carry + tl.dot(enter, earlier, input_precision=PRECISION)


@triton.jit
def _tap_gradient_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    shares: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    dilation: tl.tensor,
    sequences: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    place = _place(length, channels, dilation, sequences, BLOCK)
    columns, sequence, segment, start, stride, stop = place
    x, grad = x + start, grad + start
    inside = columns < channels
    times, lags = tl.arange(0, _TIMES), tl.arange(0, 2 * CHUNK)
    before = times[None, :] - lags[:, None]
    offsets = before[:, :, None] * stride + columns[None, None, :]
    total = tl.zeros((2 * CHUNK, _TIMES, BLOCK), dtype=tl.float32)
    origin = segment * chunks * CHUNK
    for done in range(0, tl.minimum(stop - origin, chunks * CHUNK), _TIMES):
        begin = origin + done
        first = tl.maximum(begin // CHUNK * CHUNK - CHUNK, 0) - begin
        known = (before >= first) & (before < stop - begin)
        mask = known[:, :, None] & inside[None, None, :]
        shifted = tl.load(x + begin.to(tl.int64) * stride + offsets, mask=mask, other=0.0).to(tl.float32)
        total += shifted * _steps(grad, begin, times, stop, stride, columns, channels).to(tl.float32)[None, :, :]
    rows = ((segment * sequences + sequence).to(tl.int64) * 2 * CHUNK + lags) * channels
    tl.store(shares + rows[:, None] + columns[None, :], tl.sum(total, axis=1), mask=inside[None, :])


@triton.jit
def _readout_gradient_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    shares: tl.tensor,
    ends: tl.tensor,
    into: tl.tensor,
    out_of: tl.tensor,
    over: tl.tensor,
    across: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    dilation: tl.tensor,
    sequences: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    STATES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTOR: tl.constexpr,
) -> None:
    place = _place(length, channels, dilation, sequences, BLOCK)
    columns, sequence, segment, start, stride, stop = place
    x, grad = x + start, grad + start
    times, states = tl.arange(0, CHUNK), tl.program_id(1) * TILE + tl.arange(0, TILE)
    enter = tl.load(into + times[None, :] * STATES + states[:, None]).to(FACTOR)  # (states, chunk)
    leave = tl.load(out_of + states[:, None] * CHUNK + times[None, :]).to(FACTOR)  # (states, chunk)
    carry = tl.load(over + states)[:, None]
    z = _states_before(ends, across, sequence, segment, sequences, states, columns, channels, STATES)
    total = tl.zeros((TILE, BLOCK), dtype=tl.float32)
    origin = segment * chunks * CHUNK
    for done in range(0, tl.minimum(stop - origin, chunks * CHUNK), CHUNK):
        begin = origin + done
        own = _steps(grad, begin, times, stop, stride, columns, channels).to(FACTOR)
        total += z * tl.dot(leave, own, input_precision=PRECISION)
        earlier = _steps(x, begin - CHUNK, times, stop, stride, columns, channels).to(FACTOR)
        z = z * carry + tl.dot(enter, earlier, input_precision=PRECISION)
    rows = ((segment * sequences + sequence).to(tl.int64) * STATES + states) * channels
    tl.store(shares + rows[:, None] + columns[None, :], total, mask=(columns < channels)[None, :])


class _Launch(NamedTuple):
    """The sizes and constants that the kernels of one convolution share.

    Attributes:
        weights: taps and readout, with as many channels as whole blocks have; zero states make theirs a power of two.
        maps: of chunk_maps for those states, and their decay over a segment.
        sizes: length, channels, dilation, sequences, chunks in a segment.
        segments: of a sequence.
        programs: for a segment of all sequences.
        options: constants that the kernels are compiled for.
    """

    weights: tuple[torch.Tensor, torch.Tensor]
    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    sizes: tuple[int, int, int, int, int]
    segments: int
    programs: int
    options: dict[str, Any]

    @classmethod
    def of(
        cls, x: torch.Tensor, taps: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, dilation: int
    ) -> "_Launch":
        batch, length, channels = x.shape
        chunk, sequences, blocks = taps.shape[0] // 2, batch * dilation, _ceil_div(channels, _CHANNELS)
        states = max(1 << (len(decay) - 1).bit_length(), 16)
        number = _ceil_div(length, dilation * chunk)
        warps = blocks * sequences * warps_of("_outputs_kernel", states)
        chunks = _ceil_div(number, _count_segments(_multiprocessors(x.device), warps, number))
        decay = pad(decay, (0, states - len(decay)))
        missing = blocks * _CHANNELS - channels
        # the interpreter would multiply bf16 numbers as the integers that they are stored in
        factor = torch.float32 if x.dtype == torch.bfloat16 and not x.is_cuda else x.dtype
        options = {
            "CHUNK": chunk,
            "STATES": states,
            "TILE": min(states, _STATES),
            "BLOCK": _CHANNELS,
            "FACTOR": _DTYPES[factor],
            "PRECISION": "tf32x3",  # read for float32 only
        }
        return cls(
            (pad(taps, (0, missing)).contiguous(), pad(readout, (0, missing, 0, states - len(readout))).contiguous()),
            (*chunk_maps(decay, chunk, torch.float32), (decay ** (chunk * chunks)).float()),
            (length, channels, dilation, sequences, chunks),
            _ceil_div(number, chunks),
            blocks * sequences,
            options,
        )

    def run(self, kernel: Any, segments: int, *operands: Any, tiled: bool = False, **more: Any) -> None:
        """Launch a kernel for so many segments, and for every block of states if it is tiled over them."""
        options = {name: value for name, value in (self.options | more).items() if name in kernel.arg_names}
        grid = (self.programs * segments, options["STATES"] // options["TILE"] if tiled else 1)
        kernel[grid](
            *operands, *self.sizes, **options, num_warps=warps_of(kernel.__name__, self.options["STATES"]), num_stages=2
        )

    def ends(self, x: torch.Tensor, reverse: bool) -> torch.Tensor:
        """Returns the states that each segment but the last gives, (segments - 1, sequences, states, channels)."""
        _, channels, _, sequences, _ = self.sizes
        shape = (self.segments - 1, sequences, self.options["STATES"], channels)
        ends = x.new_empty(shape, dtype=torch.float32)
        if self.segments > 1:
            into, _, over, _ = self.maps
            self.run(_ends_kernel, self.segments - 1, x, ends, into, over, tiled=True, REVERSE=reverse)
        return ends

    def convolve(self, x: torch.Tensor, reverse: bool = False) -> torch.Tensor:
        """Returns the convolution of x, or of x in reverse order, reversed."""
        y = torch.empty_like(x)
        operands = (x, y, self.ends(x, reverse), *self.weights, *self.maps)
        self.run(_outputs_kernel, self.segments, *operands, REVERSE=reverse)
        return y

    def correlate(self, grad: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the gradients of the taps, and of the readout with its zero states."""
        _, channels, _, sequences, _ = self.sizes
        shares = self.segments * sequences
        to_taps = x.new_empty((shares, 2 * self.options["CHUNK"], channels), dtype=torch.float32)
        to_readout = x.new_empty((shares, self.options["STATES"], channels), dtype=torch.float32)
        self.run(_tap_gradient_kernel, self.segments, grad, x, to_taps)
        operands = (grad, x, to_readout, self.ends(x, reverse=False), *self.maps)
        self.run(_readout_gradient_kernel, self.segments, *operands, tiled=True)
        return to_taps.sum(dim=0), to_readout.sum(dim=0)


def _ceil_div(number: int, by: int) -> int:
    return -(-number // by)


def warps_of(kernel: str, states: int) -> int:
    """Returns how many warps run a program: as few as spill no registers."""
    wide = kernel == "_tap_gradient_kernel" or (kernel == "_outputs_kernel" and states > _STATES)
    return 4 if wide else 2


def _count_segments(multiprocessors: int, warps: int, chunks: int) -> int:
    """Returns into how many segments to cut sequences of so many chunks, which have so many warps if not cut."""
    return max(min(_ceil_div(_WARPS * multiprocessors, warps), chunks // _CHUNKS), 1)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@kept_op("flash_stu::triton_conv")
def _conv(
    x: torch.Tensor, taps: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, dilation: int
) -> torch.Tensor:
    return _Launch.of(x, taps, decay, readout, dilation).convolve(x.contiguous())


@_conv.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
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
    launch, grad = _Launch.of(x, taps, decay, readout, dilation), grad.contiguous()
    to_taps, to_readout = launch.correlate(grad, x.contiguous())
    return launch.convolve(grad, reverse=True), to_taps, to_readout[: len(readout)].clone()


@_conv_backward.register_fake
def _(_grad: torch.Tensor, *operands: Any) -> tuple[torch.Tensor, ...]:
    x, taps, _, readout, _ = operands
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, taps, readout))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    *tensors, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    to_x, to_taps, to_readout = torch.ops.flash_stu.triton_conv_backward(grad, *ctx.saved_tensors, ctx.dilation)
    return to_x, to_taps, None, to_readout, None


_conv.register_autograd(_differentiate, setup_context=_save_inputs)
