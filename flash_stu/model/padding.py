"""Padding anywhere in a batch: each row's tokens are moved to its end, as if it had been padded on the left.

Layers know padding on the left only, where a recurrence has nothing to remember yet. So the model sorts the columns of
every row, padding first, and puts the results back; the tokens of a row then get exactly what they get without padding.
A padded position has the result of the last token before it: the last column always tells what follows the row.
"""

from typing import Any, NamedTuple

import torch

from flash_stu.errors import UserError
from flash_stu.model.cache import FlashSTUCache


class Alignment(NamedTuple):
    """A permutation of each row of a batch that moves padding to the front, and its inverse.

    Attributes:
        mask: (batch, length), False at padding, which comes first in every row.
        order: (batch, length), the column that each place takes.
        back: (batch, length), the place whose result each column takes.
        columns: (batch, length), False at padding where it was given.
    """

    mask: torch.Tensor
    order: torch.Tensor
    back: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor) -> "Alignment":
        """Returns the alignment of a batch by its mask (batch, length), False at padding."""
        order = mask.int().argsort(dim=1, stable=True)
        padding = (~mask).sum(dim=1, keepdim=True)
        back = (padding + mask.cumsum(dim=1) - 1).clamp(min=0)
        return cls(mask.gather(1, order), order, back, mask)

    def remember(self, cache: FlashSTUCache) -> None:
        """Let the cache of a first call know its padding."""
        cache.mask, cache.padding = self.columns, (~self.mask).sum(dim=1, keepdim=True)

    def align(self, x: torch.Tensor) -> torch.Tensor:
        """Move the columns of x (batch or 1, length, ...)."""
        return _take(x, self.order)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Put results (batch, length, ...) back."""
        return _take(x, self.back)


def read_mask(mask: Any, batch: int, length: int, cache: FlashSTUCache | None) -> Alignment | None:
    """Check the attention mask of a call of the model.

    Args:
        mask: as given to the model, (batch, tokens in the cache + length); None if nothing is padding.
        batch, length: of the tokens in this call.
        cache: what this call continues, or None.

    Returns:
        how to align this call's tokens; None if none of them is padding.

    Raises:
        UserError: for a mask of another shape, with values other than 0 and 1, or with a row of padding only; and
            after the first call of a cache, for one that hides new tokens or not the same tokens as before.
    """
    past = 0 if cache is None else cache.seq_length
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.shape != (batch, past + length):
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"type {type(mask).__name__}"
        raise UserError(
            f"attention_mask has {found}; needed: a tensor of {(batch, past + length)}, past tokens included"
        )
    if torch.compiler.is_compiling():  # must not look into the mask
        return None if past else Alignment.of(mask.bool())
    known = None if cache is None else cache.mask
    if known is None and bool((mask == 1).all()):
        return None  # one look at the mask per token is enough where nothing is padding
    real = mask.bool()
    new, rows = real[:, past:], real.any(dim=1)
    before = torch.ones_like(real[:, :past])
    if known is not None and past:
        before[:, : known.shape[1]] = known
    # all in one more look, since each waits for the GPU
    checks = ((real == mask).all(), new.all(), rows.all(), (real[:, :past] == before).all())
    binary, whole, no_empty_row, as_before = torch.stack(checks).tolist()
    if not binary:
        raise UserError("attention_mask has values other than 0 (padding) and 1")
    if past and not whole:
        raise UserError("attention_mask hides tokens after those in the cache; padding can only be in the first call")
    if not as_before:
        raise UserError("attention_mask hides other tokens of the cache than the call that read them did")
    if past:
        return None
    if not no_empty_row:
        row = int(rows.int().argmin())
        raise UserError(f"attention_mask hides every token of row {row}; a row needs at least one")
    return Alignment.of(real)


def restored(outputs: Any, alignment: Alignment) -> Any:
    """Returns a model's outputs with everything in the order in which the tokens came, attention weights included."""
    outputs.last_hidden_state = alignment.restore(outputs.last_hidden_state)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(
            None if hidden is None else alignment.restore(hidden) for hidden in outputs.hidden_states
        )
    if outputs.attentions is not None:
        places = alignment.order.argsort(dim=1)
        by_query = (_take(weights.transpose(1, 2), places) for weights in outputs.attentions)
        outputs.attentions = tuple(_take(w.transpose(1, 3), places).permute(0, 2, 3, 1) for w in by_query)
    return outputs


def _take(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    places = places.view(*places.shape, *[1] * (x.ndim - 2))
    return x.expand(len(places), *x.shape[1:]).gather(1, places.expand(-1, -1, *x.shape[2:]))
