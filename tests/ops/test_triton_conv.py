"""The Triton kernels against the PyTorch form: interpreted on a CPU, compiled where there is a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from flash_stu.errors import UserError
from flash_stu.ops.chunked_conv import chunked_conv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs the package triton, and a CUDA GPU or TRITON_INTERPRET=1",
)

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [
    # batch, length, channels, chunk, states, dilation
    (2, 37, 3, 16, 3, 1),
    (1, 67, 34, 16, 18, 2),
    (1, 1, 2, 16, 1, 3),
]
if DEVICE == "cuda":
    SHAPES += [(2, 1001, 65, 32, 32, 2), (3, 4097, 130, 32, 40, 1), (1, 300, 32, 64, 64, 1)]


@needs_triton
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels are tested in this process")
def test_interpreted_in_a_process_of_its_own():
    """Triton reads TRITON_INTERPRET when a kernel is defined."""
    command = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout


def draw(shape, dtype):
    batch, length, channels, chunk, states, dilation = shape
    torch.manual_seed(0)
    x = torch.randn(batch, length, channels).to(DEVICE, dtype).requires_grad_()
    taps = torch.randn(2 * chunk, channels, device=DEVICE, requires_grad=True)
    decay = torch.rand(states, dtype=torch.float64, device=DEVICE) * 1.8 - 0.9
    readout = (torch.randn(states, channels, device=DEVICE) / 3).requires_grad_()
    return x, taps, decay, readout, dilation


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[0], torch.float16), (SHAPES[-2], torch.bfloat16)],
)
def test_against_the_pytorch_form(shape, dtype):
    from flash_stu.ops.triton_conv import triton_conv

    x, taps, decay, readout, dilation = draw(shape, dtype)
    y = triton_conv(x, taps, decay, readout, dilation)
    assert y.dtype == dtype
    weight = torch.randn_like(y)
    got = (y, *torch.autograd.grad((y * weight).sum(), (x, taps, readout)))
    x64, taps64, readout64 = (t.detach().double().requires_grad_() for t in (x, taps, readout))
    exact, _ = chunked_conv(x64, taps64, decay, readout64, None, dilation)
    expected = (exact, *torch.autograd.grad((exact * weight.double()).sum(), (x64, taps64, readout64)))
    for result, reference in zip(got, expected, strict=True):
        assert (result.double() - reference).norm() <= TOLERANCES[dtype] * reference.norm()


@needs_kernels
def test_operator_is_registered_soundly():
    from flash_stu.ops import triton_conv  # noqa: F401

    x, taps, decay, readout, dilation = draw((1, 5, 2, 16, 1, 2), torch.float32)
    inputs = (x, taps, decay, readout, dilation)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.flash_stu.triton_conv.default, inputs, test_utils=checks)


@needs_kernels
def test_compiles_to_one_graph():
    from flash_stu.ops.triton_conv import triton_conv

    x, taps, decay, readout, dilation = draw((1, 7, 2, 16, 1, 2), torch.float32)

    def function(x, taps):
        return triton_conv(x.sin(), taps, decay, readout, dilation).cos()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, taps).sum(), (x, taps))
    torch.testing.assert_close(got, torch.autograd.grad(function(x, taps).sum(), (x, taps)))


@needs_kernels
def test_bad_arguments():
    from flash_stu.ops.triton_conv import triton_conv

    x, taps, decay, readout, dilation = draw((1, 7, 2, 16, 1, 2), torch.float32)
    with pytest.raises(UserError, match="got torch.float64; allowed: float32, bfloat16, float16"):
        triton_conv(x.double(), taps, decay, readout, dilation)
    with pytest.raises(UserError, match="got chunks of 12; allowed: powers of two from 16 on"):
        triton_conv(x, taps[:24], decay, readout, dilation)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="says what is missing on a machine without a GPU")
def test_missing_accelerator_says_why():
    from flash_stu.ops.spectral_conv import spectral_conv

    with pytest.raises(UserError, match="'triton' is not available: it needs a CUDA GPU"):
        spectral_conv(torch.zeros(1, 4, 2), torch.zeros(4, 1), torch.zeros(1, 2), "triton")
