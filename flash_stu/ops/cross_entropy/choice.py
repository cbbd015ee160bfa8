"""Cross entropy of a linear head, without ever holding the logits of a long sequence.

Back ends: `chunked` (plain PyTorch, everywhere), `triton` (the same with the softmax as one kernel, on a GPU) and
`liger` (Liger's fused Triton kernels, CUDA, optional). All take the tokens in chunks and work out the gradients in the
forward pass, while a chunk's logits are there: no product is computed twice, and what is kept for the backward pass is
the gradients themselves.
"""

import torch

from flash_stu.errors import UserError
from flash_stu.ops import backends
from flash_stu.ops.cross_entropy import BACKENDS, IGNORED
from flash_stu.ops.cross_entropy.chunked import chunked_loss
from flash_stu.ops.cross_entropy.liger import liger_loss

_TRITON_DTYPES = (torch.float32, torch.bfloat16)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
    items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean cross entropy of softmax(hidden @ weight^T + bias).

    Under autocast, and with weights in bfloat16, the products are in bfloat16; the softmax is in float32 and so are the
    sums of the weight's gradient.

    Args:
        hidden: (batch, length, hidden_size), or any other leading dimensions.
        weight: (vocab_size, hidden_size).
        labels: token ids, (batch, length); -100 marks a position that does not count.
        bias: (vocab_size,) or None.
        backend: one of BACKENDS; "auto" takes triton on a GPU and for products in float32 or bfloat16, else chunked.
        items: what the sum is divided by; by default the number of positions that count, here.

    Returns:
        the mean loss over the counted positions in nats, scalar, float32 (float64 for float64 weights); NaN if none
        counts, as in PyTorch, and 0 if none counts but items are given.

    Raises:
        UserError: if the back end is unknown or not available, or does not do what is asked of it.
    """
    dtype = _product_dtype(weight)
    backend = _choose(backend, hidden, weight, dtype)
    labels = labels.flatten()
    if items is None:
        count = (labels != IGNORED).sum()
    else:  # a number is written by a kernel: copying one to a GPU would wait for it
        count = items.to(labels.device) if isinstance(items, torch.Tensor) else labels.new_full((), items)
    operands = (hidden.flatten(0, -2), weight, labels, bias, count, dtype)
    return liger_loss(*operands) if backend == "liger" else chunked_loss(*operands, fused=backend == "triton")


def _choose(backend: str, hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> str:
    if backend not in BACKENDS:
        raise UserError(f"loss back end is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "auto":
        fits = hidden.is_cuda and dtype in _TRITON_DTYPES
        return "triton" if fits and backends.why_not("triton") is None else "chunked"
    if backend in ("triton", "liger"):
        backends.require("loss", backend)
    if backend == "triton" and dtype not in _TRITON_DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"loss back end 'triton' does not do {name}; use 'auto'")
    # Liger gives the weight no gradient where the hidden states have none
    if backend == "liger" and weight.requires_grad and torch.is_grad_enabled() and not hidden.requires_grad:
        raise UserError("loss back end 'liger' does not train a head on frozen hidden states; use 'auto'")
    return backend


def _product_dtype(weight: torch.Tensor) -> torch.dtype:
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return torch.float32 if dtype == torch.float16 else dtype  # too narrow for gradients that are not scaled up
