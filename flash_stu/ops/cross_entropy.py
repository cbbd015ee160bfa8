"""Cross entropy of a linear head, without ever holding the logits of a long sequence.

Back ends: `chunked` (plain PyTorch, everywhere) and `liger` (Liger's fused Triton kernels, CUDA, optional). Both take
the tokens in chunks and work out the gradients in the forward pass, while a chunk's logits are there: no product is
computed twice, and what is kept for the backward pass is the gradients themselves.
"""

from typing import Any, NamedTuple

import torch

from flash_stu.errors import UserError
from flash_stu.ops import backends

BACKENDS = ("auto", "chunked", "liger")
CHUNK_BYTES = 384 * 2**20  # of logits at a time, in all the forms in which they are held
_TILE = 128  # rows of a chunk in multiples of this: whole tiles of tensor cores, and on CPUs the sums' usual order
IGNORED = -100  # the label of a position that does not count


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
        backend: one of BACKENDS; "auto" takes liger on a GPU that has it, else chunked.
        items: what the sum is divided by; by default the number of positions that count, here.

    Returns:
        the mean loss over the counted positions in nats, scalar, float32 (float64 for float64 weights); NaN if none
        counts, as in PyTorch, and 0 if none counts but items are given.

    Raises:
        UserError: if the back end is unknown or not available.
    """
    run = _liger if _choose(backend, hidden, weight) == "liger" else _chunked
    labels = labels.flatten()
    count = (labels != IGNORED).sum() if items is None else torch.as_tensor(items, device=labels.device)
    return run(hidden.flatten(0, -2), weight, labels, bias, count, _product_dtype(weight))


def _choose(backend: str, hidden: torch.Tensor, weight: torch.Tensor) -> str:
    if backend not in BACKENDS:
        raise UserError(f"loss back end is {backend!r}; allowed: {', '.join(BACKENDS)}")
    # Liger gives the weight no gradient where the hidden states have none
    suits = hidden.requires_grad or not (weight.requires_grad and torch.is_grad_enabled())
    if backend == "auto":
        return "liger" if suits and hidden.is_cuda and backends.why_not("liger") is None else "chunked"
    if backend == "liger":
        backends.require("loss", backend)
        if not suits:
            raise UserError("loss back end 'liger' does not train a head on frozen hidden states; use 'auto'")
    return backend


def _product_dtype(weight: torch.Tensor) -> torch.dtype:
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return torch.float32 if dtype == torch.float16 else dtype  # too narrow for gradients that are not scaled up


class Gradients(NamedTuple):
    """Gradients of the mean loss, in the shapes and types of what they belong to; None where not wanted."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def _chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    count: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(hidden, weight, labels, bias, count, dtype)
    return _sweep(hidden, weight, labels, bias, count, dtype, wanted=(False, False, False))[0]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        count: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        ctx.again = (dtype, wanted)
        ctx.save_for_backward(hidden, weight, labels, bias, count)
        loss, ctx.gradients = _sweep(hidden, weight, labels, bias, count, dtype, wanted)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - once_differentiable loses the names
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        # Scaled in place and given away, so that the weight's gradient can become weight.grad without being copied;
        # a second backward through a retained graph works it out again.
        gradients, ctx.gradients = ctx.gradients or _sweep(*ctx.saved_tensors, *ctx.again)[1], None
        hidden, weight, bias = (None if g is None else g.mul_(grad_outputs[0]) for g in gradients)
        return hidden, weight, None, bias, None, None


@torch.no_grad()
def _sweep(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    count: torch.Tensor,
    dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, Gradients]:
    """The mean loss and its gradients, a chunk of tokens at a time.

    Args:
        hidden: (tokens, hidden_size).
        weight: (vocab_size, hidden_size).
        labels: (tokens,).
        bias: (vocab_size,) or None.
        count: what sums over the tokens are divided by, a scalar.
        dtype: of the matrix products.
        wanted: which of the gradients of hidden, weight and bias are wanted.
    """
    tokens, vocabulary = len(labels), len(weight)
    wide = torch.promote_types(dtype, torch.float32)
    narrow = dtype != wide
    held = wide.itemsize + (dtype.itemsize if narrow else 0)
    rows = CHUNK_BYTES // (held * vocabulary)
    rows = max(1, min(tokens, rows // _TILE * _TILE or rows))
    buffer = hidden.new_empty(rows, vocabulary, dtype=wide)
    products = hidden.new_empty(rows, vocabulary, dtype=dtype) if narrow else buffer

    matrix = weight.to(dtype)
    losses = hidden.new_empty(tokens, dtype=wide)
    counted = labels != IGNORED
    share = (counted.to(wide) / count).nan_to_num_()  # of a token in the mean; 0 / 0 if none counts
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    grad_bias = torch.zeros_like(weight[:, 0], dtype=wide) if wanted[2] else None

    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            inputs = hidden[part].to(dtype)
            target = labels[part, None].where(counted[part, None], 0)
            logits, low = buffer[: len(inputs)], products[: len(inputs)]

            torch.mm(inputs, matrix.t(), out=low)
            if narrow:
                logits.copy_(low)
            if bias is not None:
                logits.add_(bias)
            # From here on everything happens in place: logits -> exp(logits - largest) -> d loss / d logits.
            at_target = logits.gather(1, target)
            largest = logits.amax(1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(1, keepdim=True)
            losses[part] = (largest - at_target).add_(total.log()).squeeze(1)
            if not any(wanted):
                continue
            logits.scatter_add_(1, target, -total)
            logits.mul_(share[part, None] / total)
            if narrow:
                low.copy_(logits)

            if grad_hidden is not None:
                grad_hidden[part] = torch.mm(low, matrix)
            if grad_bias is not None:
                grad_bias += logits.sum(0)
            if grad_weight is None:
                continue
            if narrow and low.is_cuda:  # tensor cores, adding up in float32
                torch.addmm(grad_weight, low.t(), inputs, out_dtype=wide, out=grad_weight)
            else:
                torch.addmm(grad_weight, logits.t(), inputs.to(wide), out=grad_weight)

    loss = torch.where(counted, losses, 0).sum() / count
    return loss, Gradients(
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def _liger(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    count: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports] - optional
        liger_fused_linear_cross_entropy,
    )

    # Its chunks grow with the number of tokens and shrink with vocabulary / hidden_size, down to a few hundred tokens,
    # which leaves a GPU waiting for memory: let them be the largest power of two of rows that CHUNK_BYTES holds.
    (tokens, size), vocabulary = hidden.shape, len(weight)
    rows = 1 << (max(1, CHUNK_BYTES // (dtype.itemsize * vocabulary)).bit_length() - 1)
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
