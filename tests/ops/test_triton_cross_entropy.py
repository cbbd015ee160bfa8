"""The loss with the softmax as a Triton kernel against float64: interpreted on a CPU, compiled where there is a GPU."""

import importlib.util
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flash_stu.errors import UserError
from flash_stu.ops.cross_entropy.choice import linear_cross_entropy
from flash_stu.ops.cross_entropy.chunked import CHUNK_BYTES, loss_and_gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
needs_kernel = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs the package triton, and a CUDA GPU or TRITON_INTERPRET=1",
)
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")

# Relative. What is stored in bf16 is rounded once, by the interpreter towards 0; the arithmetic is float32, where the
# exponential of a number down to -88 has an error of 88 units.
ROUNDING = {torch.float32: 2**-17, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8 + 2**-17}
WORDS = [1, 64, 1003, 8192 + 81]  # within a load, on the edge of a line, odd, and in several blocks


@needs_triton
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernel is tested in this process")
def test_interpreted_in_a_process_of_its_own():
    """Triton reads TRITON_INTERPRET when a kernel is defined."""
    command = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout


def exact_rows(logits, bias, labels, share):
    """Losses and gradient of rows of logits in float64; ignored rows have neither."""
    logits = logits.double().requires_grad_()
    biased = logits if bias is None else logits + bias.double()
    losses = F.cross_entropy(biased, labels, reduction="none")
    return losses.detach(), *torch.autograd.grad((losses * share.double()).sum(), logits)


@needs_kernel
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", WORDS)
def test_rows_against_float64(words, dtype, biased):
    """Labels at both edges, inside and ignored; rows of small, large and equal logits."""
    from flash_stu.ops.cross_entropy.triton import ALIGNMENT, softmax_cross_entropy

    torch.manual_seed(words)
    rows = 6
    whole = torch.full((rows, words + -words % ALIGNMENT), float("nan"), dtype=dtype, device=DEVICE)
    logits = whole[:, :words]
    logits.copy_(torch.randn(rows, words) * torch.tensor([1.0, 3, 1, 300, 0, 30])[:, None])
    bias = torch.randn(words, device=DEVICE) if biased else None
    labels = torch.tensor([0, words - 1, -100, words // 2, words // 3, min(words - 1, 8)], device=DEVICE)
    share = torch.rand(rows, device=DEVICE) * (labels >= 0)
    losses, gradient = exact_rows(logits, bias, labels, share)

    before = logits.clone()
    for wanted in (False, True):
        got = softmax_cross_entropy(whole, words, bias, labels, share, wanted)
        assert ((got - losses).abs() <= 2**-20 * (1 + before.double().abs().amax(1) + losses)).all()
        if not wanted:
            assert torch.equal(logits, before)
    assert not logits[2].any() and not whole[:, words:].any()
    # near the label p - 1 cancels, so that an entry's error is as large as that of p
    bound = ROUNDING[dtype] * gradient.abs() + 2**-20 * share[:, None]
    assert ((logits.double() - gradient).abs() <= bound).all()


@needs_kernel
def test_numbers_that_are_none_are_not_hidden():
    from flash_stu.ops.cross_entropy.triton import softmax_cross_entropy

    logits = torch.ones(5, 128, device=DEVICE)
    logits[0, 69] = logits[1, 3] = float("nan")
    logits[2, 5] = float("inf")
    logits[3, :68] = -float("inf")
    labels = torch.tensor([0, 0, 0, 68, 70], device=DEVICE)  # the last is no word's
    losses = softmax_cross_entropy(logits, 70, None, labels, torch.ones(5, device=DEVICE), True)
    assert losses.isfinite().tolist() == [False, False, False, True, False]
    torch.testing.assert_close(losses[3].item(), math.log(2))
    torch.testing.assert_close(logits[3, :70].tolist(), [0.0] * 68 + [-0.5, 0.5])


VOCABULARY, SIZE = 1003, 24


def draw(dtype):
    """Hidden states, weight and bias, and labels of which three do not count."""
    torch.manual_seed(0)
    shapes = ((2, 4, SIZE), (VOCABULARY, SIZE), (VOCABULARY,))
    tensors = [torch.randn(shape).to(DEVICE, dtype) / scale for shape, scale in zip(shapes, (1, 3, 1), strict=True)]
    labels = torch.randint(0, VOCABULARY, (2, 4), device=DEVICE)
    labels[0, :2] = labels[1, 3] = -100
    return [tensor.requires_grad_() for tensor in tensors], labels


def exact_loss(tensors, labels, items=None):
    """The loss in float64 and its gradients."""
    hidden, weight, bias = exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    loss = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), labels.flatten(), reduction="sum")
    loss = loss / ((labels != -100).sum() if items is None else items)
    return loss, torch.autograd.grad(loss, exact)


@needs_kernel
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("rows", "items"), [(3, None), (1000, 57)])
def test_the_loss_and_all_gradients(rows, dtype, tolerance, items, monkeypatch):
    """In bf16 the logits are rounded, to 2^-9 of them, and so are the gradients."""
    monkeypatch.setitem(CHUNK_BYTES, DEVICE, rows * dtype.itemsize * VOCABULARY)
    tensors, labels = draw(dtype)
    loss = linear_cross_entropy(*tensors[:2], labels, tensors[2], "triton", items)
    exact, gradients = exact_loss(tensors, labels, items)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) <= tolerance * exact.item()
    for got, reference in zip(torch.autograd.grad(loss, tensors), gradients, strict=True):
        assert got.dtype == dtype
        assert (got.double() - reference).norm() <= tolerance * reference.norm()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ignored(dtype):
    tensors, labels = draw(dtype)
    ignored = torch.full_like(labels, -100)
    loss = linear_cross_entropy(*tensors[:2], ignored, tensors[2], "triton")
    assert loss.isnan()
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, tensors))
    assert linear_cross_entropy(*tensors[:2], ignored, tensors[2], "triton", items=3) == 0


@needs_kernel
def test_under_autocast_and_without_gradients():
    tensors, labels = draw(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(*tensors[:2], labels, tensors[2], "triton")
        with torch.no_grad():
            assert linear_cross_entropy(*tensors[:2], labels, tensors[2], "triton") == loss
    exact, gradients = exact_loss(tensors, labels)
    assert abs(loss.item() - exact.item()) <= 1e-2 * exact.item()
    for got, reference in zip(torch.autograd.grad(loss, tensors), gradients, strict=True):
        assert got.dtype == torch.float32
        assert (got - reference).norm() <= 1e-2 * reference.norm()


@needs_kernel
def test_it_compiles_as_one_graph():
    (hidden, weight, bias), labels = draw(torch.float32)

    def function(backend):
        return linear_cross_entropy(hidden.sin(), weight, labels, bias, backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f, (hidden, weight, bias)) for f in (compiled("triton"), function("chunked")))
    for ours, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, reference)


@needs_kernel
def test_float64_is_left_to_the_plain_form():
    tensors, labels = draw(torch.float64)
    with pytest.raises(UserError, match="loss back end 'triton' does not do float64; use 'auto'"):
        linear_cross_entropy(*tensors[:2], labels, tensors[2], "triton")


@needs_triton
@not_interpreted
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiles_for_an_h100(dtype, biased, gradient, tmp_path):
    """The compiler needs no GPU. Two programs of 512 threads share 65,536 registers, and nothing is spilled; a row is
    read and written 16 bytes at a time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from flash_stu.ops.cross_entropy import triton as ours

    kernel = ours._softmax_kernel
    constants = {"LOADS": ours._LOADS, "WIDTH": 8 if dtype == "bf16" else 4, "BIASED": biased, "GRADIENT": gradient}
    kinds = {"logits": f"*{dtype}", "labels": "*i64", "words": "i32", "stride": "i32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in ("logits", "bias", "stride")}
    source = ASTSource(kernel, signature, {places[name]: value for name, value in constants.items()}, aligned)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=ours._OPTIONS)

    (tmp_path / "kernel").write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", tmp_path / "kernel"]
    used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
    assert used["REG"] * 32 * ours._OPTIONS["num_warps"] * 2 <= 65536
    assert used["STACK"] == used["LOCAL"] == 0
    assert compiled.metadata.shared <= 128  # a number for each warp
    wide = {name: len(re.findall(rf"{name}\.global\.v4\.b32", compiled.asm["ptx"])) for name in ("ld", "st")}
    assert wide["ld"] >= 2 * (1 + gradient) and wide["st"] == 2 * gradient


class Storages(TorchDispatchMode):
    """Adds up the bytes of all storages made while it is on, by the type in which they were made."""

    def __init__(self):
        super().__init__()
        self.known, self.bytes = set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.known |= {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.bytes.setdefault(tensor.dtype, []).append(storage.nbytes())
        return result


@needs_triton
@not_interpreted
@pytest.mark.parametrize("vocabulary", [200064, 50257])
def test_what_a_gpu_holds(vocabulary, monkeypatch):
    """Without one, by shapes alone: one chunk of bf16 logits, at least 2,048 rows of them, and none in float32."""
    tokens, size = 32768, 1024
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *tensors: torch.ops.aten.copy_(*tensors))  # asks for no device
    with FakeTensorMode():
        hidden = torch.empty(tokens, size, device="cuda")
        weight = torch.empty(vocabulary, size, device="cuda")
        labels = torch.empty(tokens, dtype=torch.long, device="cuda")
        count = torch.empty((), device="cuda")
        with Storages() as made:
            _, gradients = loss_and_gradients(
                hidden, weight, labels, None, count, torch.bfloat16, True, (True, True, False)
            )
    assert gradients.weight is not None and gradients.weight.shape == weight.shape
    logits = max(made.bytes[torch.bfloat16])
    assert 2048 <= logits / (2 * vocabulary) <= tokens
    assert logits <= CHUNK_BYTES["cuda"]
    assert max(made.bytes[torch.float32]) == 4 * vocabulary * size
