"""Diagonal systems: the fast forms against the token loop, and the loop against the definition."""

import pytest
import torch

from flash_stu.ops.causal_conv import causal_conv
from flash_stu.ops.lds import final_state, free_response, lds_scan, powers, zero_state


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
    state = zero_state(2, 6, 3, dilation, x.device)
    y, _ = lds_scan(x, decay, readout, state)
    impulse = (powers(decay, length) @ readout.double()).float()
    torch.testing.assert_close(y, causal_conv(x, impulse, "direct", dilation), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("split", [1, 2, 7, 22])
def test_state_in_one_product_and_free_response(split, dilation):
    x, decay, readout = system()
    zero = zero_state(2, 6, 3, dilation, x.device)
    whole, end = lds_scan(x, decay, readout, zero)
    middle = final_state(x[:, :split], decay, zero)
    torch.testing.assert_close(final_state(x[:, split:], decay, middle), end, atol=1e-5, rtol=1e-5)

    alone, _ = lds_scan(x[:, split:], decay, readout, zero)
    remembered = free_response(decay, readout, middle, 23 - split)
    torch.testing.assert_close((alone + remembered).float(), whole[:, split:], atol=1e-5, rtol=1e-5)
