"""The softmax of the chunked loss as one Triton kernel: logits in, losses and d loss / d logits out, in place.

One program takes one row. It goes through the row for the largest logit and the sum of the exponentials (online
softmax), and back for the gradient: backwards, since the end of the row is what the caches still hold. Nothing is held
in another type than that of the products; the arithmetic is float32.

Import this module only where flash_stu.ops.backends accepts "triton". With TRITON_INTERPRET=1 it runs on a CPU.

Source: Milakov, Gimelshein 2018, Online normalizer calculation for softmax (arXiv 1805.02867), algorithm 3.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from flash_stu.ops.cross_entropy import IGNORED

ALIGNMENT = 64  # of the logits' columns: so that rows are read 16 bytes at a time, and for the matrix products
_LOADS = 1024  # of 16 bytes in a block: two for each thread
_OPTIONS = {"num_warps": 16, "maxnreg": 64}  # two programs fit a multiprocessor of an H100; nothing is timed yet
_IGNORED = tl.constexpr(IGNORED)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite: -inf - -inf is no number


@triton.jit
def _logits(
    row: tl.tensor, bias: tl.tensor, columns: tl.tensor, words: tl.tensor, stride: tl.tensor, BIASED: tl.constexpr
) -> tl.tensor:
    """The logits in some columns of a row, float32; -inf beyond the last word."""
    x = tl.load(row + columns, mask=columns < stride, other=0.0).to(tl.float32)
    if BIASED:
        x += tl.load(bias + columns, mask=columns < words, other=0.0).to(tl.float32)
    return tl.where(columns < words, x, float("-inf"))


@triton.jit
def _softmax_kernel(
    logits: tl.tensor,
    bias: tl.tensor,
    labels: tl.tensor,
    share: tl.tensor,
    losses: tl.tensor,
    words: tl.tensor,
    stride: tl.tensor,
    LOADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BIASED: tl.constexpr,
    GRADIENT: tl.constexpr,
) -> None:
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    label, part = tl.load(labels + index), tl.load(share + index)
    known = (label >= 0) & (label < words)  # a label that is no word's gives NaN, unless it is ignored
    at_label = tl.load(row + label, mask=known, other=float("nan")).to(tl.float32)
    if BIASED:
        at_label += tl.load(bias + label, mask=known, other=0.0).to(tl.float32)

    block: tl.constexpr = LOADS * WIDTH
    # what one thread loads at a time lies in one line of this block, and has a maximum and a sum of its own
    within = tl.arange(0, LOADS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    largest = tl.full((LOADS,), _LOWEST, tl.float32)
    total = tl.zeros((LOADS,), tl.float32)
    blocks = (words + block - 1) // block
    for number in range(0, blocks):
        x = _logits(row, bias, number * block + within, words, stride, BIASED)
        above = tl.maximum(largest, tl.max(x, axis=1))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(x - above[:, None]), axis=1)
        largest = above
    top = tl.max(largest, axis=0)
    sum_of_all = tl.sum(total * tl.exp(largest - top), axis=0)
    tl.store(losses + index, tl.where(label == _IGNORED, 0.0, top - at_label + tl.log(sum_of_all)))

    if GRADIENT:
        scale = part / sum_of_all
        for number in range(0, blocks):
            columns = (blocks - 1 - number) * block + within
            x = _logits(row, bias, columns, words, stride, BIASED)
            gradient = tl.exp(x - top) * scale - tl.where(columns == label.to(tl.int32), part, 0.0)
            tl.store(row + columns, gradient.to(logits.dtype.element_ty), mask=columns < stride)


@torch.library.custom_op("flash_stu::softmax_cross_entropy", mutates_args=("logits",))
def softmax_cross_entropy(
    logits: torch.Tensor,
    words: int,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    share: torch.Tensor,
    gradient: bool,
) -> torch.Tensor:
    """Cross entropies of rows of logits, which the gradient of their weighted sum replaces.

    Args:
        logits: (rows, columns), float32 or bf16, contiguous, columns a multiple of ALIGNMENT; changed in place if the
            gradient is wanted.
        words: of the columns, the first so many count; the gradient of the others is 0.
        bias: (words,), added to the logits first, or None.
        labels: (rows,), the word that counts, or IGNORED.
        share: (rows,), float32, weights of the rows in the sum.
        gradient: whether it is wanted.

    Returns:
        losses (rows,), float32, of which those of ignored labels are 0.
    """
    losses = torch.empty_like(share)
    launch: Any = _softmax_kernel[(len(logits),)]
    launch(
        logits,
        logits if bias is None else bias.contiguous(),
        labels,
        share,
        losses,
        words,
        logits.shape[1],
        LOADS=_LOADS,
        WIDTH=16 // logits.itemsize,
        BIASED=bias is not None,
        GRADIENT=gradient,
        **_OPTIONS,
    )
    return losses


@softmax_cross_entropy.register_fake
def _(*operands: Any) -> torch.Tensor:
    *_, share, _ = operands
    return torch.empty_like(share)
