"""The Triton kernels against the PyTorch form: interpreted on a CPU, compiled where there is a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from flash_stu.errors import UserError
from flash_stu.ops.conv.chunked import chunked_conv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs the package triton, and a CUDA GPU or TRITON_INTERPRET=1",
)

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [
    # batch, length, channels, chunk, features, states, dilation
    (2, 37, 3, 16, 5, 3, 1),
    (1, 133, 66, 16, 24, 18, 2),
    (1, 70, 3, 32, 1, 17, 1),
    (1, 1, 2, 16, 2, 1, 3),
]
if DEVICE == "cuda":
    SHAPES += [(2, 1001, 65, 32, 24, 32, 2), (3, 4097, 130, 16, 48, 80, 1), (1, 300, 32, 64, 7, 64, 1)]


@needs_triton
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels are tested in this process")
def test_interpreted_in_a_process_of_its_own():
    """Triton reads TRITON_INTERPRET when a kernel is defined."""
    command = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout


def draw(shape, dtype):
    batch, length, channels, chunk, features, states, dilation = shape
    torch.manual_seed(0)
    x = torch.randn(batch, length, channels).to(DEVICE, dtype).requires_grad_()
    near = torch.randn(2 * chunk, features, device=DEVICE)
    weights = torch.randn(features, channels, device=DEVICE, requires_grad=True)
    decay = torch.rand(states, dtype=torch.float64, device=DEVICE) * 1.8 - 0.9
    readout = (torch.randn(states, channels, device=DEVICE) / 3).requires_grad_()
    return x, near, weights, decay, readout, dilation


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[0], torch.float16), (SHAPES[1], torch.bfloat16)],
)
def test_against_the_pytorch_form(shape, dtype):
    from flash_stu.ops.conv.triton import triton_conv

    x, near, weights, decay, readout, dilation = draw(shape, dtype)
    y = triton_conv(x, near, weights, decay, readout, dilation)
    assert y.dtype == dtype
    up = torch.randn_like(y)
    got = (y, *torch.autograd.grad((y * up).sum(), (x, weights, readout)))
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in (x, weights, readout))
    x64, weights64, readout64 = exact_inputs
    exact, _ = chunked_conv(x64, near.double() @ weights64, decay, readout64, None, dilation)
    expected = (exact, *torch.autograd.grad((exact * up.double()).sum(), exact_inputs))
    for result, reference in zip(got, expected, strict=True):
        assert (result.double() - reference).norm() <= TOLERANCES[dtype] * reference.norm()


@needs_kernels
@pytest.mark.parametrize("separate", [False, True])
def test_is_the_stus_convolution(separate):
    from flash_stu import spectral_filters
    from flash_stu.ops.conv.choice import spectral_conv

    length = 150
    phi = spectral_filters(256, 6)[1].to(DEVICE)
    signs = (-1.0) ** torch.arange(256, device=DEVICE)[:, None]
    filters, dilation = (torch.cat([phi, phi * signs], dim=1), 1) if separate else (2 * phi[::2], 2)
    torch.manual_seed(0)
    x = torch.randn(1, length, 3, device=DEVICE)
    weights = torch.randn(filters.shape[1], 3, device=DEVICE)
    got = spectral_conv(x, filters.float(), weights, "triton", dilation, separate)
    exact = spectral_conv(x.double(), filters, weights.double(), "direct", dilation, separate)
    assert (got - exact).norm() <= 1e-5 * exact.norm()


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
def test_compiles_for_an_h100(name, dtype):
    """The compiler needs no GPU; what it refuses, the interpreter does not see."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from flash_stu.ops.conv import triton as triton_conv

    kernel = getattr(triton_conv, name)
    constants = {"CHUNK": 16, "STATES": 32, "BLOCK": 64, "FEATURES": 24, "KINDS": 32, "PRECISION": "tf32x3"}
    constants["FACTOR"] = tl.bfloat16 if dtype == "bf16" else tl.float32
    kinds = dict.fromkeys(("length", "channels", "dilation"), "i32") | dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(("x", "y", "grad", "grad_x", "bands"), f"*{dtype}")
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    constants = {(place,): constants[name] for place, name in enumerate(kernel.arg_names) if name in constants}
    source = ASTSource(kernel, signature, constants)
    assert compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2}).asm["cubin"]


@needs_kernels
def test_operator_is_registered_soundly():
    from flash_stu.ops.conv import triton as triton_conv  # noqa: F401

    inputs = draw((1, 5, 2, 16, 3, 1, 2), torch.float32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.flash_stu.triton_conv.default, inputs, test_utils=checks)


@needs_kernels
def test_compiles_to_one_graph():
    from flash_stu.ops.conv.triton import triton_conv

    x, near, weights, *system = draw((1, 7, 2, 16, 3, 1, 2), torch.float32)

    def function(x, weights):
        return triton_conv(x.sin(), near, weights, *system).cos()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weights).sum(), (x, weights))
    torch.testing.assert_close(got, torch.autograd.grad(function(x, weights).sum(), (x, weights)))


@needs_kernels
def test_bad_arguments():
    from flash_stu.ops.conv.triton import triton_conv

    x, near, weights, *system = draw((1, 7, 2, 16, 3, 1, 2), torch.float32)
    with pytest.raises(UserError, match="got torch.float64; allowed: float32, bfloat16, float16"):
        triton_conv(x.double(), near, weights, *system)
    with pytest.raises(UserError, match="got chunks of 12; allowed: powers of two from 16 on"):
        triton_conv(x, near[:24], weights, *system)
    with pytest.raises(UserError, match="triton_conv takes x"):
        triton_conv(x, near, weights[:, :1], *system)
    with pytest.raises(UserError, match="no gradient"):
        triton_conv(x, near.requires_grad_(), weights, *system)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="says what is missing on a machine without a GPU")
def test_missing_accelerator_says_why():
    from flash_stu.ops.conv.choice import spectral_conv

    with pytest.raises(UserError, match="'triton' is not available: it needs a CUDA GPU"):
        spectral_conv(torch.zeros(1, 4, 2), torch.zeros(4, 1), torch.zeros(1, 2), "triton")
