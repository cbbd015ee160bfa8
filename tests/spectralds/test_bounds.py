"""Hankel singular values against a dense Hankel matrix; bounds against the fits they bound."""

import pytest
import torch

from flash_stu.filters.spectral import spectral_filters
from spectralds.bank import FilterBank
from spectralds.bounds import hankel_singular_values
from spectralds.fit import METHODS, fit_lds


def dense_hankel(features: torch.Tensor, weighted: bool = False) -> torch.Tensor:
    """The Hankel matrix of features (length, outputs) by its definition: rows (output, i), columns j."""
    length, outputs = features.shape
    half = (length + 1) // 2
    index = torch.arange(half)
    blocks = features.T[:, index[:, None] + index[None]]
    if weighted:
        squares = torch.ones(half, dtype=torch.float64)  # binom(2i, i) / 4^i by its recurrence
        for i in range(1, half):
            squares[i] = squares[i - 1] * (2 * i - 1) / (2 * i)
        blocks = blocks * squares.sqrt()[:, None] * squares.sqrt()
    return blocks.reshape(outputs * half, half)


def both_branches(phi: torch.Tensor) -> torch.Tensor:
    signs = (-1.0) ** torch.arange(len(phi), dtype=torch.float64)[:, None]
    return torch.cat([phi, signs * phi], dim=1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("basis", ["hankel", "hankel_l"])
@pytest.mark.parametrize("length, count", [(64, 6), (129, 10)])
def test_hankel_singular_values_against_the_dense_matrix(length, count, basis, weighted):
    phi = spectral_filters(length, count, basis)[1]
    bank = FilterBank(phi)
    found = hankel_singular_values(*bank.features(*bank.realisation), length, weighted)
    exact = torch.linalg.svdvals(dense_hankel(both_branches(phi), weighted))
    count = min(len(found), len(exact))
    torch.testing.assert_close(found[:count], exact[:count], rtol=1e-9, atol=2e-13 * float(exact[0]))


def test_weights_count_every_lag_at_most_once():
    """A weighted Hankel matrix has the Frobenius norm of the lags that it holds in full."""
    impulse = torch.zeros(33, 1, dtype=torch.float64)
    for lag in (0, 1, 7, 16):
        impulse.zero_()[lag] = 1
        assert dense_hankel(impulse, weighted=True).square().sum() == pytest.approx(1.0)
    for lag in (17, 25, 32):
        impulse.zero_()[lag] = 1
        assert dense_hankel(impulse, weighted=True).square().sum() < 1.0


@pytest.mark.parametrize("basis", ["hankel", "hankel_l"])
@pytest.mark.parametrize("method", METHODS)
def test_no_fit_undercuts_its_bounds(basis, method):
    length = 201
    phi = spectral_filters(length, 8, basis)[1]
    bank = FilterBank(phi)
    reports = [fit_lds(bank, state_dim, method, torch.float64).report for state_dim in (4, 8, 12, 16, 20, 24)]
    for report in reports:
        assert 0 < report["mse_bound"] <= report["mse"]
        assert 0 < report["aak_bound"] <= report["hankel_error"]
    bounds = [report["aak_bound"] for report in reports]
    assert bounds == sorted(bounds, reverse=True)
    fit = fit_lds(bank, 12, method, torch.float64)
    error = dense_hankel(fit.impulse_response(length) - both_branches(phi))
    norm = float(torch.linalg.matrix_norm(error, 2))
    assert fit.report["aak_bound"] <= norm <= fit.report["hankel_error"] * (1 + 1e-9)
    assert fit.report["hankel_error"] == pytest.approx(float(error.norm()), rel=1e-6)


def test_bounds_below_rounding_are_zero():
    report = fit_lds(spectral_filters(64, 4)[1], 160).report
    assert report["aak_bound"] == report["mse_bound"] == 0.0
    assert report["hankel_norm"] == pytest.approx(
        float(torch.linalg.matrix_norm(dense_hankel(both_branches(spectral_filters(64, 4)[1])), 2))
    )
