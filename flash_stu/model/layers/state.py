"""The states that layers carry from token to token. All states can pick rows of the batch, for beam search.

An STU layer's state is the online convolution itself: ConvState in flash_stu.ops.futurefill.
"""

from typing import NamedTuple

import torch
from torch.nn import functional


class LDSState(NamedTuple):
    """A linear dynamical system between two tokens.

    Attributes:
        slots: its newest states, oldest first; each (batch, channels, states), float32 or float64.
        decay: (states,), in the slots' dtype, fixed for the sequence.
        readout: (states, channels or features), float64, fixed for the sequence.
        weights: the same as (channels or features, states) in the slots' dtype, whose rounding of a product is no
            more than that of a slot.
    """

    slots: tuple[torch.Tensor, ...]
    decay: torch.Tensor
    readout: torch.Tensor
    weights: torch.Tensor

    def select(self, rows: torch.Tensor) -> "LDSState":
        """Returns the state of these rows of the batch."""
        return self._replace(slots=tuple(slot.index_select(0, rows) for slot in self.slots))


class WindowState(NamedTuple):
    """Keys and values of the last `window` tokens: the token at place p of the text is in slot p % window.

    Attributes:
        pairs: (batch, kv_heads, 2, window, head_dim), keys and values.

    Writing a token changes them in place: a window is too much to copy for every token.
    """

    pairs: torch.Tensor

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, end: int, window: int) -> "WindowState":
        """Returns the ring after keys and values (batch, kv_heads, length, head_dim) of the tokens before `end`."""
        kept = min(window, keys.shape[2])
        pairs = torch.stack([keys[:, :, keys.shape[2] - kept :], values[:, :, keys.shape[2] - kept :]], dim=2)
        return cls(functional.pad(pairs, (0, 0, 0, window - kept)).roll((end - kept) % window, dims=3))

    @property
    def keys(self) -> torch.Tensor:
        """(batch, kv_heads, window, head_dim)."""
        return self.pairs[:, :, 0]

    @property
    def values(self) -> torch.Tensor:
        """(batch, kv_heads, window, head_dim)."""
        return self.pairs[:, :, 1]

    def put(self, key: torch.Tensor, value: torch.Tensor, slot: torch.Tensor) -> None:
        """Write one token's key and value (batch, kv_heads, 1, head_dim) to a slot, (1,)."""
        self.pairs.index_copy_(3, slot, torch.stack([key, value], dim=2))

    def in_order(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values of the tokens before `end` that are still there, oldest first."""
        window = self.pairs.shape[3]
        order = torch.arange(max(0, end - window), end, device=self.pairs.device) % window
        keys, values = self.pairs[:, :, :, order].unbind(2)
        return keys, values

    def select(self, rows: torch.Tensor) -> "WindowState":
        """Returns the state of these rows of the batch."""
        return WindowState(self.pairs.index_select(0, rows))
