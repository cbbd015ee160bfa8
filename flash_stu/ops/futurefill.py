"""Exact causal convolution of inputs that arrive token by token, without summing over the whole past each time.

The past is convolved in blocks, ahead of time: an FFT adds what a block of inputs gives to outputs still to come, and a
step only sums the few newest inputs that no block has covered. Three schedules of blocks, for filters of L lags:

    naive:       no blocks; every step is a sum over the past, O(L) per token (the baseline).
    epoched:     every sqrt(L log L) tokens the whole past is added to the outputs of the next so many tokens;
                 O(sqrt(L log L)) per token.
    continuous:  after t tokens, with 2^k the largest power of two that divides t, the last 2^k inputs are added to the
                 next 2^k outputs; O(log^2 L) per token. Blocks below 128 are left to the direct sum, which is faster.

Blocks lie on a fixed grid, so the state after a prompt is the one that single steps would have left, and a prompt of P
tokens costs O(P log P) however long the filters are. A step costs the same number of operations at every position but
for the blocks that end there.

Source: Agarwal et al. 2024, FutureFill (arXiv 2410.03766), algorithms 2 and 3.
"""

import math
from typing import NamedTuple

import torch

from flash_stu.errors import UserError

BACKENDS = ("futurefill", "futurefill_epoched", "naive")
_SMALLEST_BLOCK = 128
_DIRECT_ROWS = 512  # of a direct sum at a time: its products stay in the processor's cache


class Taps:
    """Filters prepared for both kinds of sum; spectra are computed when first needed and kept.

    Args:
        taps: (lags, channels), one filter per channel; with `mixing` (lags, features), each filter on every channel.
        mixing: (features, channels, channels); the features' outputs pass through these matrices and add up.
    """

    def __init__(self, taps: torch.Tensor, mixing: torch.Tensor | None = None) -> None:
        self.reversed = taps.flip(0).contiguous()
        self.mixing = mixing
        self._spectra: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.reversed)

    def newest(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the output (batch, channels) at the last of the inputs (batch, length, channels)."""
        taps = self.reversed[-inputs.shape[1] :]
        if self.mixing is None:
            parts = zip(inputs.split(_DIRECT_ROWS, dim=1), taps.split(_DIRECT_ROWS), strict=True)
            return sum(((some * lags).sum(dim=1) for some, lags in parts), start=inputs.new_zeros(()))
        wide = torch.promote_types(inputs.dtype, taps.dtype)
        features = taps.t().to(wide) @ inputs.to(wide)
        return features.to(self.mixing.dtype).flatten(1) @ self.mixing.flatten(0, 1)

    def future(self, inputs: torch.Tensor, count: int) -> torch.Tensor:
        """Returns the part of inputs (batch, length, channels) in the `count` outputs after them."""
        length = inputs.shape[1]
        size = 1 << (length + count - 1).bit_length()  # what wraps around falls on outputs before `length`
        wide = torch.promote_types(inputs.dtype, self.reversed.dtype)
        spectrum = torch.fft.rfft(inputs.to(wide).transpose(1, 2).contiguous(), n=size)
        if self.mixing is None:
            return _window(spectrum * self._spectrum(size), size, length, count)
        y = self.mixing.new_zeros(())
        for taps, matrix in zip(self._spectrum(size), self.mixing, strict=True):
            y = y + _window(spectrum * taps, size, length, count).to(matrix.dtype) @ matrix
        return y

    def _spectrum(self, size: int) -> torch.Tensor:
        if size not in self._spectra:
            taps = self.reversed[-size:].flip(0).t().contiguous()
            self._spectra[size] = torch.fft.rfft(taps, n=size)
        return self._spectra[size]


class ConvState(NamedTuple):
    """A convolution that has seen `length` tokens. Its buffers are changed in place and grow by doubling.

    With dilation d the tokens fall into d interleaved sequences, each with its own blocks.

    Attributes:
        inputs: (batch, capacity, channels), filled up to `length`.
        pending: (batch, capacity, channels), what the blocks so far have added to each output; None if there are none.
        length: tokens seen.
        taps: the filters, one tap for every dilation-th lag.
        dilation: distance between taps, in tokens.
        unit: tokens of an interleaved sequence from one block to the next.
        whole: whether a block is the whole past (epoched) or the last power of two of it (continuous).
    """

    inputs: torch.Tensor
    pending: torch.Tensor | None
    length: int
    taps: Taps
    dilation: int
    unit: int
    whole: bool

    @classmethod
    def empty(cls, like: torch.Tensor, taps: Taps, dilation: int, backend: str) -> "ConvState":
        """Returns the state before the first token.

        Args:
            like: inputs to come, (batch, any length, channels).
            taps: the filters.
            dilation: distance between taps, in tokens.
            backend: one of BACKENDS.
        """
        lags = len(taps)
        unit = {
            "naive": lags,
            "futurefill_epoched": max(1, round(math.sqrt(lags * math.log2(lags)))) if lags > 1 else 1,
            "futurefill": _SMALLEST_BLOCK,
        }[backend]
        wide = torch.promote_types(like.dtype, torch.float32)
        inputs = like.new_zeros(like.shape[0], 0, like.shape[2])
        return cls(inputs, None if unit >= lags else inputs.to(wide), 0, taps, dilation, unit, backend != "futurefill")

    def extend(self, x: torch.Tensor) -> "ConvState":
        """Take in several tokens, (batch, length, channels), whose outputs are computed elsewhere."""
        end = self.length + x.shape[1]
        state = _reserve(self, end)
        state.inputs[:, self.length : end] = x
        if state.pending is not None:
            state.pending.zero_()
            for phase in range(state.dilation):
                for block in _blocks(state, (end - phase + state.dilation - 1) // state.dilation):
                    state = _add_block(state, *block, phase)
        return state._replace(length=end)

    def step(self, x: torch.Tensor) -> tuple[torch.Tensor, "ConvState"]:
        """Take in one token (batch, channels); returns its output in float32 or wider, and the state."""
        now = self.length
        state = _reserve(self, now + 1)
        state.inputs[:, now] = x
        index, phase = divmod(now, state.dilation)
        first = index - index % state.unit
        y = state.taps.newest(state.inputs[:, first * state.dilation + phase : now + 1 : state.dilation])
        if state.pending is not None:
            y = y + state.pending[:, now]
            if (index + 1) % state.unit == 0:
                state = _add_block(state, *_blocks(state, index + 1)[-1], phase)
        return y, state._replace(length=now + 1)

    def seen(self) -> torch.Tensor:
        """Returns all inputs so far, (batch, length, channels)."""
        return self.inputs[:, : self.length]

    def select(self, rows: torch.Tensor) -> "ConvState":
        """Returns the state of these rows of the batch."""
        pending = None if self.pending is None else self.pending.index_select(0, rows)
        return self._replace(inputs=self.inputs.index_select(0, rows), pending=pending)


def _blocks(state: ConvState, count: int) -> list[tuple[int, int, int]]:
    """Returns the blocks (first input, end, outputs reached after it) that hold once `count` inputs are known."""
    end = count - count % state.unit
    if state.whole:
        return [(0, end, state.unit)] if end else []
    blocks, first = [], 0
    while first < end:
        size = 1 << ((end - first).bit_length() - 1)
        blocks.append((first, first + size, size))
        first += size
    return blocks


def _add_block(state: ConvState, first: int, end: int, reach: int, phase: int) -> ConvState:
    """Add the block's part of the outputs end .. end + reach of one interleaved sequence."""
    reach = min(reach, len(state.taps) - end)
    if reach <= 0:
        return state
    every = state.dilation
    state = _reserve(state, (end + reach) * every)
    if state.pending is not None:
        block = state.inputs[:, first * every + phase : end * every : every]
        state.pending[:, end * every + phase : (end + reach) * every : every] += state.taps.future(block, reach)
    return state


def _reserve(state: ConvState, tokens: int) -> ConvState:
    """Make room for so many tokens."""
    if tokens <= state.inputs.shape[1]:
        return state
    longest = len(state.taps) * state.dilation
    if tokens > longest:
        raise UserError(f"the sequence has {tokens} tokens; the spectral filters end at {longest}")
    capacity = min(longest, state.dilation << (-(-tokens // state.dilation) - 1).bit_length())
    pending = None if state.pending is None else _grown(state.pending, capacity)
    return state._replace(inputs=_grown(state.inputs, capacity), pending=pending)


def _grown(buffer: torch.Tensor, capacity: int) -> torch.Tensor:
    grown = buffer.new_zeros(buffer.shape[0], capacity, buffer.shape[2])
    grown[:, : buffer.shape[1]] = buffer
    return grown


def _window(spectrum: torch.Tensor, size: int, first: int, count: int) -> torch.Tensor:
    """Entries first .. first + count of the signal: (batch, channels, frequencies) -> (batch, count, channels)."""
    return torch.fft.irfft(spectrum, n=size)[..., first : first + count].transpose(1, 2)
