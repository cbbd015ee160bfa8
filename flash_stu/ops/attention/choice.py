"""Sliding-window attention: query t sees the keys t - window + 1 .. t, and up to t + window - 1 if it is not causal.

Back ends: `banded` (plain PyTorch in tiles, everywhere: the reference), `sdpa` (no softcap), `flex_attention`
(compiled, GPU) and `flash_attn` (GPU, optional). A window of W means W keys, the query's own included, as in
transformers.
"""

from typing import TYPE_CHECKING

import torch

from flash_stu.errors import UserError
from flash_stu.ops import backends
from flash_stu.ops.attention import BACKENDS
from flash_stu.ops.attention.banded import banded_attention
from flash_stu.ops.attention.dense import sdpa_attention
from flash_stu.ops.attention.flash import flash_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_WORTH_COMPILING = 512  # tokens


def shared_band(backend: str, length: int, window: int, device: torch.device) -> "BlockMask | None":
    """Returns what flex_attention in all layers shares in one call over whole sequences; None where it is not taken.

    To be called outside of compiled code, which would make it anew in every layer.
    """
    worth_it = backend == "auto" and device.type == "cuda" and length >= _WORTH_COMPILING
    if not (worth_it or backend == "flex_attention") or backends.why_not("flex_attention") is not None:
        return None
    from flash_stu.ops.attention.flex import window_band

    return window_band(length, length, window, device)


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
    band: "BlockMask | None" = None,
    causal: bool = True,
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
        backend: one of BACKENDS; "auto" takes flash_attn on a GPU, then flex_attention where there is a band, else
            banded, or sdpa if it is not causal.
        band: see `shared_band`. A prompt, which continues a cache and is of any length, has none.
        causal: a query does not see the window - 1 keys after its own; where it does, flash_attn and sdpa are there.

    Returns:
        (batch, heads, queries, head_dim) in the query's dtype; the softmax is in float32, in `banded` with float64
        queries in float64.

    Raises:
        UserError: for an unknown or unavailable back end, or one that lacks what is asked of it.

    Source: Beltagy et al. 2020 (arXiv 2004.05150); softcap: Gemma 2 (arXiv 2408.00118); ALiBi: arXiv 2108.12409.
    """
    backend = _choose(backend, query, softcap, key_mask, dropout, band is not None, causal)
    if backend == "flash_attn":
        return flash_attention(query, key, value, window, softcap, slopes, dropout, causal)
    if backend == "flex_attention":
        from flash_stu.ops.attention.flex import compiled_flex_attention  # takes a second to import

        return compiled_flex_attention(query, key, value, window, softcap, slopes, key_mask, band)
    if backend == "sdpa":
        return sdpa_attention(query, key, value, window, slopes, key_mask, dropout, causal)
    return banded_attention(query, key, value, window, softcap, slopes, key_mask, dropout)


def _choose(
    backend: str,
    query: torch.Tensor,
    softcap: float | None,
    key_mask: torch.Tensor | None,
    dropout: float,
    has_band: bool,
    causal: bool,
) -> str:
    if backend not in BACKENDS:
        raise UserError(f"attention back end is {backend!r}; allowed: {', '.join(BACKENDS)}")
    half = query.dtype in (torch.bfloat16, torch.float16)
    ahead = None if causal else "keys after the query"
    lacks = {
        "banded": ahead,
        "sdpa": "softcap" if softcap is not None else None,
        "flex_attention": ahead or ("dropout" if dropout else None),
        "flash_attn": "a padding mask" if key_mask is not None else (None if half else "float32"),
    }
    if backend == "auto":
        plain = "banded" if causal else "sdpa"
        if not query.is_cuda:
            return plain
        for name in ("flash_attn", "flex_attention") if has_band else ("flash_attn",):
            if lacks[name] is None and backends.why_not(name) is None:
                return name
        return plain
    if backend in ("flash_attn", "flex_attention"):
        backends.require("attention", backend)
    if lacks.get(backend):
        raise UserError(f"attention back end {backend!r} does not do {lacks[backend]}; use 'auto'")
    return backend
