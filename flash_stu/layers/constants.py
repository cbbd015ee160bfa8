"""Constants that must stay exact when a model is cast to half precision."""

from collections.abc import Callable

import torch
from torch import nn


class Float32Buffers(nn.Module):
    """A module whose own buffers keep their dtype: they follow the model to a device, never to bf16.

    A decay of 0.9999 rounds to 1 in bf16, and spectral filters lose the digits that a distillation fits.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class SpectralFilters(Float32Buffers):
    """The model's one copy of the spectral filters: (filter_length, num_filters), saved with the checkpoint.

    They are not trained, but they are not recomputed on loading either: a checkpoint means the same on every machine.
    """

    def __init__(self, length: int, count: int) -> None:
        super().__init__()
        self.register_buffer("phi", torch.zeros(length, count, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        return self.phi
