"""The Triton kernels against direct sums: interpreted on a CPU, compiled where there is a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_stu.errors import UserError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs the package triton, and a CUDA GPU or TRITON_INTERPRET=1",
)

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [
    # batch, length, channels, chunk, states, dilation, segments
    (2, 37, 3, 16, 3, 1, 1),
    (1, 101, 35, 16, 18, 2, 3),
    (1, 70, 3, 32, 17, 1, 2),
    (3, 60, 2, 16, 40, 1, 4),
    (1, 97, 2, 16, 3, 2, 4),
    (1, 1, 2, 16, 1, 3, 1),
]
if DEVICE == "cuda":
    SHAPES += [(2, 1001, 65, 32, 32, 2, 4), (3, 4097, 130, 16, 80, 1, 7), (1, 300, 32, 64, 64, 1, 2)]


@needs_triton
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels are tested in this process")
def test_interpreted_in_a_process_of_its_own():
    """Triton reads TRITON_INTERPRET when a kernel is defined."""
    command = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout


def draw(shape, dtype):
    """Inputs, near taps, decays and readout of a filter whose lags from chunk + 1 on are exponentials."""
    batch, length, channels, chunk, states, dilation, _ = shape
    torch.manual_seed(0)
    x = torch.randn(batch, length, channels).to(DEVICE, dtype).requires_grad_()
    decay = torch.rand(states, dtype=torch.float64, device=DEVICE) * 1.8 - 0.9
    readout = (torch.randn(states, channels, device=DEVICE) / 3).requires_grad_()
    first = torch.randn(chunk + 1, channels, device=DEVICE).requires_grad_()
    return x, first, decay, readout, dilation


def near_taps(first, decay, readout):
    lags = torch.arange(len(first) - 2, dtype=decay.dtype, device=decay.device)[:, None]
    return torch.cat([first, (decay**lags).to(readout.dtype) @ readout])


def direct_sum(x, first, decay, readout, dilation):
    lags = torch.arange(x.shape[1], dtype=decay.dtype, device=decay.device)[:, None]
    filters = torch.cat([first, decay**lags @ readout])
    y = torch.zeros_like(x)
    for lag in range(0, x.shape[1], dilation):
        y[:, lag:] += filters[lag // dilation] * x[:, : x.shape[1] - lag]
    return y


@pytest.fixture
def cut(monkeypatch):
    """Returns a function that makes the next convolutions cut a sequence into so many segments."""

    def into(segments):
        from flash_stu.ops.conv import triton as module

        monkeypatch.setattr(module, "_count_segments", lambda *_: segments)

    return into


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[0], torch.float16), (SHAPES[1], torch.bfloat16)],
)
def test_against_the_direct_sum(shape, dtype, cut):
    from flash_stu.ops.conv.triton import triton_conv

    cut(shape[-1])
    x, first, decay, readout, dilation = draw(shape, dtype)
    y = triton_conv(x, near_taps(first, decay, readout), decay, readout, dilation)
    assert y.dtype == dtype
    up = torch.randn_like(y)
    got = (y, *torch.autograd.grad((y * up).sum(), (x, first, readout)))
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in (x, first, readout))
    exact = direct_sum(*exact_inputs[:2], decay, exact_inputs[2], dilation)
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
    weights, taps = torch.randn(filters.shape[1], 3, device=DEVICE), torch.randn(3, 3, device=DEVICE)
    got = spectral_conv(x, filters.float(), weights, "triton", dilation, separate, taps=taps)
    exact = spectral_conv(x.double(), filters, weights.double(), "direct", dilation, taps=taps.double())
    assert (got - exact).norm() <= 1e-5 * exact.norm()


@needs_kernels
@pytest.mark.parametrize("separate", [False, True])
def test_a_sequence_in_pieces(separate):
    """A piece needs the chunk before it and the states of the rest, which the kernels do not know of."""
    from flash_stu import spectral_filters
    from flash_stu.ops.conv.choice import spectral_conv
    from flash_stu.ops.conv.partial import PartialConv
    from flash_stu.ops.parts import Piece

    length, size = 90, 34
    phi = spectral_filters(256, 6)[1].to(DEVICE)
    signs = (-1.0) ** torch.arange(256, device=DEVICE)[:, None]
    filters, dilation = (torch.cat([phi, phi * signs], dim=1), 1) if separate else (2 * phi[::2], 2)
    torch.manual_seed(0)
    x, weights = torch.randn(1, length, 3, device=DEVICE), torch.randn(filters.shape[1], 3, device=DEVICE)
    up, outputs, carried = torch.randn_like(x), [], {}
    operands = x.clone().requires_grad_(), weights.clone().requires_grad_()
    for start in range(0, length, size):
        piece = Piece(start, length, carried)
        part = operands[0][:, start : start + size]
        convolve = PartialConv(part, filters.float(), piece.before(0), "triton", dilation, separate)
        outputs.append(convolve(filters.float(), operands[1]))
        carried = piece.left
    y = torch.cat(outputs, dim=1)
    exact_operands = tuple(t.double().requires_grad_() for t in (x, weights))
    exact = spectral_conv(exact_operands[0], filters, exact_operands[1], "direct", dilation)
    got = (y, *torch.autograd.grad((y * up).sum(), operands))
    expected = (exact, *torch.autograd.grad((exact * up.double()).sum(), exact_operands))
    for result, reference in zip(got, expected, strict=True):
        assert (result - reference).norm() <= 1e-5 * reference.norm()


KERNELS = {  # the most registers of a thread, in bf16 and in float32, and bytes of shared memory of a program
    "_ends_kernel": (64, 128, 8192),
    "_outputs_kernel": (168, 232, 65536),
    "_tap_gradient_kernel": (168, 255, 8192),
    "_readout_gradient_kernel": (96, 168, 16384),
}


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("states", [32, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_an_h100_without_spills(name, dtype, states, tmp_path):
    """The compiler needs no GPU; what it refuses, the interpreter does not see."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from flash_stu.ops.conv import triton as module

    kernel, places = getattr(module, name), {}
    warps = module.warps_of(name, states)
    constants = {"CHUNK": 16, "STATES": states, "TILE": 32, "BLOCK": 32, "PRECISION": "tf32x3", "REVERSE": True}
    constants["FACTOR"] = tl.bfloat16 if dtype == "bf16" else tl.float32
    kinds = dict.fromkeys(("length", "channels", "dilation", "sequences", "chunks"), "i32")
    kinds |= dict.fromkeys(constants, "constexpr") | dict.fromkeys(("x", "y", "grad"), f"*{dtype}")
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            places[(place,)] = constants[argument]
    aligned = [place for place, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name == "channels"]
    source = ASTSource(kernel, signature, places, {(place,): [["tt.divisibility", 16]] for place in aligned})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 2})
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    use = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    half, single, shared = KERNELS[name]
    assert use["STACK"] == use["LOCAL"] == 0
    assert use["REG"] <= (half if dtype == "bf16" else single)
    assert compiled.metadata.shared <= shared


@needs_kernels
def test_operator_is_registered_soundly():
    from flash_stu.ops.conv import triton as triton_conv  # noqa: F401

    x, first, decay, readout, dilation = draw((1, 5, 2, 16, 1, 2, 1), torch.float32)
    inputs = (x, near_taps(first, decay, readout).detach().requires_grad_(), decay, readout, dilation)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.flash_stu.triton_conv.default, inputs, test_utils=checks)


@needs_kernels
def test_compiles_to_one_graph():
    from flash_stu.ops.conv.triton import triton_conv

    x, first, decay, readout, dilation = draw((1, 7, 2, 16, 1, 2, 1), torch.float32)
    taps = near_taps(first, decay, readout).detach().requires_grad_()

    def function(x, taps):
        return triton_conv(x.sin(), taps, decay, readout, dilation).cos()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, taps).sum(), (x, taps))
    torch.testing.assert_close(got, torch.autograd.grad(function(x, taps).sum(), (x, taps)))


@needs_kernels
def test_segments_fill_a_gpu():
    from flash_stu.ops.conv.triton import _count_segments

    assert _count_segments(132, 2, 256) == 32  # never below eight chunks
    assert _count_segments(132, 10000, 256) == 1
    assert 512 * _count_segments(132, 512, 256) >= 32 * 132
    assert _count_segments(132, 2, 3) == 1


@needs_kernels
def test_bad_arguments():
    from flash_stu.ops.conv.triton import triton_conv

    x, first, decay, readout, dilation = draw((1, 7, 2, 16, 1, 2, 1), torch.float32)
    taps = near_taps(first, decay, readout)
    with pytest.raises(UserError, match="got torch.float64; allowed: float32, bfloat16, float16"):
        triton_conv(x.double(), taps, decay, readout, dilation)
    with pytest.raises(UserError, match="got chunks of 12; allowed: powers of two from 16 on"):
        triton_conv(x, taps[:24], decay, readout, dilation)
    with pytest.raises(UserError, match="triton_conv takes x"):
        triton_conv(x, taps[:, :1], decay, readout, dilation)
    with pytest.raises(UserError, match="no gradient"):
        triton_conv(x, taps, decay.requires_grad_(), readout, dilation)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="says what is missing on a machine without a GPU")
def test_missing_accelerator_says_why():
    from flash_stu.ops.conv.choice import spectral_conv

    with pytest.raises(UserError, match="'triton' is not available: it needs a CUDA GPU"):
        spectral_conv(torch.zeros(1, 4, 2), torch.zeros(4, 1), torch.zeros(1, 2), "triton")
