"""Tiled sliding-window attention against dense attention in float64: outputs, gradients, memory, registration."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flash_stu.ops.attention import banded as module
from flash_stu.ops.attention.banded import banded_attention
from flash_stu.ops.positions import alibi_slopes


def dense(query, key, value, window, softcap=None, slopes=None, key_mask=None, keep=None):
    """All scores at once; `keep` (batch, heads, queries, keys) multiplies the weights. Queries without keys give 0."""
    query, key, value = (t.double() for t in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = scores.shape[2:]
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    if slopes is not None:
        scores = scores - slopes.double().view(-1, 1, 1) * distance
    visible = ((distance >= 0) & (distance < window)).expand_as(scores)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    weights = torch.where(visible, scores, -1e300).softmax(-1) * visible
    return (weights if keep is None else weights * keep) @ value


def draw(batch, heads, kv_heads, queries, keys, head_dim=6, dtype=torch.float64):
    """Queries, keys and values as the layer makes them: transposed views, here of one tensor."""
    torch.manual_seed(0)
    sizes = [(heads, queries), (kv_heads, keys), (kv_heads, keys)]
    return [
        (1.5 * torch.randn(batch, length, number, head_dim, dtype=dtype)).transpose(1, 2).requires_grad_()
        for number, length in sizes
    ]


def with_gradients(function, tensors, *args, **kwargs):
    y = function(*tensors, *args, **kwargs)
    torch.manual_seed(1)
    weight = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad((y * weight).sum(), tensors)


def close(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all()
        assert (a.double() - b.double()).norm() <= tolerance * (1 + b.double().norm())


@pytest.fixture(params=["small tiles", "tiles as they are"])
def tiles(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(module, "_ELEMENTS", {False: 300, True: 300})
        monkeypatch.setattr(module, "_ROWS", {False: (3, 7), True: (3, 7)})


SHAPES = [
    # batch, heads, kv_heads, queries, keys, window
    (2, 4, 2, 37, 37, 5),
    (3, 2, 2, 50, 61, 17),
    (1, 6, 2, 129, 140, 30),
    (2, 3, 1, 41, 41, 1),
    (2, 2, 1, 23, 23, 90),
    (2, 2, 2, 1, 1, 3),
    (2, 4, 1, 1, 40, 8),
    (2, 4, 4, 300, 300, 33),
]
OPTIONS = [{}, {"softcap": 3.0}, {"slopes": True}, {"mask": True}, {"softcap": 2.0, "slopes": True, "mask": True}]


def options(kinds, batch, heads, keys):
    kinds = dict(kinds)
    if kinds.pop("slopes", False):
        kinds["slopes"] = alibi_slopes(heads)
    if kinds.pop("mask", False):
        lengths = torch.randint(0, keys, (batch, 1))
        kinds["key_mask"] = torch.arange(keys) >= lengths
        kinds["key_mask"][:, keys // 2] = False
    return kinds


@pytest.mark.parametrize("kinds", OPTIONS, ids=lambda kinds: "+".join(kinds) or "plain")
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(shape, kinds, tiles):
    *sizes, window = shape
    tensors = draw(*sizes)
    kinds = options(kinds, sizes[0], sizes[1], sizes[4])
    expected = with_gradients(dense, tensors, window, **kinds)
    close(with_gradients(banded_attention, tensors, window, **kinds), expected, 1e-10)


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 5), (2, 2, 1, 0, 3), (2, 2, 2, 0, 0)])
def test_nothing_to_attend_with(shape):
    tensors = draw(*shape)
    y = banded_attention(*tensors, window=3, softcap=2.0)
    assert y.shape == tensors[0].shape
    assert torch.autograd.grad(y.sum(), tensors[0])[0].shape == y.shape


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("kinds", [OPTIONS[0], OPTIONS[-1]], ids=["plain", "everything"])
def test_narrow_inputs(dtype, tolerance, kinds):
    tensors = draw(2, 4, 2, 200, 230, dtype=dtype)
    kinds = options(kinds, 2, 4, 230)
    got = with_gradients(banded_attention, tensors, 70, **kinds)
    assert all(t.dtype == dtype for t in got)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    close(got, with_gradients(dense, wide, 70, **kinds), tolerance)


@pytest.mark.parametrize("scale", [30.0, 300.0])
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_large_scores(softcap, scale):
    query, key, value = draw(1, 2, 2, 90, 90, dtype=torch.float32)
    tensors = [(query * scale).detach().requires_grad_(), key, value]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    got = with_gradients(banded_attention, tensors, 20, softcap)
    expected = with_gradients(dense, wide, 20, softcap)
    close(got[:1] + got[3:], expected[:1] + expected[3:], 1e-4)  # float32 scores of 1,000 are off by 1e-4
    assert all(torch.isfinite(t).all() for t in got)


def test_a_query_without_keys_gives_zeros_and_no_gradient():
    query, key, value = tensors = draw(2, 2, 1, 60, 60, dtype=torch.float32)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[1, :31] = False
    y, to_query, to_key, to_value = with_gradients(banded_attention, tensors, 9, 50.0, key_mask=mask)
    assert y[1, :, :31].eq(0).all() and y[1, :, 31:].ne(0).all()
    assert to_query[1, :, :31].eq(0).all() and to_key[1, :, :31].eq(0).all() and to_value[1, :, :31].eq(0).all()
    assert all(torch.isfinite(t).all() for t in (to_query, to_key, to_value))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_against_finite_differences(dropout, tiles):
    def outputs(*tensors):
        torch.manual_seed(3)
        return banded_attention(*tensors, 4, 2.0, alibi_slopes(4), torch.arange(8)[None] > 1, dropout)

    assert torch.autograd.gradcheck(outputs, draw(1, 4, 2, 6, 8, head_dim=2))


def test_dropout_is_of_weights(tiles):
    """Values that are unit vectors show which weights were kept; outputs and gradients follow from these."""
    keys, window, rate = 24, 10, 0.3
    query, key, _ = draw(3, 4, 2, 20, keys, head_dim=keys)
    weights = dense(query, key, torch.eye(keys).expand(3, 2, keys, keys), window)
    torch.manual_seed(5)
    value = torch.eye(keys, dtype=torch.float64).expand(3, 2, keys, keys).clone().requires_grad_()
    tensors = [query, key, value]
    y, *grads = with_gradients(banded_attention, tensors, window, dropout=rate)
    keep = torch.where(weights > 0, y / weights, 0).detach()
    torch.testing.assert_close(keep, keep.ne(0).double() / (1 - rate))
    close([y, *grads], with_gradients(dense, tensors, window, keep=keep), 1e-10)
    dropped = keep[weights > 0].eq(0).double().mean()
    assert abs(dropped - rate) < 0.05  # of some 2,000 weights, standard deviation 0.01
    torch.manual_seed(6)
    assert not torch.equal(banded_attention(*tensors, window, dropout=rate), y)


def test_activation_checkpointing_drops_the_same_weights():
    tensors = draw(2, 2, 2, 30, 30)

    def layer(*tensors):
        return banded_attention(*tensors, 8, 5.0, dropout=0.5)

    torch.manual_seed(2)
    expected = with_gradients(layer, tensors)
    torch.manual_seed(2)
    got = with_gradients(lambda *t: checkpoint(layer, *t, use_reentrant=False), tensors)
    close(got, expected, 1e-12)


def test_memory_is_linear_in_the_length():
    """Beyond inputs and outputs, the largest tensor made in either pass does not depend on the length."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple | list) else [result]:
                if isinstance(t, torch.Tensor):
                    self.elements = max(self.elements, t.numel())
            return result

    found = {}
    for length in (1024, 4096):
        tensors = draw(1, 2, 2, length, length, head_dim=2, dtype=torch.float32)
        arguments = (*tensors, 200, 50.0, None, None, 0.0, None)
        with Largest() as forward, torch.no_grad():
            y, lse = module._attention._init_fn(*arguments)
        with Largest() as backward, torch.no_grad():
            module._attention_backward._init_fn(y, y, lse, *arguments)
        found[length] = max(forward.elements, backward.elements)
    assert found[1024] == found[4096] <= module._ELEMENTS[False]


def test_saved_for_the_backward_pass():
    tensors = draw(2, 2, 1, 500, 500, head_dim=4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = banded_attention(*tensors, 300)
    assert sum(t.numel() for t in saved) == sum(t.numel() for t in (y, y[..., 0], *tensors))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_operator_is_registered_soundly(dropout):
    mask = torch.ones(2, 13, dtype=torch.bool)
    seed = torch.tensor(1) if dropout else None
    for dtype in (torch.float64, torch.bfloat16):
        inputs = (*draw(2, 4, 2, 11, 13, dtype=dtype), 5, 3.0, alibi_slopes(4), mask, dropout, seed)
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if dtype == torch.float64:
            checks.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.flash_stu.banded_attention.default, inputs, test_utils=checks)


def test_compiles_to_one_graph_for_any_length():
    def function(query, key, value):
        return banded_attention(query.sin(), key, value, 9, 4.0).transpose(1, 2).flatten(2).cos()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (40, 57, 20):
        tensors = draw(2, 4, 2, length, length)
        close(with_gradients(compiled, tensors), with_gradients(function, tensors), 1e-12)


def test_autocast_leaves_it_alone_and_inference_mode_works():
    tensors = draw(1, 2, 2, 40, 40, dtype=torch.float32)
    expected = with_gradients(banded_attention, tensors, 9, 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        close(with_gradients(banded_attention, tensors, 9, 4.0), expected, 1e-6)
    with torch.inference_mode():
        close([banded_attention(*tensors, 9, 4.0)], expected[:1], 1e-6)


def test_heads_of_a_token_lie_side_by_side():
    y = banded_attention(*draw(2, 3, 3, 8, 8), 4)
    assert y.transpose(1, 2).is_contiguous()
