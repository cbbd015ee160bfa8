"""Sliding-window attention through PyTorch's flex_attention, compiled for a GPU."""

from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from flash_stu.ops.attention.dense import MASKED


def compiled_flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `banded_attention`, without dropout; compiled anew for every length."""
    queries, keys = query.shape[2], key.shape[2]

    def modify(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor
    ) -> torch.Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[head] * (row + (keys - queries) - column)
        if key_mask is not None:
            score = torch.where(key_mask[batch, column], score, MASKED)
        return score

    band = _block_mask(queries, keys, window, query.device)
    grouped = key.shape[1] != query.shape[1]
    return _compiled()(query, key, value, score_mod=modify, block_mask=band, enable_gqa=grouped)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(queries: int, keys: int, window: int, device: torch.device) -> BlockMask:
    def in_window(_batch: torch.Tensor, _head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        distance = row + (keys - queries) - column
        return (distance >= 0) & (distance < window)

    return create_block_mask(in_window, None, None, queries, keys, device=device)
