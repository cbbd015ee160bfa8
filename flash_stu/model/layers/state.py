"""The states that layers carry from token to token. All states can pick rows of the batch, for beam search.

An STU layer's state is the online convolution itself: ConvState in flash_stu.ops.futurefill.
"""

from typing import NamedTuple

import torch
from torch.nn import functional


class LDSState(NamedTuple):
    """A linear dynamical system between two tokens.

    Attributes:
        slots: its newest states, oldest first; each (batch, states, channels), float32 or float64.
        decay: (states,), in the slots' dtype, fixed for the sequence.
        readout: (states, channels or features), float64, fixed for the sequence.
        weights: the same in the slots' dtype, whose rounding of a product is no more than that of a slot.
    """

    slots: tuple[torch.Tensor, ...]
    decay: torch.Tensor
    readout: torch.Tensor
    weights: torch.Tensor

    def select(self, rows: torch.Tensor) -> "LDSState":
        """Returns the state of these rows of the batch."""
        return self._replace(slots=tuple(slot.index_select(0, rows) for slot in self.slots))


class WindowState(NamedTuple):
    """Keys and values of the last `window` tokens, in a ring: the next token takes the place of the oldest.

    Attributes:
        keys: (batch, kv_heads, window, head_dim).
        values: like keys.
        real: (batch, window), False in slots that are empty or hold padding.
        slot: where the next token goes, (1,); a tensor, so that a captured step can move it.

    Writing a token changes all of them in place: a window is too much to copy for every token.
    """

    keys: torch.Tensor
    values: torch.Tensor
    real: torch.Tensor
    slot: torch.Tensor

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor, window: int) -> "WindowState":
        """Returns the ring after keys and values (batch, kv_heads, length, head_dim); real is (batch, length)."""
        kept = min(window, keys.shape[2])
        first, empty = keys.shape[2] - kept, window - kept
        return cls(
            functional.pad(keys[:, :, first:], (0, 0, 0, empty)),
            functional.pad(values[:, :, first:], (0, 0, 0, empty)),
            functional.pad(real[:, first:], (0, empty)),
            torch.full((1,), kept % window, device=keys.device),
        )

    def put(self, key: torch.Tensor, value: torch.Tensor, real: torch.Tensor | None) -> None:
        """Write one token's key and value (batch, kv_heads, 1, head_dim); real is (batch, 1), None for all True."""
        self.keys.index_copy_(2, self.slot, key)
        self.values.index_copy_(2, self.slot, value)
        if real is None:
            self.real.index_fill_(1, self.slot, True)
        else:
            self.real.index_copy_(1, self.slot, real)
        self.slot.add_(1).remainder_(self.real.shape[1])

    def in_order(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns keys, values and real, oldest first, without the slots in front that are empty in every row."""
        window = self.real.shape[1]
        order = (self.slot + torch.arange(window, device=self.slot.device)) % window
        real = self.real[:, order]
        order = order[int(real.any(dim=0).int().argmax()) :]
        return self.keys[:, :, order], self.values[:, :, order], self.real[:, order]

    def select(self, rows: torch.Tensor) -> "WindowState":
        """Returns the state of these rows of the batch."""
        keys, values, real = (tensor.index_select(0, rows) for tensor in self[:3])
        return WindowState(keys, values, real, self.slot.clone())
