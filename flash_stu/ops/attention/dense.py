"""Sliding-window attention with all scores held at once: PyTorch's SDPA, and the one query of a generation step."""

import torch
from torch.nn import functional as F

MASKED = -1e30  # finite, so that a row whose keys are all padding gives numbers, not NaN


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    slopes: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = True,
) -> torch.Tensor:
    """As `banded_attention`, without a softcap; if not causal, a query sees as many keys after its own."""
    mask = None
    if causal or slopes is not None or key_mask is not None or window < key.shape[2]:
        visible, distance = _visible(query, key, window, key_mask, causal)
        bias = torch.zeros((), device=query.device) if slopes is None else -slopes.view(-1, 1, 1) * distance
        mask = torch.where(visible, bias, MASKED).to(query.dtype)
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped)


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    window: int,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """Returns the weights that `sliding_window_attention` uses, without dropout: (batch, heads, queries, keys).

    They are in the query's dtype, from a softmax in float32, and 0 at keys that a query does not see.
    """
    visible, distance = _visible(query, key, window, key_mask, causal)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query * query.shape[-1] ** -0.5 @ key.mT).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes.view(-1, 1, 1) * distance
    return (torch.where(visible, scores, MASKED).softmax(dim=-1) * visible).to(query.dtype)


def _visible(
    query: torch.Tensor, key: torch.Tensor, window: int, key_mask: torch.Tensor | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which keys each query sees, (batch or 1, 1, queries, keys), and the distances, (queries, keys)."""
    queries, keys = query.shape[2], key.shape[2]
    rows = torch.arange(queries, device=query.device)[:, None] + keys - queries
    distance = rows - torch.arange(keys, device=query.device)
    distance = distance if causal else distance.abs()
    visible = ((distance >= 0) & (distance < window))[None, None]
    if key_mask is not None:
        visible = visible & key_mask.bool()[:, None, None]
    return visible, distance


def attend_to_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from one query to a window of keys in any order, as generation does for every token.

    Args:
        query: (batch, heads, 1, head_dim).
        key: (batch, kv_heads, window, head_dim).
        value: like key.
        visible: (batch or 1, window), False where a key is not to be seen; None if all are.
        softcap: as in `banded_attention`.
        bias: added to the capped scores, (heads, window), float32; None for none.

    Returns:
        (batch, heads, 1, head_dim) in the query's dtype; the softmax is in float32.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped, scale = query.reshape(batch * kv_heads, heads // kv_heads, head_dim), head_dim**-0.5
    scores = torch.bmm(grouped, key.flatten(0, 1).mT).float()
    scores = scores.mul_(scale) if softcap is None else scores.mul_(scale / softcap).tanh_() * softcap
    scores = scores.view(batch, kv_heads, heads // kv_heads, -1)
    if bias is not None:
        scores = scores + bias.view(kv_heads, heads // kv_heads, -1)
    if visible is not None:
        scores = torch.where(visible[:, None, None], scores, MASKED)
    weights = scores.softmax(dim=-1).to(value.dtype)
    return torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).view(batch, heads, 1, head_dim)
