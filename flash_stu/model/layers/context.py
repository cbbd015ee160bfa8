"""Values that the model computes once per call and all layers share."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from flash_stu.errors import UserError
from flash_stu.model.layers.documents import Documents
from flash_stu.ops.parts import Part, Past

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Ring(NamedTuple):
    """Where the one token of a step goes in the rings of attention layers, and what it sees there.

    Attributes:
        slot: (1,), its own; a tensor, so that a captured step can move it.
        filled: slots from the first on that hold something, or may where `slot` moves.
        visible: (batch or 1, filled), False in slots that are empty or hold padding; None if it sees all.
    """

    slot: torch.Tensor
    filled: int
    visible: torch.Tensor | None = None

    @classmethod
    def at(
        cls, past: int | torch.Tensor, padding: torch.Tensor | None, window: int, device: torch.device | str
    ) -> "Ring":
        """Returns the place after `past` tokens; the other arguments are as in SequenceContext."""
        if isinstance(past, torch.Tensor):
            ring = cls(past % window, window)
        else:
            ring = cls(torch.full((1,), past % window, device=device), min(past + 1, window))
            if padding is None:
                return ring
        return ring._replace(visible=ring.distance()[None] <= past - (0 if padding is None else padding))

    def distance(self) -> torch.Tensor:
        """Returns how many tokens before this one each slot's came, (filled,)."""
        return (self.slot - torch.arange(self.filled, device=self.slot.device)) % self.filled


class SequenceContext(NamedTuple):
    """Shared by all layers of one forward call.

    Attributes:
        filters: spectral filters (filter_length, num_filters), float32; None in a model without STU layers.
        rotary: cosines and sines (batch, 1, length, head_dim) of this call's positions; None without RoPE.
        mask: (batch, length), False where a token of this call is padding; None when none is.
        documents: in the rows of this call, kept apart by every mixer; None if each row is one.
        weights: of attention layers are wanted: the tokens of this call and before it; None if they are not.
        band: of flex_attention, over the whole sequences of a call without a cache; None where that is not taken.
        part: of a longer sequence that this call is about; None if it is about a whole one.
        past: the parts before, for the layer that this context is handed to.
        seen: tokens before this call; in a captured step a tensor, (1,).
        padding: how many tokens of padding each row begins with, (batch, 1); None if none.
        ring: of attention layers, in a step.
    """

    filters: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    mask: torch.Tensor | None = None
    documents: Documents | None = None
    weights: int | None = None
    band: "BlockMask | None" = None
    part: Part | None = None
    past: Past | None = None
    seen: int | torch.Tensor = 0
    padding: torch.Tensor | None = None
    ring: Ring | None = None

    def in_part(self, part: Part | None, cached: bool) -> "SequenceContext":
        """Returns the context of a call about a part of a sequence, or of a whole one if `part` is None.

        Raises:
            UserError: for what is not done for a part.
        """
        if part is None:
            return self
        what = {
            "padding": self.mask is not None,
            "a cache, as generation wants it": cached,
            "several documents in a row": self.documents is not None,
            "output_attentions": self.weights is not None,
        }
        for name, wanted in what.items():
            if wanted:
                raise UserError(f"a sequence in parts does not go with {name}")
        return self._replace(part=part)

    def spectral_filters(self) -> torch.Tensor:
        """Returns `filters`, for a layer that cannot do without."""
        if self.filters is None:
            raise ValueError("filters is None; an STU layer needs the spectral filters")
        return self.filters

    def without_padding(self, x: torch.Tensor) -> torch.Tensor:
        """Zero the inputs (batch, length, channels) at padding, so that no recurrence remembers them."""
        if self.mask is None:
            return x
        return x * self.mask[:, -x.shape[1] :, None].to(x.dtype)

    def tokens_before(self) -> int:
        """Returns `seen` outside of captured steps."""
        if isinstance(self.seen, torch.Tensor):
            raise ValueError("seen is a tensor; a captured step knows its place on the device only")
        return self.seen

    def step_ring(self) -> Ring:
        """Returns `ring`, for a layer that cannot do without."""
        if self.ring is None:
            raise ValueError("ring is None; a step of an attention layer needs its place")
        return self.ring

    def real(self, first: int, end: int) -> torch.Tensor | None:
        """Returns which tokens of the text from `first` to `end` are no padding, (batch, tokens); None if all."""
        if self.padding is None:
            return None
        return torch.arange(first, end, device=self.padding.device) >= self.padding

    def at(self, places: torch.Tensor, shape: tuple[int, ...]) -> "SequenceContext":
        """Returns the context of one document a row.

        Args:
            places: (documents, longest), of their tokens in the flattened batch.
            shape: (batch, length).
        """
        rotary = self.rotary
        if rotary is not None:
            cos, sin = (table.expand(shape[0], -1, -1, -1)[:, 0].flatten(0, 1)[places][:, None] for table in rotary)
            rotary = cos, sin
        return self._replace(rotary=rotary, mask=None, documents=None, band=None)
