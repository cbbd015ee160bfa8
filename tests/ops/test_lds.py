"""Diagonal systems: the fast forms against the token loop, and the loop against the definition."""

import math

import pytest
import torch
from references import lds_scan

from flash_stu.filters.exponentials import powers
from flash_stu.ops import lds
from flash_stu.ops.conv.choice import causal_conv
from flash_stu.ops.lds import final_state, free_response, lds_chunked, scale_rates, zero_state


def system(states=6, channels=3, length=23, batch=2):
    torch.manual_seed(0)
    decay = torch.tensor([0.99, 0.5, 0.1, -0.3, -0.95, 0.7])[:states]
    return torch.randn(batch, length, channels), decay, torch.randn(states, channels)


def test_powers_keep_signs_and_digits():
    decay = torch.tensor([0.5, -0.5, 1 - 2.0**-20, 0.0])
    table = powers(decay, 9001)
    assert table[0].tolist() == [1, 1, 1, 1]
    assert table[3, :2].tolist() == pytest.approx([0.125, -0.125])
    assert table[9000, 2].item() == pytest.approx((1 - 2.0**-20) ** 9000, rel=1e-12)
    assert table[1, 3] == 0


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 5, 23])
def test_scan_is_the_convolution_with_its_impulse_response(length, dilation):
    x, decay, readout = system(length=length)
    state = zero_state(2, 3, 6, dilation, x.device)
    y, _ = lds_scan(x, decay, readout, state)
    impulse = (powers(decay, length) @ readout.double()).float()
    torch.testing.assert_close(y, causal_conv(x, impulse, "direct", dilation), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("split", [1, 2, 7, 22])
def test_state_in_one_product_and_free_response(split, dilation):
    x, decay, readout = system()
    zero = zero_state(2, 3, 6, dilation, x.device)
    whole, end = lds_scan(x, decay, readout, zero)
    middle = final_state(x[:, :split], decay, zero)
    torch.testing.assert_close(final_state(x[:, split:], decay, middle), end, atol=1e-5, rtol=1e-5)

    alone, _ = lds_scan(x[:, split:], decay, readout, zero)
    remembered = free_response(decay, readout, middle, 23 - split)
    torch.testing.assert_close((alone + remembered).float(), whole[:, split:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 63, 64, 127, 128, 129, 500, 1100])
def test_chunked_form(length, dilation):
    x, decay, readout = system(length=length, batch=3)
    start = tuple(torch.randn(3, 3, 6) for _ in range(dilation))
    y, end = lds_scan(x.double(), decay, readout, tuple(slot.double() for slot in start))
    found, state = lds_chunked(x, decay, readout, start)
    torch.testing.assert_close(found.double(), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tuple(slot.double() for slot in state), end, atol=1e-5, rtol=1e-5)
    assert state[0].dtype == torch.float32


def test_chunked_form_of_half_precision_inputs():
    x, decay, readout = system(length=300)
    x = x.bfloat16()
    exact, _ = lds_scan(x.double(), decay, readout, zero_state(2, 3, 6, 2, "cpu", torch.float64))
    y, state = lds_chunked(x, decay, readout, zero_state(2, 3, 6, 2, "cpu"))
    assert (y.dtype, state[0].dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=2**-8)


def test_gradients_of_every_form_against_finite_differences(monkeypatch):
    monkeypatch.setattr(lds, "_CHUNK", 2)
    monkeypatch.setattr(lds, "_SEGMENT", 1)
    torch.manual_seed(0)
    decay = torch.tensor([0.97, -0.6, 0.3], dtype=torch.float64, requires_grad=True)
    change, readout, x = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3,), (3, 2), (2, 9, 2))
    )
    zero = zero_state(2, 2, 3, 2, "cpu", torch.float64)

    def scan(decay, change, readout, x):
        return lds_scan(x, scale_rates(decay, change), readout, zero)[0]

    def pieces(decay, change, readout, x):
        moved = scale_rates(decay, change)
        state = final_state(x[:, :5], moved, zero)
        inner = causal_conv(x[:, 5:], powers(moved, 2) @ readout, "fft", 2)
        return inner + free_response(moved, readout, state, 4)

    def chunked(decay, change, readout, x):
        y, state = lds_chunked(x, scale_rates(decay, change), readout, zero)
        return y, *state

    for form in (scan, pieces, chunked):
        assert torch.autograd.gradcheck(form, (decay, change, readout, x)), form.__name__


def test_decays_with_scaled_rates_are_stable_exact_and_differentiable_at_the_ends():
    largest = 1 - 2.0**-24
    decay = torch.tensor([0.0, 1e-30, -1e-5, 0.3, -0.9, 1 - 2.0**-20, largest, -largest])
    unmoved = scale_rates(decay, torch.zeros(8)).float()
    assert torch.equal(unmoved, decay)
    for amount in (-40.0, -1.0, 1.0, 5.0):
        change = torch.full((8,), amount, requires_grad=True)
        moved = scale_rates(decay, change)
        assert (moved.float().abs() < 1).all()
        assert ((moved.sign() == decay.sign()) | (moved == 0)).all()
        torch.testing.assert_close(moved[3].item(), 0.3 ** math.exp(amount))
        (powers(moved, 9000) @ torch.ones(8, 1, dtype=torch.float64)).sum().backward()
        assert change.grad.isfinite().all()
