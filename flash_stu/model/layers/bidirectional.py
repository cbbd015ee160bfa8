"""Two layers that read a sequence from either end."""

from typing import Any

import torch

from flash_stu.model.layers.context import SequenceContext
from flash_stu.model.layers.mixer import Mixer


class Bidirectional(Mixer):
    """The sum of two layers of one kind: (batch, length, channels) to the same, of whole sequences only.

    At every position one has seen the tokens up to it, the other those from it on; they share no weights.

    Args:
        past: reads from the beginning.
        future: reads from the end.

    Source: Goel et al. 2022 (arXiv 2202.09729), where a state space layer reads both ways.
    """

    def __init__(self, past: Mixer, future: Mixer) -> None:
        super().__init__()
        self.past, self.future = past, future

    def whole(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        mirrored = context if context.mask is None else context._replace(mask=context.mask.flip(1))
        return self.past(x, context) + self.future(x.flip(1), mirrored).flip(1)

    def prefill(self, x: torch.Tensor, context: SequenceContext, state: Any = None) -> tuple[torch.Tensor, Any]:
        raise NotImplementedError("a layer that reads from both ends leaves no state behind")

    step = prefill
