"""RMSNorm against its formula in float64, few rows and many, forward and backward."""

import pytest
import torch

from flash_stu.model.layers.norm import RMSNorm
from flash_stu.ops.rms_norm import rms_norm


def formula(x, weight, eps):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("rows", [(1, 1), (3, 7), (2, 501)])  # 501: by this package, where there is no GPU
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # so small that eps counts
def test_values_and_gradients(rows, scale):
    torch.manual_seed(0)
    x, weight, grad = scale * torch.randn(*rows, 37), torch.randn(37), torch.randn(*rows, 37)
    results = []
    for dtype, function in ((torch.float32, rms_norm), (torch.float64, formula)):
        inputs = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        y = function(*inputs, 1e-6)
        results.append([y, *torch.autograd.grad(y, inputs, grad.to(dtype))])
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@torch.no_grad()
def test_one_row_of_a_step(scale):
    torch.manual_seed(0)
    x, weight = scale * torch.randn(1, 1, 37), torch.randn(37)
    exact = formula(x.double(), weight.double(), 1e-6)
    y = rms_norm(x, weight, 1e-6)
    assert y.dtype == torch.float32 and y.shape == x.shape
    assert (y - exact).norm() <= 1e-6 * exact.norm()


def test_gradients_by_finite_differences():
    x = torch.randn(5, 4096, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4096, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: rms_norm(*inputs, 0.1), (x, weight), fast_mode=True)


@pytest.mark.parametrize("rows", [1, 501])
def test_the_outputs_have_the_inputs_dtype(rows):
    norm = RMSNorm(37, 1e-6)
    for dtype in (torch.bfloat16, torch.float64):
        y = norm(torch.ones(rows, 37, dtype=dtype))
        assert y.dtype == dtype and (y - 1).abs().max() < 1e-6
        y.sum().backward()
    assert norm.weight.grad.dtype == torch.float32
    assert [*norm.state_dict()] == ["weight"]
