"""Tensors, constant or trained, that stay in float32 when a model is cast to half precision."""

from collections.abc import Callable

import torch
from torch import nn


class KeepFloat32(nn.Module):
    """A module some of whose own tensors follow the model to a device, but never to another dtype.

    A decay of 0.9999 rounds to 1 in bf16; the terms of an LDS readout cancel, and rounded they no longer do.

    Attributes:
        exact: names of those buffers and parameters.
    """

    exact: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "KeepFloat32":
        before = {name: getattr(self, name).data for name in self.exact}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, name)
            if after.dtype != tensor.dtype:
                after.data = tensor.to(after.device)
        return self


class SpectralFilters(KeepFloat32):
    """The model's one copy of the spectral filters: (filter_length, num_filters), saved with the checkpoint.

    They are not trained, but they are not recomputed on loading either: a checkpoint means the same on every machine.
    """

    exact = ("phi",)
    phi: torch.Tensor

    def __init__(self, length: int, count: int) -> None:
        super().__init__()
        self.register_buffer("phi", torch.zeros(length, count, dtype=torch.float32))
