"""Compressed lags against sums over every lag."""

import pytest
import torch

from flash_stu.filters.exponentials import column_norms, powers
from flash_stu.filters.lags import CompressedLags
from flash_stu.filters.spectral import spectral_filters
from spectralds.bank import FilterBank

COUNTS = (0, 1, 63, 64, 65, 100, 1000, 8191)


@pytest.mark.parametrize("count", COUNTS)
def test_inner_products_of_exponentials_are_kept(count):
    s = torch.linspace(-12, 4, 60, dtype=torch.float64)  # slower than 8191 lags show, faster than one lag shows
    nodes = s.exp().neg().exp()
    lags = CompressedLags(count)
    whole, rows = powers(nodes, count), lags.compress(powers(nodes, lags.points))
    assert len(rows) <= min(count, 64 + 24 * 7)
    size = whole.norm(dim=0).clamp(min=1)
    assert ((rows.T @ rows - whole.T @ whole) / size / size[:, None]).abs().sum() <= 60 * 60 * 1e-15


@pytest.mark.parametrize("count", COUNTS)
def test_projection_keeps_inner_products_with_data(count):
    generator = torch.Generator().manual_seed(0)
    nodes = torch.linspace(0.3, 0.9999, 9, dtype=torch.float64)
    data = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    lags = CompressedLags(count)
    rows, outside = lags.project(data)
    whole = powers(nodes, count)
    torch.testing.assert_close(lags.compress(powers(nodes, lags.points)).T @ rows, whole.T @ data, rtol=0, atol=1e-12)
    assert float(rows.square().sum() + outside**2) == pytest.approx(float(data.square().sum()))


def test_points_between_lags_may_be_weighted():
    """As the bounds do: a smooth weight on every row."""
    lags = CompressedLags(3001)
    weighted = lags.compress(
        powers(torch.tensor([0.999], dtype=torch.float64), lags.points) / (lags.points + 1)[:, None]
    )
    every = torch.arange(3001, dtype=torch.float64)
    assert float(weighted.norm()) == pytest.approx(float((0.999**every / (every + 1)).norm()), rel=1e-14)


@pytest.mark.parametrize("basis", ["hankel", "hankel_l"])
@pytest.mark.parametrize("length", [64, 301, 4096])
def test_compressed_error_is_that_over_all_lags(basis, length):
    bank = FilterBank(spectral_filters(length, 9, basis)[1])
    nodes = torch.linspace(0.1, 0.999, 7, dtype=torch.float64)
    coefficients, _ = bank.solve(nodes, 1e-7)
    direct = (bank.evaluate(nodes, coefficients) - bank.phi).norm() / bank.phi.norm()
    assert bank.relative_error(nodes, coefficients) == pytest.approx(float(direct), rel=1e-12)


def test_column_norms():
    nodes = torch.tensor([0.2, 0.9, 1 - 1e-9], dtype=torch.float64)
    direct = powers(nodes, torch.arange(0, 500, 2, dtype=torch.float64)).norm(dim=0)
    torch.testing.assert_close(column_norms(nodes, 250, 2), direct)
