"""Values that the model computes once per call and all layers share."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from flash_stu.errors import UserError
from flash_stu.model.layers.documents import Documents
from flash_stu.ops.parts import Part, Past

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


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
    """

    filters: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    mask: torch.Tensor | None = None
    documents: Documents | None = None
    weights: int | None = None
    band: "BlockMask | None" = None
    part: Part | None = None
    past: Past | None = None

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
