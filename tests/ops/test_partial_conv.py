"""Far lags of filters of a million tokens, and sums over all of them, against float64 at some positions."""

import pytest
import torch

from flash_stu.filters.exponentials import powers
from flash_stu.filters.spectral import compute_filters
from flash_stu.ops.conv.partial import decayed_sums, free_response
from flash_stu.ops.conv.tail import exponential_tail

LENGTH = 2**20
OFFSET = 33


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_tail_of_filters_of_a_million_tokens(dilation):
    _, phi = compute_filters(LENGTH, 24, "hankel")
    filters = phi[::dilation]
    decay, weights = exponential_tail(filters.float(), OFFSET, False)
    lags = torch.arange(OFFSET, len(filters))
    fitted = torch.cat([powers(decay, part - OFFSET) @ weights.double() for part in lags.split(65536)])
    assert (fitted - filters[OFFSET:]).norm(dim=0).max() < 1e-6 * filters.norm(dim=0).max()
    assert weights.abs().max() < 1


@pytest.mark.parametrize("dilation", [1, 2])
def test_sums_over_a_million_tokens(dilation):
    """As many ranks as one wants: the states of eight parts, carried on by powers up to a^917504."""
    torch.manual_seed(0)
    x = torch.randn(1, LENGTH, 2)
    rates = torch.logspace(-8, 0, 9, dtype=torch.float64)
    decay = torch.exp(-rates).float().double()
    steps = LENGTH // 8 // dilation
    own = [decayed_sums(part, decay, dilation) for part in x.chunk(8, dim=1)]
    far = sum(
        state * powers(decay, torch.tensor([steps * (7 - number)], dtype=torch.float64))[0].float()
        for number, state in enumerate(own)
    )
    for phase in range(dilation):
        inputs = x[0, phase::dilation].double()
        age = torch.arange(len(inputs) - 1, -1, -1, dtype=torch.float64)
        expected = (powers(decay, age).t() @ inputs).t()
        size = (powers(decay, age).t() @ inputs.abs()).t()
        assert ((far[0, phase] - expected).abs() <= 1e-6 * size).all()

    readout = torch.randn(9, 2)
    y = free_response(far, decay, readout, 200_001)
    for token in (0, 1, 12_345, 131_071, 200_000):
        n, phase = divmod(token, dilation)
        terms = decay**n * readout.t().double() * far[0, phase].double()
        assert (y[0, token] - terms.sum(1)).abs().max() < 1e-6 * terms.abs().sum(1).max() + 1e-12
