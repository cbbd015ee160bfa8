"""Taps and recurrences against their definitions, token by token in float64, with gradients and states before."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_stu.ops.recurrence import recurrence
from flash_stu.ops.taps import add_taps, tapped

WIDTH = 3


def product(x, tap):
    return x * tap if tap.ndim == 1 else x @ tap


def token_by_token(v, taps, past=None):
    outputs = [] if past is None else list(past.unbind(1))
    known = len(outputs)
    for t in range(v.shape[1]):
        terms = [product(y, tap) for y, tap in zip(reversed(outputs), taps, strict=False)]
        outputs.append(v[:, t] + sum(terms))
    return torch.stack(outputs[known:], 1)


def draw(*shape, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def assert_close(found, expected, bound):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= bound * other.abs().max()


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("lags", [1, 2, 5, 32])
@pytest.mark.parametrize("length", [2, 3, 131])
def test_recurrence_is_its_definition(lags, length, matrices):
    torch.manual_seed(0)
    v, past = draw(2, length, WIDTH), draw(2, lags, WIDTH)
    taps = draw(lags, *[WIDTH] * (1 + matrices), scale=0.3 / lags**0.5)
    weight = torch.randn(2, length, WIDTH, dtype=torch.float64)
    for before in (None, past):
        inputs = (v, taps) if before is None else (v, taps, before)
        results = []
        for form in (recurrence, token_by_token):
            y = form(*inputs)
            results.append((y, *torch.autograd.grad(y, inputs, weight)))
        assert_close(results[0], results[1], 1e-11)


@pytest.mark.parametrize("matrices", [False, True])
def test_recurrence_passes_gradcheck(matrices):
    torch.manual_seed(0)
    inputs = draw(2, 9, WIDTH), draw(2, *[WIDTH] * (1 + matrices), scale=0.4), draw(2, 2, WIDTH)
    assert torch.autograd.gradcheck(recurrence, inputs)


@pytest.mark.parametrize("poles", [(1.0, -1.0), (0.9999, 0.999), (0.9999, 0.9999)])
def test_float32_loses_no_more_than_token_by_token(poles):
    """Poles at the edge of stability: sums over thousands of tokens. The direct loop in float32 is the measure."""
    torch.manual_seed(0)
    v = torch.randn(1, 4096, 2)
    taps = torch.tensor([[sum(poles)], [-poles[0] * poles[1]]], dtype=torch.float64).expand(2, 2)
    exact = token_by_token(v.double(), taps.float().double())
    error, direct = ((y - exact).abs().max() for y in (recurrence(v, taps.float()), token_by_token(v, taps.float())))
    assert error <= 4 * direct + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize(("lags", "past"), [(1, 0), (3, 0), (3, 2), (4, 9), (40, 0), (40, 7)])
def test_taps_are_their_definition(lags, past, matrices, monkeypatch):
    monkeypatch.setattr("flash_stu.ops.taps._ELEMENTS", 2 * WIDTH * 5)  # blocks of five tokens
    torch.manual_seed(0)
    inputs = draw(2, 17, WIDTH), draw(2, past + 17, WIDTH), draw(lags, *[WIDTH] * (1 + matrices))
    y, x, taps = inputs
    expected = [
        y[:, t] + sum(product(x[:, past + t - i], taps[i]) for i in range(min(lags, past + t + 1))) for t in range(17)
    ]
    expected = torch.stack(expected, 1)
    weight = torch.randn_like(expected)
    reference = (expected, *torch.autograd.grad(expected, inputs, weight))
    for form in (add_taps, tapped):
        found = form(*inputs)
        assert_close((found, *torch.autograd.grad(found, inputs, weight)), reference, 1e-13)


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("form", [add_taps, tapped])
def test_taps_at_some_lags(form, past, monkeypatch):
    monkeypatch.setattr("flash_stu.ops.taps._ELEMENTS", 2 * WIDTH * 5)
    torch.manual_seed(0)
    y, x, taps = draw(2, 17, WIDTH), draw(2, past + 17, WIDTH), draw(6, WIDTH)
    inputs, lags = (y, x, taps), [5, 1]
    weight = torch.randn(2, 17, WIDTH, dtype=y.dtype)
    some = torch.zeros_like(taps).index_put((torch.tensor(lags),), taps[lags])
    reference = tapped(y, x, some)
    expected = (reference, *torch.autograd.grad(reference, inputs, weight))
    found = form(y, x, taps[lags], lags)
    assert_close((found, *torch.autograd.grad(found, inputs, weight)), expected, 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    torch.manual_seed(0)
    y, x, taps = torch.randn(2, 50, 4).to(dtype), torch.randn(2, 50, 4).to(dtype), torch.randn(3, 4)
    exact = tapped(y.double(), x.double(), taps.double())
    for form in (add_taps, tapped):
        found = form(y, x, taps)
        assert found.dtype == dtype
        assert ((found - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_shapes_are_known_without_data():
    with FakeTensorMode():
        v = torch.empty(2, 40, 6)
        for y in (recurrence(v, torch.empty(2, 6)), add_taps(v, v, torch.empty(2, 6))):
            assert (y.shape, y.stride(), y.dtype) == (v.shape, v.stride(), v.dtype)
    for width in ((6,), (6, 6)):
        y = recurrence(torch.randn(2, 40, 6), torch.zeros(2, *width))
        assert y.is_contiguous()
