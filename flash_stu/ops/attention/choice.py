"""Causal sliding-window attention: query t sees the keys t - window + 1 .. t.

Back ends: `banded` (plain PyTorch in tiles, everywhere), `sdpa` (no softcap), `flex_attention` (compiled, GPU) and
`flash_attn` (GPU, optional). A window of W means W keys, the query's own included, as in transformers.
"""

import math
from functools import cache

import torch
from torch.nn import functional as F

from flash_stu.errors import UserError
from flash_stu.ops import backends
from flash_stu.ops.attention.banded import banded_attention

BACKENDS = ("auto", "banded", "sdpa", "flex_attention", "flash_attn")
_WORTH_COMPILING = 512  # queries; flex_attention is compiled anew for every length, and prompts come in all lengths
_MASKED = -1e30  # finite, so that a row whose keys are all padding gives numbers, not NaN


def sliding_window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Attend to the last `window` keys; the last query is aligned with the last key.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim), keys >= queries; kv_heads divides heads.
        value: like key.
        window: number of keys a query sees, its own included.
        softcap: scores become softcap * tanh(score / softcap); None for plain scores.
        slopes: ALiBi slopes (heads,): slope * distance in tokens is subtracted from the capped score.
        key_mask: (batch, keys), False where a key is padding; None if there is none.
        dropout: probability of dropping an attention weight.
        backend: one of BACKENDS; "auto" takes flash_attn, then flex_attention on a GPU and for 512 queries or more,
            else banded.

    Returns:
        (batch, heads, queries, head_dim) in the query's dtype; the softmax is in float32, in `banded` with float64
        queries in float64.

    Raises:
        UserError: for an unknown or unavailable back end, or one that lacks what is asked of it.

    Source: Beltagy et al. 2020 (arXiv 2004.05150); softcap: Gemma 2 (arXiv 2408.00118); ALiBi: arXiv 2108.12409.
    """
    backend = _choose(backend, query, softcap, slopes, key_mask, dropout)
    if backend == "flash_attn":
        return _flash(query, key, value, window, softcap, slopes, dropout)
    if backend == "flex_attention":
        return _flex(query, key, value, window, softcap, slopes, key_mask)
    if backend == "sdpa":
        return _sdpa(query, key, value, window, slopes, key_mask, dropout)
    return banded_attention(query, key, value, window, softcap, slopes, key_mask, dropout)


def attend_to_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from one query to a window of keys in any order: what generation does for every token.

    Args:
        query: (batch, heads, 1, head_dim).
        key: (batch, kv_heads, window, head_dim).
        value: like key.
        visible: (batch, window), False where a key is not to be seen.
        softcap: as in sliding_window_attention.
        bias: added to the capped scores, (heads, window), float32; None for none.

    Returns:
        (batch, heads, 1, head_dim) in the query's dtype; the softmax is in float32.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = (query * head_dim**-0.5).view(batch, kv_heads, heads // kv_heads, head_dim)
    scores = (grouped @ key.transpose(-1, -2)).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.view(kv_heads, heads // kv_heads, -1)
    weights = torch.where(visible[:, None, None], scores, _MASKED).softmax(dim=-1).to(value.dtype)
    return (weights @ value).view(batch, heads, 1, head_dim)


def _choose(backend, query, softcap, slopes, key_mask, dropout) -> str:
    if backend not in BACKENDS:
        raise UserError(f"attention back end is {backend!r}; allowed: {', '.join(BACKENDS)}")
    half = query.dtype in (torch.bfloat16, torch.float16)
    lacks = {
        "sdpa": "softcap" if softcap is not None else None,
        "flex_attention": "dropout" if dropout else None,
        "flash_attn": "a padding mask" if key_mask is not None else (None if half else "float32"),
    }
    if backend == "auto":
        if not query.is_cuda:
            return "banded"
        least = {"flash_attn": 1, "flex_attention": _WORTH_COMPILING}
        for name, queries in least.items():
            if lacks[name] is None and backends.why_not(name) is None and query.shape[2] >= queries:
                return name
        return "banded"
    if backend in ("flash_attn", "flex_attention"):
        backends.require("attention", backend)
    if lacks.get(backend):
        raise UserError(f"attention back end {backend!r} does not do {lacks[backend]}; use 'auto'")
    return backend


def _dense_mask(queries: int, keys: int, window: int, key_mask, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances (queries, keys) in tokens and what may be seen, (batch or 1, 1, queries, keys)."""
    rows = torch.arange(queries, device=device)[:, None] + keys - queries
    distance = rows - torch.arange(keys, device=device)
    visible = ((distance >= 0) & (distance < window))[None, None]
    if key_mask is not None:
        visible = visible & key_mask.bool()[:, None, None]
    return distance, visible


def _sdpa(query, key, value, window, slopes, key_mask, dropout):
    distance, visible = _dense_mask(query.shape[2], key.shape[2], window, key_mask, query.device)
    bias = torch.zeros((), device=query.device) if slopes is None else -slopes.view(-1, 1, 1) * distance
    mask = torch.where(visible, bias, _MASKED).to(query.dtype)
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped)


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _flex_band(queries: int, keys: int, window: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    def in_window(batch, head, row, column):
        distance = row + (keys - queries) - column
        return (distance >= 0) & (distance < window)

    return create_block_mask(in_window, None, None, queries, keys, device=device)


def _flex(query, key, value, window, softcap, slopes, key_mask):
    queries, keys = query.shape[2], key.shape[2]

    def modify(score, batch, head, row, column):
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[head] * (row + (keys - queries) - column)
        if key_mask is not None:
            score = torch.where(key_mask[batch, column], score, _MASKED)
        return score

    band = _flex_band(queries, keys, window, query.device)
    grouped = key.shape[1] != query.shape[1]
    return _compiled_flex()(query, key, value, score_mod=modify, block_mask=band, enable_gqa=grouped)


def _flash(query, key, value, window, softcap, slopes, dropout):
    from flash_attn import flash_attn_func

    y = flash_attn_func(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        dropout_p=dropout,
        causal=True,
        window_size=(window - 1, 0),  # flash-attn counts the keys before the query's own
        softcap=softcap or 0.0,
        alibi_slopes=slopes,
    )
    return y.transpose(1, 2)


def alibi_slopes(heads: int, scale: float = 1.0, device: torch.device | str | None = None) -> torch.Tensor:
    """ALiBi's slopes for any number of heads: geometric, the extra ones from the next power of two.

    Args:
        heads: number of attention heads.
        scale: factor on all slopes; below 1 the bias reaches further (arXiv 2310.13017 uses 0.25).
        device: where they are computed.

    Returns:
        (heads,), float32.

    Source: Press et al. 2022 (arXiv 2108.12409), section 3.
    """
    power = 1 << int(math.log2(heads))
    regular = torch.arange(1, power + 1, device=device) * (8 / power)
    extra = (2 * torch.arange(heads - power, device=device) + 1) * (4 / power)
    return torch.exp2(-torch.cat([regular, extra])) * scale
