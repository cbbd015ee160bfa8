"""Causal convolution without FFTs: matrix products over chunks, for filters that end in decaying exponentials.

A filter is given in two parts. Near lags 0 .. 2c-1 are plain taps, c being the chunk length. Lags from c+1 on follow

    f[c + 1 + n, d] = sum_j decay[j]^n readout[j, d]

(lags that have both must agree). A chunk's outputs then are a banded Toeplitz product with its own inputs and those of
the chunk before, plus a readout of `states` numbers per channel that sum up everything earlier:

    Z[i + 1, j] = decay[j]^c Z[i, j] + sum_s decay[j]^(c-1-s) x[chunk i - 1, s]
    y[chunk i, t] += sum_j decay[j]^t readout[j] Z[i, j]

Because no exponential ever has to give a lag below c+1, where sums of exponentials cancel most, 32 of them reach
spectral filters to single precision with coefficients below one (flash_stu.filters.exponentials fits them). Cost is
O(length (2c + 2 states) channels), linear in the length, and memory beyond the activations does not grow with it.

Source: Shah et al. 2025, SpectraLDS (arXiv 2505.17868), section 4, for the states; the band of two chunks is ours.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from flash_stu.errors import UserError
from flash_stu.filters.exponentials import powers
from flash_stu.ops.kept import kept_op

_ELEMENTS = {False: 2**21, True: 2**27}  # inputs in a segment, on a CPU and on a GPU


class ChunkedState(NamedTuple):
    """The past of a convolution, from one stretch of a sequence to the next.

    Within one process a sequence is convolved whole. The state is for sequences whose stretches come one after another
    or are split over processes: each hands on a chunk of inputs and `states` numbers per channel, however long it is.

    Attributes:
        history: inputs of the last whole chunk, (batch, chunk * dilation, channels).
        rest: inputs after it, (batch, less than chunk * dilation, channels).
        far: Z of all chunks before, (batch, dilation, channels, states), float32 (float64 for float64 inputs).
    """

    history: torch.Tensor
    rest: torch.Tensor
    far: torch.Tensor

    @classmethod
    def zero(cls, x: torch.Tensor, chunk: int, states: int, dilation: int) -> "ChunkedState":
        """Returns the state before the first token of a sequence like x (batch, length, channels)."""
        batch, _, channels = x.shape
        far = x.new_zeros((batch, dilation, channels, states), dtype=torch.promote_types(x.dtype, torch.float32))
        return cls(x.new_zeros((batch, chunk * dilation, channels)), x[:, :0], far)


def chunked_conv(
    x: torch.Tensor,
    taps: torch.Tensor,
    decay: torch.Tensor,
    readout: torch.Tensor,
    state: ChunkedState | None = None,
    dilation: int = 1,
) -> tuple[torch.Tensor, ChunkedState]:
    """Convolve each channel with its own filter: y[t] = sum_n f[n] x[t - dilation n].

    Args:
        x: inputs, (batch, length, channels), any floating dtype.
        taps: the filter's near lags, (2 * chunk, channels).
        decay: constants in (-1, 1), (states,); they get no gradient.
        readout: (states, channels), see above.
        state: of the tokens before; None at the start. Gradients flow through it.
        dilation: distance between lags, in tokens.

    Returns:
        outputs (batch, length, channels) in x's dtype, summed in float32 (float64 for float64 inputs), and the state
        after the last token.

    Raises:
        UserError: for shapes that do not fit together, or decays that require a gradient.
    """
    _check_arguments(x, taps, decay, readout)
    chunk = taps.shape[0] // 2
    if state is None:
        state = ChunkedState.zero(x, chunk, len(decay), dilation)
    if x.shape[1] == 0:
        return x, state
    inputs = torch.cat([state.rest, x], dim=1) if state.rest.shape[1] else x
    wide = state.far.dtype
    y, far, _ = torch.ops.flash_stu.chunked_conv(
        inputs, state.history, state.far, taps.to(wide), decay.double(), readout.to(wide)
    )
    whole = inputs.shape[1] - inputs.shape[1] % (chunk * dilation)
    history = inputs[:, whole - chunk * dilation : whole] if whole else state.history
    return y[:, state.rest.shape[1] :], ChunkedState(history, inputs[:, whole:], far)


def _check_arguments(x: torch.Tensor, taps: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor) -> None:
    channels = x.shape[-1]
    fits = x.ndim == 3 and taps.ndim == 2 and taps.shape[0] >= 2 and taps.shape[0] % 2 == 0
    if not fits or taps.shape[1] != channels or readout.shape != (len(decay), channels):
        raise UserError(
            f"chunked_conv takes x (batch, length, channels), taps (2 chunk, channels), decay (states,) and readout "
            f"(states, channels); got {tuple(x.shape)}, {tuple(taps.shape)}, {tuple(decay.shape)} and "
            f"{tuple(readout.shape)}"
        )
    if decay.requires_grad:
        raise UserError("chunked_conv gives its decays no gradient; a system with trainable decays runs as an FFT")


# Inside, tensors are laid out in rows (batch, chunks + 1, dilation, channels, time in the chunk): the first chunk is
# the history. Rows one chunk apart are then `dilation` rows apart whatever the batch, and one batched product over
# channels serves all of them; what it computes for the history's own outputs is not used.


def _rows(x: torch.Tensor, first: torch.Tensor | None, chunk: int, dilation: int, wide: torch.dtype) -> torch.Tensor:
    """Lay out x (batch, length, channels) after the chunk `first` (zeros if None), plus `dilation` rows of zeros."""
    batch, length, channels = x.shape
    span = chunk * dilation
    number = -(-length // span)
    flat = x.new_empty((batch * (number + 1) + 1) * dilation * channels * chunk, dtype=wide)
    flat[-dilation * channels * chunk :] = 0
    rows = flat[: -dilation * channels * chunk].view(batch, number + 1, dilation * channels, chunk)
    if first is None:
        rows[:, 0] = 0
    else:
        rows[:, 0] = first.reshape(batch, chunk, -1).transpose(1, 2)
    whole = length // span
    # transposed chunk by chunk, in cache; a transposition of the whole sequence is several times slower
    rows[:, 1 : whole + 1] = x[:, : whole * span].reshape(batch, whole, chunk, rows.shape[2]).transpose(2, 3)
    if whole < number:
        last = pad(x[:, whole * span :], (0, 0, 0, number * span - length))
        rows[:, number] = last.reshape(batch, chunk, -1).transpose(1, 2)
    return flat.view(-1, channels, chunk)


def _sequence(rows: torch.Tensor, batch: int, length: int, dilation: int, dtype: torch.dtype) -> torch.Tensor:
    """Invert _rows: (rows of `batch` equal parts, channels, chunk) to (batch, at least length, channels), cut."""
    channels, chunk = rows.shape[1:]
    chunks = rows.reshape(batch, -1, dilation * channels, chunk)
    y = rows.new_empty((batch, chunks.shape[1], chunk, dilation * channels), dtype=dtype)
    y.copy_(chunks.transpose(2, 3))
    y = y.view(batch, -1, channels)
    return y if y.shape[1] == length else y[:, :length].contiguous()


def _toeplitz(taps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(2 chunk, channels) -> (channels, s, t) twice: from the chunk before and from the own one, to outputs t."""
    chunk = taps.shape[0] // 2
    reverse = pad(taps.flip(0).t(), (0, chunk - 1)).contiguous()  # [q] is lag 2 chunk - 1 - q
    # row t, column s of the band has lag t + chunk - s
    band = reverse.unfold(1, 2 * chunk, 1).flip(1).transpose(1, 2).contiguous()
    return band[:, :chunk], band[:, chunk:]


def _band_to_taps(before: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The adjoint of _toeplitz: (channels, t, s) twice to (2 chunk, channels)."""
    channels, chunk, _ = own.shape
    skewed = own.new_zeros((channels, chunk, 3 * chunk))
    for part, matrix in enumerate((before, own)):
        # row t starts chunk - 1 - t columns late, so that a column holds one lag
        offset = chunk - 1 + part * chunk
        skewed.as_strided(matrix.shape, (3 * chunk * chunk, 3 * chunk - 1, 1), offset).copy_(matrix)
    return skewed.sum(dim=1)[:, : 2 * chunk].flip(1).t().contiguous()


class _Constants(NamedTuple):
    """The matrices that all segments of a sequence share.

    Attributes:
        before, own: (channels, s, t), see _toeplitz.
        into: from a chunk into the states, (chunk, states).
        out_of: the states seen at each time of a chunk, (states, chunk).
        over: decay over a chunk, (states,).
        readout: (channels, states).
    """

    before: torch.Tensor
    own: torch.Tensor
    into: torch.Tensor
    out_of: torch.Tensor
    over: torch.Tensor
    readout: torch.Tensor


def _constants(taps: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor) -> _Constants:
    kernel = chunk_maps(decay, taps.shape[0] // 2, taps.dtype)
    return _Constants(*_toeplitz(taps), *kernel, readout.t().contiguous())


def chunk_maps(decay: torch.Tensor, chunk: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the maps from a chunk into the states (chunk, states), out of them (states, chunk), and from the states
    before a chunk to those after it (states,)."""
    kernel = powers(decay, chunk + 1)
    kernel = torch.where(kernel.abs() < 1e-30, 0, kernel).to(dtype)  # arithmetic with denormals is slow
    return kernel[:-1].flip(0).contiguous(), kernel[:-1].t().contiguous(), kernel[-1].contiguous()


def _segments(x: torch.Tensor, span: int) -> list[tuple[int, int]]:
    """Stretches of whole chunks, short enough that what is computed about one of them stays in the caches."""
    batch, length, channels = x.shape
    size = max(_ELEMENTS[x.is_cuda] // (batch * channels * span), 1) * span
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _far_states(rows: torch.Tensor, far: torch.Tensor, constants: _Constants) -> torch.Tensor:
    """(batch, chunks + 1, dilation, channels, states): what the outputs of chunks 1, 2, ... and of the next one see."""
    batch, dilation, channels, states = far.shape
    z = rows.new_empty((rows.shape[0] - dilation, channels, states))
    if len(z) > dilation:
        source = rows[: -2 * dilation]
        torch.mm(source.flatten(0, 1), constants.into, out=z[dilation:].flatten(0, 1))
    z = z.view(batch, -1, dilation, channels, states)
    z[:, 0] = far
    for i in range(1, z.shape[1]):
        z[:, i].addcmul_(z[:, i - 1], constants.over)
    return z


@kept_op("flash_stu::chunked_conv")
def _chunked(
    x: torch.Tensor,
    history: torch.Tensor,
    far: torch.Tensor,
    taps: torch.Tensor,
    decay: torch.Tensor,
    readout: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns outputs, the far states after the last whole chunk, and those before every segment."""
    segments = _segments(x, history.shape[1])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    starts = far.new_empty((len(segments), *far.shape))
    with torch.autocast(x.device.type, enabled=False):
        constants = _constants(taps, decay, readout)
        for index, (start, stop) in enumerate(segments):
            starts[index] = far
            y[:, start:stop], far = _segment(x[:, start:stop], history, far, constants)
            history = x[:, stop - history.shape[1] : stop]
    return y, far.clone(), starts


@_chunked.register_fake
def _(
    x: torch.Tensor, history: torch.Tensor, far: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(far), far.new_empty((len(_segments(x, history.shape[1])), *far.shape))


def _segment(
    x: torch.Tensor, history: torch.Tensor, far: torch.Tensor, constants: _Constants
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns outputs, and the far states after the segment's last whole chunk."""
    batch, length, channels = x.shape
    dilation, chunk = far.shape[1], len(constants.into)
    rows = _rows(x, history, chunk, dilation, far.dtype)
    z = _far_states(rows, far, constants)
    y = torch.bmm(rows[dilation:].transpose(0, 1), constants.own)
    y.baddbmm_(rows[:-dilation].transpose(0, 1), constants.before)
    y.baddbmm_(z.flatten(0, 2).transpose(0, 1), constants.readout[:, :, None] * constants.out_of)
    y = y.transpose(0, 1).contiguous().view(batch, -1, dilation, channels, chunk)[:, :-1]
    return _sequence(y.flatten(0, 2), batch, length, dilation, x.dtype), z[:, length // history.shape[1]]


@torch.library.custom_op("flash_stu::chunked_conv_backward", mutates_args=())
def _chunked_backward(
    grad: torch.Tensor,
    grad_far: torch.Tensor,
    x: torch.Tensor,
    history: torch.Tensor,
    starts: torch.Tensor,
    taps: torch.Tensor,
    decay: torch.Tensor,
    readout: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, history, the far states at the start, taps and readout."""
    span = history.shape[1]
    segments = _segments(x, span)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_taps, grad_readout = torch.zeros_like(taps), torch.zeros_like(readout)
    grad_history = torch.empty_like(history)
    with torch.autocast(x.device.type, enabled=False):
        constants = _constants(taps, decay, readout)
        for index in reversed(range(len(segments))):
            start, stop = segments[index]
            before = x[:, start - span : start] if start else history
            part = slice(start, stop)
            grad_x[:, part], to_history, grad_far, to_taps, to_readout = _segment_backward(
                grad[:, part], grad_far, x[:, part], before, starts[index], constants
            )
            if index + 1 < len(segments):
                grad_x[:, stop - span : stop] += grad_history
            grad_history = to_history
            grad_taps += to_taps
            grad_readout += to_readout
    return grad_x, grad_history, grad_far, grad_taps, grad_readout


@_chunked_backward.register_fake
def _(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    _, grad_far, x, history, _, taps, _, readout = operands
    like = (x, history, grad_far, taps, readout)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)


def _segment_backward(
    grad: torch.Tensor,
    grad_far: torch.Tensor,
    x: torch.Tensor,
    history: torch.Tensor,
    far: torch.Tensor,
    constants: _Constants,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, channels = x.shape
    dilation, chunk = far.shape[1], len(constants.into)
    # The rows and states are computed again rather than kept: a layer then holds its inputs and nothing else.
    rows, g = (_rows(u, first, chunk, dilation, far.dtype) for u, first in ((x, history), (grad, None)))
    end = -dilation
    by_time = g[dilation:end].permute(1, 2, 0).contiguous()
    to_own = torch.bmm(by_time, rows[dilation:end].transpose(0, 1))
    to_before = torch.bmm(by_time, rows[: 2 * end].transpose(0, 1))
    grad_taps = _band_to_taps(to_before, to_own)
    del by_time

    z = _far_states(rows, far, constants)
    del rows
    flow = g.new_empty((g.shape[0], channels, z.shape[-1]))
    torch.mm(g[dilation:].flatten(0, 1), constants.out_of.t(), out=flow[:end].flatten(0, 1))
    flow[end:] = 0
    adjoint = flow[:end].view(z.shape)  # slot i of the states is seen by the outputs of chunk i + 1
    grad_readout = z.mul_(adjoint).sum(dim=(0, 1, 2)).t()
    adjoint *= constants.readout
    adjoint[:, length // history.shape[1]] += grad_far
    for i in range(adjoint.shape[1] - 1, 0, -1):
        adjoint[:, i - 1].addcmul_(adjoint[:, i], constants.over)
    grad_start = adjoint[:, 0].clone()
    adjoint[:, 0] = 0  # the start is not a function of the inputs

    to_x = torch.bmm(g[:end].transpose(0, 1), constants.own.transpose(1, 2))
    to_x.baddbmm_(g[dilation:].transpose(0, 1), constants.before.transpose(1, 2))
    to_x.baddbmm_(flow[dilation:].transpose(0, 1), constants.into.t().expand(channels, -1, -1))
    to_x = to_x.transpose(0, 1).contiguous().view(batch, -1, dilation, channels, chunk)
    grad_history = _sequence(to_x[:, 0].flatten(0, 1), batch, chunk * dilation, dilation, history.dtype)
    grad_x = _sequence(to_x[:, 1:].flatten(0, 2), batch, length, dilation, x.dtype)
    return grad_x, grad_history, grad_start, grad_taps, grad_readout


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, history, _, taps, decay, readout = inputs
    ctx.save_for_backward(x, history, output[2], taps, decay, readout)


def _differentiate(
    ctx: Any, grad: torch.Tensor, grad_far: torch.Tensor, _: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    *to_inputs, to_readout = torch.ops.flash_stu.chunked_conv_backward(grad, grad_far, *ctx.saved_tensors)
    return *to_inputs, None, to_readout


_chunked.register_autograd(_differentiate, setup_context=_save_inputs)
