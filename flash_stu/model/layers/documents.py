"""Documents that share a row of a batch without seeing each other.

Every document goes through a mixer as a row of its own, beside others of about its length: a mixer is causal, so
filling the shorter ones up at their ends changes nothing. At most two tokens are computed for every real one, by a few
calls, and everything that works token by token does not know of documents at all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie, and how to run over each of them alone.

    Attributes:
        groups: documents of similar lengths, (documents, longest): the places of their tokens in the flattened batch, a
            document's last one repeated up to the longest.
        back: (batch * length,), the place of every token among the results of all groups, one after the other.
        longest: tokens in the longest document.
    """

    groups: tuple[torch.Tensor, ...]
    back: torch.Tensor
    longest: int

    @classmethod
    def of(cls, numbers: torch.Tensor) -> "Documents | None":
        """Returns the documents of a batch, or None if every row is one.

        Args:
            numbers: (batch, length), whatever is different for two documents next to each other.
        """
        batch, length = numbers.shape
        first = torch.ones_like(numbers, dtype=torch.bool)
        first[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        begins = first.flatten().nonzero()[:, 0]
        if len(begins) == batch:
            return None
        lengths = begins.diff(append=begins.new_tensor([batch * length]))
        groups, offset, back = [], 0, []
        of_document = first.flatten().cumsum(0) - 1
        within = torch.arange(batch * length, device=numbers.device) - begins[of_document]
        start_of_result = torch.empty_like(begins)
        sizes = lengths.cpu()
        scale = torch.frexp(sizes.double() - 0.5).exponent  # lengths from 2^k + 1 to 2^(k + 1) are alike
        for value in scale.unique().tolist():
            chosen = (scale == value).nonzero()[:, 0].to(numbers.device)
            longest = int(sizes[scale == value].max())
            steps = torch.arange(longest, device=numbers.device)
            groups.append(begins[chosen, None] + torch.minimum(steps, lengths[chosen, None] - 1))
            start_of_result[chosen] = offset + longest * torch.arange(len(chosen), device=numbers.device)
            offset += longest * len(chosen)
        back = start_of_result[of_document] + within
        return cls(tuple(groups), back, int(sizes.max()))

    @torch.compiler.disable(recursive=True)  # the documents' lengths are different in every batch
    def apply(self, x: torch.Tensor, context: Any, run: Callable[[torch.Tensor, Any], torch.Tensor]) -> torch.Tensor:
        """Run a causal function over every document of x (batch, length, channels) alone.

        Args:
            x: inputs.
            context: a SequenceContext of the whole batch; each call gets its part of it.
            run: takes (documents, length, channels) and a context.
        """
        flat, results = x.flatten(0, 1), []
        for places in self.groups:
            y = run(flat[places], context.at(places, x.shape[:2]))
            results.append(y.flatten(0, 1))
        return torch.cat(results)[self.back].view_as(x)
