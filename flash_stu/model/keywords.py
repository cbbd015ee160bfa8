"""The keyword arguments of transformers' models: nothing that is passed to a model vanishes without a word."""

import math
from typing import Any

import torch

from flash_stu.errors import UserError
from flash_stu.model.padding import Alignment
from flash_stu.settings import shown

RECORDED = ("output_hidden_states", "output_attentions")
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# says something of the batch a second time, is for the loss, or was read by generate, which hands it on
_NOT_NEEDED = ("max_length_q", "max_length_k", "num_items_in_batch", "tokenizer", "assistant_tokenizer")


def refuse_unknown(keywords: dict[str, Any]) -> None:
    """Check the keyword arguments that a model's forward has no parameter for; None is as good as none.

    Raises:
        UserError: for one that is unknown, or asks for what a Flash STU model does not do.
    """
    for name, value in keywords.items():
        if value is None or name in (*RECORDED, *DOCUMENTS, *_NOT_NEEDED):
            continue
        if name == "is_causal":
            if not value:
                raise UserError("is_causal is False; a Flash STU model is causal in every layer")
        elif name == "output_router_logits":
            if value:
                raise UserError("output_router_logits is True; a Flash STU model has no experts")
        elif name == "token_type_ids":
            if bool((value != 0).any()):
                raise UserError("token_type_ids has other values than 0; a Flash STU model has no token types")
        else:
            what = shown(value) if isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"
            raise UserError(f"{name} is {what}, but a Flash STU model has no such argument: leave it out")


def document_numbers(
    keywords: dict[str, Any],
    position_ids: torch.Tensor | None,
    shape: tuple[int, ...],
    alignment: Alignment | None,
) -> torch.Tensor | None:
    """Read where documents begin in packed rows, as flash-attention's and transformers' collators say it.

    Args:
        keywords: cu_seq_lens_q and cu_seq_lens_k, (documents + 1,), where documents begin in the flattened batch and
            where the last one ends; else seq_idx, (batch, length), a number for every document.
        position_ids: (batch or 1, length); without the former, a document begins where they do not count on.
        shape: (batch, length) of this call.
        alignment: how this call's tokens are aligned, or None.

    Returns:
        (batch, length), of the aligned tokens, different for two documents next to each other; None if nothing says
        that there are several in a row.

    Raises:
        UserError: for arguments of other shapes or values.
    """
    numbers = _told(keywords, shape)
    if numbers is None:
        if position_ids is None or torch.compiler.is_compiling():  # which must not look at them
            return None
        if alignment is not None:
            position_ids = alignment.align(position_ids)
        jumps = position_ids.diff(dim=1) != 1
        if alignment is not None:
            jumps = jumps & alignment.mask[:, :-1]
        if not bool(jumps.any()):
            return None
        numbers = torch.nn.functional.pad(jumps.long().cumsum(1), (1, 0)).expand(shape)
    elif alignment is not None:
        numbers = alignment.align(numbers)
    return numbers if alignment is None else torch.where(alignment.mask, numbers, -1)


def _told(keywords: dict[str, Any], shape: tuple[int, ...]) -> torch.Tensor | None:
    """Returns the documents' numbers that the keyword arguments tell, None if they tell none."""
    queries, keys, numbers = (keywords.get(name) for name in DOCUMENTS)
    ends = keys if queries is None else queries
    if ends is not None:
        if keys is not None and not torch.equal(ends, keys):
            raise UserError("cu_seq_lens_q and cu_seq_lens_k are different; a document's queries see its own keys only")
        total = math.prod(shape)
        if ends.ndim != 1 or len(ends) < 2 or ends[0] != 0 or ends[-1] != total or bool((ends.diff() < 0).any()):
            raise UserError(f"cu_seq_lens_q is {shown(ends.tolist())}; needed: ascending, from 0 to the {total} tokens")
        places = torch.arange(total, device=ends.device, dtype=ends.dtype)
        return torch.searchsorted(ends.contiguous(), places, right=True).view(shape)
    if numbers is not None and numbers.shape != shape:
        raise UserError(f"seq_idx has shape {tuple(numbers.shape)}; needed: {tuple(shape)}")
    return numbers
