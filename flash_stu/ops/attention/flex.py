"""Sliding-window attention through PyTorch's flex_attention, compiled for a GPU."""

from functools import cache, lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flash_stu.ops.attention.dense import MASKED

_BLOCK = 128


def compiled_flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    band: BlockMask | None = None,
) -> torch.Tensor:
    """As `banded_attention`, without dropout.

    Compiled for the first shape, and for shapes of every kind when there is another; once more for each number of keys
    before the queries.

    Args:
        query, key, value, window, softcap, slopes, key_mask: as there.
        band: the `window_band` of these lengths; without one it is made here, which compiled code does every time.
    """
    queries, keys = query.shape[2], key.shape[2]
    before = keys - queries

    def modify(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor
    ) -> torch.Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[head] * (row + before - column)
        if key_mask is not None:
            score = torch.where(key_mask[batch, column], score, MASKED)
        return score

    band = window_band(queries, keys, window, query.device) if band is None else band
    grouped = key.shape[1] != query.shape[1]
    return _compiled()(query, key, value, score_mod=modify, block_mask=band, enable_gqa=grouped)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def window_band(queries: int, keys: int, window: int, device: torch.device) -> BlockMask:
    """Returns which blocks of keys each block of queries sees, the last query being aligned with the last key.

    A function of the lengths alone, so that no mask of queries x keys is made.
    """
    before = keys - queries

    def in_window(_batch: torch.Tensor, _head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        distance = row + before - column
        return (distance >= 0) & (distance < window)

    first_row = torch.arange(0, queries, _BLOCK, device=device)[:, None]
    first_key = torch.arange(0, keys, _BLOCK, device=device)
    last_row, last_key = first_row + _BLOCK - 1, first_key + _BLOCK - 1
    nearest, farthest = first_row + before - last_key, last_row + before - first_key  # distances in a block
    seen = (farthest >= 0) & (nearest < window)
    full = (nearest >= 0) & (farthest < window) & (last_row < queries) & (last_key < keys)
    return BlockMask.from_kv_blocks(
        *_in_order(seen & ~full), *_in_order(full), BLOCK_SIZE=_BLOCK, mask_mod=in_window, seq_lengths=(queries, keys)
    )


def _in_order(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns how many columns of each row are chosen, and all columns with those first, for one batch and head."""
    columns = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]
