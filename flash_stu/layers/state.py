"""What each kind of layer remembers between tokens. All states can pick rows of the batch, for beam search."""

from typing import NamedTuple

import torch


class LDSState(NamedTuple):
    """The newest states of a linear dynamical system, oldest first; each (batch, states, channels), float32."""

    slots: tuple[torch.Tensor, ...]

    def select(self, rows: torch.Tensor) -> "LDSState":
        return LDSState(tuple(slot.index_select(0, rows) for slot in self.slots))


class WindowState(NamedTuple):
    """Keys and values of the last window - 1 tokens, (batch, kv_heads, up to window - 1, head_dim)."""

    keys: torch.Tensor
    values: torch.Tensor

    def select(self, rows: torch.Tensor) -> "WindowState":
        return WindowState(self.keys.index_select(0, rows), self.values.index_select(0, rows))


class InputHistory(NamedTuple):
    """All inputs an STU layer has convolved so far: it has no smaller exact state before it is distilled.

    Attributes:
        buffer: (batch, capacity, channels), filled from the front; grows by doubling.
        length: tokens filled in.
        taps: the layer's filters (filter_length, columns), largest lag first, computed once per sequence.
    """

    buffer: torch.Tensor
    length: int
    taps: torch.Tensor

    def append(self, x: torch.Tensor) -> "InputHistory":
        """Add inputs (batch, length, channels)."""
        end = self.length + x.shape[1]
        buffer = self.buffer
        if end > buffer.shape[1]:
            capacity = max(end, 2 * buffer.shape[1])
            buffer = buffer.new_zeros(buffer.shape[0], capacity, buffer.shape[2])
            buffer[:, : self.length] = self.buffer[:, : self.length]
        buffer[:, self.length : end] = x
        return InputHistory(buffer, end, self.taps)

    def select(self, rows: torch.Tensor) -> "InputHistory":
        return self._replace(buffer=self.buffer.index_select(0, rows))
