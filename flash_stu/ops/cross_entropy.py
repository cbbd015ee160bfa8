"""Cross entropy of a linear head, without ever holding the logits of a long sequence."""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 256 * 2**20  # of float32 logits at a time


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross entropy of softmax(hidden @ weight^T + bias), a chunk of tokens at a time.

    With more than one chunk the logits are computed again for the gradient instead of being kept.

    Args:
        hidden: (batch, length, hidden_size).
        weight: (vocab_size, hidden_size).
        labels: token ids, (batch, length); -100 marks a position that does not count.
        bias: (vocab_size,) or None.

    Returns:
        the mean loss over the counted positions in nats, float32 scalar; NaN if none counts, as in PyTorch.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    chunk = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    if len(labels) <= chunk:
        total = _summed_loss(hidden, weight, labels, bias)
    else:
        total = sum(
            checkpoint(_summed_loss, h, weight, target, bias, use_reentrant=False)
            for h, target in zip(hidden.split(chunk), labels.split(chunk), strict=True)
        )
    return total / (labels != -100).sum()


def _summed_loss(hidden, weight, labels, bias):
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")
