"""Sliding-window attention: every back end against a loop over queries."""

import math

import pytest
import torch

from flash_stu.errors import UserError
from flash_stu.ops.attention.choice import sliding_window_attention
from flash_stu.ops.positions import alibi_slopes, rotary_angles, rotate


def oracle(query, key, value, window, softcap=None, slopes=None, key_mask=None):
    batch, heads, queries, head_dim = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    y = torch.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                last = keys - queries + i
                seen = [j for j in range(max(0, last - window + 1), last + 1)]
                if key_mask is not None:
                    seen = [j for j in seen if key_mask[b, j]]
                scores = key[b, h // group, seen] @ query[b, h, i] / math.sqrt(head_dim)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if slopes is not None:
                    scores = scores - slopes[h] * (last - torch.tensor(seen, dtype=scores.dtype))
                y[b, h, i] = scores.softmax(0) @ value[b, h // group, seen]
    return y


def tensors(queries, keys, heads=4, kv_heads=2, head_dim=6):
    torch.manual_seed(0)
    return (
        2 * torch.randn(2, heads, queries, head_dim, dtype=torch.float64),
        2 * torch.randn(2, kv_heads, keys, head_dim, dtype=torch.float64),
        torch.randn(2, kv_heads, keys, head_dim, dtype=torch.float64),
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("queries", "keys", "window"), [(1, 1, 3), (7, 7, 1), (301, 301, 16), (150, 163, 70), (1, 40, 8), (33, 33, 90)]
)
@pytest.mark.parametrize("backend", ["banded", "sdpa"])
def test_against_a_loop(queries, keys, window, backend, kv_heads):
    q, k, v = tensors(queries, keys, kv_heads=kv_heads)
    y = sliding_window_attention(q, k, v, window, backend=backend)
    torch.testing.assert_close(y, oracle(q, k, v, window))


def test_softcap_alibi_and_padding_together():
    q, k, v = tensors(131, 131)
    slopes = alibi_slopes(4)
    mask = torch.ones(2, 131, dtype=torch.bool)
    mask[1, :9] = False
    y = sliding_window_attention(q, k, v, 20, softcap=3.0, slopes=slopes, key_mask=mask)
    expected = oracle(q, k, v, 20, 3.0, slopes, mask)
    torch.testing.assert_close(y[0], expected[0], atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(y[1, :, 9:], expected[1, :, 9:], atol=5e-6, rtol=1e-5)
    assert torch.isfinite(y).all()  # queries that see only padding too


def test_gradients_agree_between_back_ends():
    q, k, v = (t.float().requires_grad_() for t in tensors(75, 75))
    weight = torch.randn(2, 4, 75, 6)
    grads = [
        torch.autograd.grad((sliding_window_attention(q, k, v, 9, backend=b) * weight).sum(), (q, k, v))
        for b in ("banded", "sdpa")
    ]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_window_counts_the_query_itself():
    _, k, v = tensors(9, 9)
    q = torch.zeros(2, 4, 9, 6, dtype=torch.float64)  # equal weights: the output is the mean of the window
    y = sliding_window_attention(q, k, v, 3)
    torch.testing.assert_close(y[0, 0, 8], v[0, 0, 6:9].mean(0), atol=1e-6, rtol=0)


def test_alibi_slopes():
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    torch.testing.assert_close(alibi_slopes(3, 0.25), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]) / 4)


def test_rotary_is_relative_and_exact_far_out():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i, j):
        a = rotate(q, *rotary_angles(torch.tensor([[i]]), 16, 1e4))
        b = rotate(k, *rotary_angles(torch.tensor([[j]]), 16, 1e4))
        return (a * b).sum()

    torch.testing.assert_close(score(1_000_005, 1_000_000), score(5, 0), atol=1e-5, rtol=0)
    assert abs(score(6, 0) - score(5, 0)) > 1e-3


def test_bad_choices():
    q, k, v = (t.float() for t in tensors(3, 3))
    with pytest.raises(UserError, match="attention back end is 'xformers'; allowed: auto, banded"):
        sliding_window_attention(q, k, v, 2, backend="xformers")
    with pytest.raises(UserError, match="'sdpa' does not do softcap"):
        sliding_window_attention(q, k, v, 2, softcap=5.0, backend="sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a machine without a GPU")
@pytest.mark.parametrize("backend", ["flash_attn", "flex_attention"])
def test_missing_accelerator_says_why(backend):
    q, k, v = (t.float() for t in tensors(3, 3))
    with pytest.raises(UserError, match=f"'{backend}' is not available: it needs a CUDA GPU"):
        sliding_window_attention(q, k, v, 2, backend=backend)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and FLASH_STU_GPU_TESTS=1")
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_flex_attention_on_a_gpu(softcap):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 500, 64) for _ in range(3))
    expected = sliding_window_attention(q, k, v, 100, softcap)
    y = sliding_window_attention(q.cuda(), k.cuda(), v.cuda(), 100, softcap, backend="flex_attention")
    torch.testing.assert_close(y.cpu(), expected, atol=2e-3, rtol=1e-2)
