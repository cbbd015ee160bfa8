"""The chunked loss against the plain one: value, gradients, what it keeps, and where it may run."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flash_stu import FlashSTUConfig, UserError
from flash_stu.ops import backends
from flash_stu.ops.cross_entropy.choice import linear_cross_entropy
from flash_stu.ops.cross_entropy.chunked import CHUNK_BYTES

VOCABULARY, SIZE = 53, 8


@pytest.fixture(params=[1, 7, 1000])
def chunk(request, monkeypatch):
    """Let chunks hold so many tokens (in float32)."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", request.param * 4 * VOCABULARY)


@pytest.fixture
def inputs():
    """Hidden states, weight and bias with gradients, and labels of which six do not count."""

    def make(dtype=torch.float32):
        torch.manual_seed(0)
        tensors = [torch.randn(shape, dtype=dtype) for shape in ((2, 13, SIZE), (VOCABULARY, SIZE), (VOCABULARY,))]
        labels = torch.randint(0, VOCABULARY, (2, 13))
        labels[0, :5] = labels[1, 7] = -100
        return [tensor.requires_grad_() for tensor in tensors], labels

    return make


def plain_loss(hidden, weight, labels, bias=None):
    return F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1).float(), labels.flatten())


def test_equals_the_plain_loss(chunk, inputs):
    (hidden, weight, bias), labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    plain = plain_loss(hidden, weight, labels, bias)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    parameters = (hidden, weight, bias)
    ours, theirs = (torch.autograd.grad(2.5 * value, parameters) for value in (loss, plain))
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine - reference).abs().max() <= 1e-6 * reference.abs().max()


def test_gradients_are_exact_in_float64(chunk, inputs):
    (hidden, weight, bias), labels = inputs(torch.float64)

    def function(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, bias)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias), fast_mode=True)


def test_large_logits_neither_overflow_nor_lose_the_label(inputs):
    (hidden, weight, _), labels = inputs()
    with torch.no_grad():
        hidden *= 300
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), plain_loss(hidden, weight, labels))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_gradients_only_where_they_are_wanted(inputs, wanted):
    (hidden, weight, _), labels = inputs()
    expected = torch.autograd.grad(plain_loss(hidden, weight, labels), (hidden, weight))
    tensors = [tensor.detach().requires_grad_(flag) for tensor, flag in zip((hidden, weight), wanted, strict=True)]
    loss = linear_cross_entropy(*tensors, labels)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for tensor, reference, flag in zip(tensors, expected, wanted, strict=True):
        if flag:
            torch.testing.assert_close(tensor.grad, reference)
        else:
            assert tensor.grad is None


def products(function) -> float:
    """How many times a function multiplies by the head's matrix."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / (2 * 26 * SIZE * VOCABULARY)


def test_logits_are_computed_once_and_gradients_only_if_wanted(inputs, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 7 * 4 * VOCABULARY)
    (hidden, weight, bias), labels = inputs()
    assert products(lambda: linear_cross_entropy(hidden, weight, labels, bias).backward()) == 3
    with torch.no_grad():
        assert products(lambda: linear_cross_entropy(hidden, weight, labels, bias)) == 1


class Allocations(TorchDispatchMode):
    """Keeps every storage that was made while it was on."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in known:
                self.storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return result


def test_one_chunk_of_logits_is_all_that_is_held(inputs, monkeypatch):
    """Beside the gradients of hidden and weight, which are no larger than what they belong to."""
    rows = 9
    monkeypatch.setitem(CHUNK_BYTES, "cpu", rows * 4 * VOCABULARY)
    (hidden, weight, bias), labels = inputs()
    with Allocations() as allocations:
        linear_cross_entropy(hidden, weight, labels, bias).backward()
    sizes = sorted((storage.nbytes() for storage in allocations.storages.values()), reverse=True)
    assert sizes[:3] == [rows * 4 * VOCABULARY, 4 * weight.numel(), 4 * hidden.numel()]


def test_nan_and_no_gradient_if_no_label_counts(inputs):
    (hidden, weight, bias), labels = inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), bias)
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, (hidden, weight, bias)):  # as in PyTorch
        assert not gradient.any()


def test_accumulates_over_micro_batches_and_a_tied_weight(inputs):
    """As in training: gradients added up over micro batches, the head's weight being the embedding's too."""
    _, labels = inputs()
    ids = labels.clamp(min=0)
    gradients = []
    for loss_of in (linear_cross_entropy, plain_loss):
        torch.manual_seed(1)
        weight = torch.randn(VOCABULARY, SIZE, requires_grad=True)
        for row in range(2):
            loss = loss_of(F.embedding(ids[row : row + 1], weight).tanh(), weight, labels[row : row + 1])
            (loss / 2).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_gradient_is_handed_over_without_a_copy(inputs):
    (hidden, weight, _), labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels)
    address = loss.grad_fn.gradients.weight.data_ptr()
    (loss / 3).backward()
    assert weight.grad.data_ptr() == address


def test_a_retained_graph_gives_the_gradient_again(inputs):
    (hidden, weight, bias), labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    first = torch.autograd.grad(3 * loss, (hidden, weight, bias), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight, bias))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, 3 * b)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("mode", ["autocast", "parameters"])
def test_bfloat16(monkeypatch, mode):
    """The loss of bfloat16 logits exactly; gradients within bfloat16's rounding of the float32 ones."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 7 * 6 * VOCABULARY)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 13, 64), torch.randn(VOCABULARY, 64) / 8
    labels = torch.randint(0, VOCABULARY, (2, 13))
    rounded = [tensor.bfloat16().float().requires_grad_() for tensor in (hidden, weight)]
    exact = torch.autograd.grad(plain_loss(*rounded, labels), rounded)

    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        loss, plain = linear_cross_entropy(*tensors, labels), plain_loss(*tensors, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    loss.backward()
    for tensor, reference in zip(tensors, exact, strict=True):
        assert tensor.grad.dtype == dtype
        assert (tensor.grad - reference).norm() < 0.01 * reference.norm()


def test_many_chunks_add_up_in_float32():
    """4096 tokens that all pull at one row: adding up in bfloat16 would stop at 2^8 terms."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHUNK_BYTES, "cpu", 2 * 6)
        linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.long)).backward()
    assert weight.grad.flatten().tolist() == [-0.5, 0.5]


def test_it_compiles_as_one_graph(inputs):
    (hidden, weight, bias), labels = inputs()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled():
        return linear_cross_entropy(hidden.sin(), weight, labels, bias)

    expected = torch.autograd.grad(plain_loss(hidden.sin(), weight, labels, bias), (hidden, weight, bias))
    for ours, reference in zip(torch.autograd.grad(compiled(), (hidden, weight, bias)), expected, strict=True):
        torch.testing.assert_close(ours, reference)


def test_no_tokens_at_all():
    assert linear_cross_entropy(torch.empty(0, 5, 3), torch.zeros(7, 3), torch.empty(0, 5, dtype=torch.long)).isnan()


# Back ends


def test_back_end_names(inputs):
    (hidden, weight, _), labels = inputs()
    with pytest.raises(UserError, match="'fused'; allowed: auto, chunked, triton, liger"):
        linear_cross_entropy(hidden, weight, labels, backend="fused")


def test_liger_must_be_there_if_it_is_chosen(inputs, monkeypatch):
    (hidden, weight, _), labels = inputs()
    monkeypatch.setattr(backends, "why_not", lambda name: "the package is not installed (pip install x)")
    with pytest.raises(UserError, match="loss back end 'liger' is not available: .*pip install x"):
        linear_cross_entropy(hidden, weight, labels, backend="liger")


@pytest.fixture
def liger_stand_in(monkeypatch):
    """A module with the signature of Liger's function, so that our call of it can be held to the plain loss."""
    calls = []

    def fused(input, weight, target, bias=None, ignore_index=-100, reduction="mean", accum_dtype=None, **options):
        calls.append(options)
        logits = F.linear(input, weight, bias).float()
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    module = ModuleType("liger_kernel.transformers.functional")
    module.liger_fused_linear_cross_entropy = fused
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    return calls


def test_the_call_of_liger(inputs, liger_stand_in, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 20 * 4 * VOCABULARY)
    (hidden, weight, bias), labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, bias, backend="liger")
    plain = plain_loss(hidden, weight, labels, bias)
    torch.testing.assert_close(loss, plain)
    ours, theirs = (torch.autograd.grad(value, (hidden, weight, bias)) for value in (loss, plain))
    torch.testing.assert_close(ours, theirs)
    assert linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), backend="liger").isnan()
    # 26 tokens, 53 / 8 words per feature: multiplier m makes its chunks the power of two above 26 / (53 / 8 m)
    assert liger_stand_in[0] == {"chunk_mem_const": 16 * VOCABULARY // (26 * SIZE)}


def test_liger_is_refused_where_it_would_leave_out_a_gradient(inputs, liger_stand_in):
    (hidden, weight, _), labels = inputs()
    with pytest.raises(UserError, match="frozen hidden states"):
        linear_cross_entropy(hidden.detach(), weight, labels, backend="liger")
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels, backend="liger").isfinite()


def test_the_model_s_config_chooses(tiny_model, monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name: "there is none")
    ids = torch.arange(12)[None]
    with pytest.raises(UserError, match="loss back end 'liger' is not available: there is none"):
        tiny_model(loss_backend="liger")(input_ids=ids, labels=ids)
    with pytest.raises(UserError, match="loss_backend is 'fused'; allowed: auto, chunked, triton, liger"):
        FlashSTUConfig.from_user({"loss_backend": "fused"})
