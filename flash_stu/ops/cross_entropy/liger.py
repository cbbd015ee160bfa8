"""Cross entropy of a linear head by Liger's fused Triton kernels.

Import of the package is left to the call: `flash_stu.ops.backends` tells whether it is there.
"""

import torch

from flash_stu.ops.cross_entropy import IGNORED
from flash_stu.ops.cross_entropy.chunked import chunk_bytes


def liger_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    count: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As chunked_loss; the weight gets no gradient where the hidden states have none."""
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports] - optional
        liger_fused_linear_cross_entropy,
    )

    # Its chunks grow with the number of tokens and shrink with vocabulary / hidden_size, down to a few hundred tokens,
    # which leaves a GPU waiting for memory: let them be the largest power of two of rows that a chunk's bytes hold.
    (tokens, size), vocabulary = hidden.shape, len(weight)
    rows = 1 << (max(1, chunk_bytes(hidden.device) // (dtype.itemsize * vocabulary)).bit_length() - 1)
    total = liger_fused_linear_cross_entropy(
        hidden.to(dtype),
        weight.to(dtype),  # once, not in every chunk
        labels,
        bias=None if bias is None else bias.to(dtype),
        ignore_index=IGNORED,
        reduction="sum",  # its mean over no token at all would be 0
        accum_dtype=torch.float32,
        chunk_mem_const=max(1, rows * vocabulary // (tokens * size)),
    )
    return total / count
