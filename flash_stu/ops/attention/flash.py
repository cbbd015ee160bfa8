"""Sliding-window attention through the flash-attn package's CUDA kernels, for bf16 and fp16.

Import of the package is left to the call: `flash_stu.ops.backends` tells whether it is there.
"""

import torch


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    softcap: float | None = None,
    slopes: torch.Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = True,
) -> torch.Tensor:
    """As `banded_attention`, without padding; if not causal, a query sees as many keys after its own."""
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports] - optional

    y = flash_attn_func(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        dropout_p=dropout,
        causal=causal,
        window_size=(window - 1, 0 if causal else window - 1),  # flash-attn counts the keys before the query's own
        softcap=softcap or 0.0,
        alibi_slopes=slopes,
    )
    return y.transpose(1, 2)
