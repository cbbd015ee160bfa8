"""The recurrence with one decay for each channel, against scipy's filter."""

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from flash_stu.ops.scan import diagonal_scan


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64, 1025, 2100])
def test_against_a_filter(length):
    rng = np.random.default_rng(0)
    decay = np.array([0.9999, -0.9999, 0.5, -0.3, 0.0, 1e-200])
    x, state = rng.standard_normal((2, length, 6)), rng.standard_normal((2, 6))
    found = diagonal_scan(*(torch.from_numpy(array) for array in (x, decay, state)))
    for j, a in enumerate(decay):
        expected, _ = lfilter([1.0], [1.0, -a], x[:, :, j], axis=1, zi=a * state[:, j, None])
        np.testing.assert_allclose(found[:, :, j], expected, rtol=1e-9, atol=1e-9)


def test_gradients():
    torch.manual_seed(0)
    x, state = torch.randn(2, 35, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    decay = torch.tensor([0.99, -0.6, 0.1], dtype=torch.float64)
    assert torch.autograd.gradcheck(diagonal_scan, [t.requires_grad_() for t in (x, decay, state)], fast_mode=True)
