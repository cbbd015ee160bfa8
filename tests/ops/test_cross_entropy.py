"""The chunked loss against the plain one, in value, gradient and memory behaviour."""

import pytest
import torch
from torch.nn import functional as F

from flash_stu.ops import cross_entropy
from flash_stu.ops.cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_equals_the_plain_loss(monkeypatch, chunk_tokens):
    torch.manual_seed(0)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_tokens * 4 * 53)
    hidden = torch.randn(2, 13, 8, requires_grad=True)
    weight = torch.randn(53, 8, requires_grad=True)
    bias = torch.randn(53, requires_grad=True)
    labels = torch.randint(0, 53, (2, 13))
    labels[0, :5] = -100
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    plain = F.cross_entropy((hidden @ weight.t() + bias).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    parameters = (hidden, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(plain, parameters))
