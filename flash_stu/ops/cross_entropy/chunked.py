"""Cross entropy of a linear head, a chunk of tokens at a time: the softmax in plain PyTorch, or as a Triton kernel."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from flash_stu.ops.cross_entropy import IGNORED

# Of logits at a time, in all the forms in which they are held. With every chunk the weight and its float32 gradient are
# read again, which takes a GPU longer than a CPU, and it has the memory to do so less often.
CHUNK_BYTES = {"cpu": 384 * 2**20, "cuda": 2 * 2**30}
_TILE = 128  # rows of a chunk in multiples of this: whole tiles of tensor cores, and on CPUs the sums' usual order


class Gradients(NamedTuple):
    """Gradients of the mean loss, in the shapes and types of what they belong to; None where not wanted."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def chunk_bytes(device: torch.device) -> int:
    """Returns how many bytes of logits a device holds at a time."""
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    count: torch.Tensor,
    dtype: torch.dtype,
    fused: bool = False,
) -> torch.Tensor:
    """Sum of the cross entropies of softmax(hidden @ weight^T + bias), divided by `count`.

    Args:
        hidden: (tokens, hidden_size).
        weight: (vocab_size, hidden_size).
        labels: (tokens,), IGNORED where a token does not count.
        bias: (vocab_size,) or None.
        count: what sums over the tokens are divided by, a scalar.
        dtype: of the matrix products.
        fused: the softmax is the Triton kernel, for products in float32 and bf16.

    Returns:
        scalar, in `dtype` or float32, whichever is wider.
    """
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(hidden, weight, labels, bias, count, dtype, fused)
    return loss_and_gradients(hidden, weight, labels, bias, count, dtype, fused, wanted=(False, False, False))[0]


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
        fused: bool,
    ) -> torch.Tensor:
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        ctx.again = (dtype, fused, wanted)
        ctx.save_for_backward(hidden, weight, labels, bias, count)
        loss, ctx.gradients = loss_and_gradients(hidden, weight, labels, bias, count, dtype, fused, wanted)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - once_differentiable loses the names
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        # Scaled in place and given away, so that the weight's gradient can become weight.grad without being copied;
        # a second backward through a retained graph works it out again.
        gradients, ctx.gradients = ctx.gradients or loss_and_gradients(*ctx.saved_tensors, *ctx.again)[1], None
        hidden, weight, bias = (None if g is None else g.mul_(grad_outputs[0]) for g in gradients)
        return hidden, weight, None, bias, None, None, None


@torch.no_grad()
def loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    count: torch.Tensor,
    dtype: torch.dtype,
    fused: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, Gradients]:
    """The loss of `chunked_loss`, and those of its gradients of hidden, weight and bias that are wanted."""
    tokens, vocabulary = len(labels), len(weight)
    wide = torch.promote_types(dtype, torch.float32)
    narrow = dtype != wide
    copied = narrow and not fused  # into the type of the sums
    matrix, softmax = weight.to(dtype), None
    if fused:
        from flash_stu.ops.cross_entropy.triton import ALIGNMENT, softmax_cross_entropy

        softmax = softmax_cross_entropy
        if missing := -vocabulary % ALIGNMENT:  # words that there are not, whose gradients are 0
            matrix = pad(matrix, (0, 0, 0, missing))
    columns = len(matrix)
    rows = chunk_bytes(hidden.device) // ((dtype.itemsize + copied * wide.itemsize) * columns)
    rows = max(1, min(tokens, rows // _TILE * _TILE or rows))
    products = hidden.new_empty(rows, columns, dtype=dtype)
    buffer = hidden.new_empty(rows, columns, dtype=wide) if copied else products

    losses = hidden.new_empty(tokens, dtype=wide)
    counted = labels != IGNORED
    share = (counted.to(wide) / count).nan_to_num_()  # of a token in the mean; 0 / 0 if none counts
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    grad_bias = weight.new_zeros(vocabulary, dtype=wide) if wanted[2] else None

    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, tokens, rows):
            part = partial(torch.narrow, dim=0, start=start, length=min(rows, tokens - start))
            inputs = part(hidden).to(dtype)
            low, gradient = (tensor.narrow(0, 0, len(inputs)) for tensor in (products, buffer))

            torch.mm(inputs, matrix.t(), out=low)
            options = (bias, part(labels), part(share), any(wanted))
            if softmax is not None:
                part(losses).copy_(softmax(low, vocabulary, *options))
            else:
                if copied:
                    gradient.copy_(low)
                part(losses).copy_(_softmax_cross_entropy(gradient, *options))
            if not any(wanted):
                continue
            if copied:
                low.copy_(gradient)

            if grad_hidden is not None:
                part(grad_hidden).copy_(torch.mm(low, matrix))
            low, gradient = (tensor.narrow(1, 0, vocabulary) for tensor in (low, gradient))
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=wide)
            if grad_weight is None:
                continue
            if narrow and (fused or low.is_cuda):
                _add_product(grad_weight, low.t(), inputs)
            else:
                torch.addmm(grad_weight, gradient.t(), inputs.to(wide), out=grad_weight)

    loss = torch.where(counted, losses, 0).sum() / count
    return loss, Gradients(
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def _softmax_cross_entropy(
    logits: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, share: torch.Tensor, gradient: bool
) -> torch.Tensor:
    """As that of flash_stu.ops.cross_entropy.triton; the logits are overwritten in any case, and the losses of ignored
    labels are any numbers."""
    if bias is not None:
        logits.add_(bias)
    # From here on everything happens in place: logits -> exp(logits - largest) -> d loss / d logits.
    target = labels[:, None].where(labels[:, None] != IGNORED, 0)
    at_target = logits.gather(1, target)
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    losses = (largest - at_target).add_(total.log()).squeeze(1)
    if gradient:
        logits.scatter_add_(1, target, -total)
        logits.mul_(share[:, None] / total)
    return losses


@torch.library.custom_op("flash_stu::add_product", mutates_args=("total",))
def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right of a narrower type to a float32 total; a GPU's tensor cores add up in float32.

    An operator of its own, since Inductor does not know the form of addmm with an out_dtype.
    """
    if total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), out=total)


@_add_product.register_fake
def _(*_: torch.Tensor) -> None:
    return None
