"""The base of all sequence mixers: one way in, whatever is wanted of them."""

from typing import Any

import torch
from torch import nn

from flash_stu.model.layers.context import SequenceContext


class Mixer(nn.Module):
    """A layer that mixes tokens: `whole` for a whole sequence, `prefill` to leave a state behind, `step` for one token.

    Calling the module is the way to all three, so that what is put around a module (hooks, adapters) is never missed.
    """

    def forward(
        self, x: torch.Tensor, context: SequenceContext, states: list[Any] | None = None, index: int = 0
    ) -> torch.Tensor:
        """Run over x (batch, length, channels), document by document if the context has several.

        Args:
            x: inputs.
            context: what all layers share in this call.
            states: of all layers; with them, x comes after the tokens that `states[index]` has seen, and that is
                replaced by the state after x.
            index: this layer's place.
        """
        if states is None:
            if context.part is not None:
                context = context._replace(past=context.part.before(index))
            if context.documents is not None:
                return context.documents.apply(x, context, self.whole)
            return self.whole(x, context)
        if states[index] is not None and x.shape[1] == 1:
            y, states[index] = self.step(x, context, states[index])
        else:
            y, states[index] = self.prefill(x, context, states[index])
        return y

    def whole(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """Returns the outputs of a whole sequence (batch, length, channels), or of the part that the context tells."""
        raise NotImplementedError

    def prefill(self, x: torch.Tensor, context: SequenceContext, state: Any = None) -> tuple[torch.Tensor, Any]:
        """Returns outputs and the state after x, which comes after the tokens in `state`."""
        raise NotImplementedError

    def step(self, x: torch.Tensor, context: SequenceContext, state: Any) -> tuple[torch.Tensor, Any]:
        """Returns output and state after one more token, (batch, 1, channels)."""
        raise NotImplementedError
