"""Causal convolution: every back end against the definition, forward and backward."""

import pytest
import torch

from flash_stu.errors import UserError
from flash_stu.ops.conv.choice import causal_conv
from flash_stu.ops.conv.fft import fft_size


def oracle(x, filters, dilation):
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(filters.shape[0]):
            if t - dilation * j >= 0:
                y[:, t] += filters[j] * x[:, t - dilation * j]
    return y


@pytest.mark.parametrize("backend", ["direct", "fft", "auto"])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize(("length", "taps"), [(1, 1), (2, 5), (13, 13), (37, 4), (37, 50)])
def test_against_the_definition(backend, dilation, length, taps):
    torch.manual_seed(0)
    x = torch.randn(3, length, 5, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(taps, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, length, 5, dtype=torch.float64)
    expected = oracle(x.detach(), filters.detach(), dilation)
    y = causal_conv(x, filters, backend, dilation)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)

    got = torch.autograd.grad((y * weight).sum(), (x, filters))
    reference = causal_conv(x, filters, "direct", dilation)
    torch.testing.assert_close(got, torch.autograd.grad((reference * weight).sum(), (x, filters)))


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: causal_conv(a, b, "fft", 2), (x, filters))


@pytest.mark.parametrize("backend", ["direct", "fft"])
def test_bf16_inputs_accumulate_in_float32(backend):
    torch.manual_seed(0)
    x, filters = torch.randn(2, 1001, 4).bfloat16(), torch.randn(1001, 4) / 30
    y = causal_conv(x, filters, backend)
    assert y.dtype == torch.bfloat16
    exact = causal_conv(x.double(), filters.double())
    # one rounding of the result to bf16, nothing that grows with the length
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


def test_the_future_does_not_leak():
    torch.manual_seed(0)
    x, filters = torch.randn(1, 300, 2), torch.randn(300, 2)
    changed = x.clone()
    changed[:, 200:] += 100
    y, z = causal_conv(x, filters), causal_conv(changed, filters)
    torch.testing.assert_close(y[:, :200], z[:, :200], atol=1e-3, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 17, 100, 1000, 4097])
def test_fft_size_never_wraps(length):
    size = fft_size(length, length)
    assert 2 * length - 1 <= size <= 2.3 * length
    for factor in (2, 3, 5):
        while size % factor == 0:
            size //= factor
    assert size == 1


def test_fft_path_compiles_to_one_graph():
    x, filters = torch.randn(2, 33, 4, requires_grad=True), torch.randn(33, 4, requires_grad=True)

    def function(x, filters):
        return causal_conv(x.sin(), filters, "fft", 2).cos()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, filters), function(x, filters))
    got = torch.autograd.grad(compiled(x, filters).sum(), (x, filters))
    torch.testing.assert_close(got, torch.autograd.grad(function(x, filters).sum(), (x, filters)))


def test_operator_is_registered_soundly():
    x, filters = torch.randn(2, 8, 1, 3, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.flash_stu.fft_conv.default, (x, filters))


def test_bad_arguments():
    x, filters = torch.zeros(1, 4, 2), torch.zeros(4, 2)
    with pytest.raises(UserError, match="convolution back end is 'cuda'; allowed: auto, direct, fft"):
        causal_conv(x, filters, "cuda")
    with pytest.raises(UserError, match=r"got \(1, 4, 2\) and \(4, 3\)"):
        causal_conv(x, torch.zeros(4, 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a machine without a GPU")
def test_missing_accelerator_says_why():
    with pytest.raises(UserError, match="'flashfftconv' is not available: it needs a CUDA GPU"):
        causal_conv(torch.zeros(1, 4, 2), torch.zeros(4, 2), "flashfftconv")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and FLASH_STU_GPU_TESTS=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    torch.manual_seed(0)
    x, filters = torch.randn(2, 1001, 64), torch.randn(1001, 64) / 30
    y = causal_conv(x.to("cuda", dtype), filters.cuda(), "auto", 2).double().cpu()
    exact = causal_conv(x.to(dtype).double(), filters.double(), "fft", 2)
    assert (y - exact).norm() / exact.norm() < (2e-2 if dtype == torch.bfloat16 else 1e-5)
