"""The paper's constructions against least squares over every lag, and searches by hand."""

import math

import numpy as np
import pytest
import torch

from flash_stu.filters.spectral import spectral_filters
from spectralds.bank import FilterBank
from spectralds.fit import fit_lds
from spectralds.sampled import sampled_nodes, spectral_representation, theorem_1


def residual(phi: np.ndarray, nodes: np.ndarray) -> float:
    """Squared error of the regression of filters on impulse responses, by QR over every lag."""
    q = np.linalg.qr(nodes[None] ** np.arange(len(phi))[:, None])[0]
    return float(np.square(phi - q @ (q.T @ phi)).sum())


def test_greedy_selection_takes_the_best_system_each_time(monkeypatch):
    monkeypatch.setattr("spectralds.sampled._POOL", 40)
    phi = spectral_filters(150, 5)[1]
    bank = FilterBank(phi)
    pool, chosen = sampled_nodes(bank, 40).numpy(), []
    for count in range(1, 7):
        errors = {node: residual(phi.numpy(), np.array([*chosen, node])) for node in pool if node not in chosen}
        best = min(errors, key=errors.get)
        found = sampled_nodes(bank, count).numpy()
        assert set(found) == {*chosen, best}
        assert (np.diff(found) < 0).all() and found.min() > 0 and found.max() < 1
        chosen.append(best)


def test_the_sample_is_the_same_every_time():
    phi = spectral_filters(100, 6, "hankel_l")[1]
    one, two = sampled_nodes(FilterBank(phi), 30), sampled_nodes(FilterBank(phi), 30)
    assert torch.equal(one, two) and len(one.unique()) == 30


@pytest.mark.parametrize("basis", ["hankel", "hankel_l"])
def test_output_weights_are_the_regression(basis):
    phi = spectral_filters(150, 5, basis)[1]
    fit = fit_lds(phi, 8, "sampled", torch.float64)
    nodes, lags = fit.A[:4].numpy(), np.arange(150)[:, None]
    for k in range(5):
        alive = (phi[:, k] != 0).numpy()  # all lags, or every other one
        exact = np.linalg.lstsq(nodes ** lags[alive], phi[alive, k].numpy(), rcond=None)[0]
        found = fit.C[:4, k].numpy() * (1 if basis == "hankel" else 2)  # -a adds as much, or takes it away
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-9 * np.abs(exact).max())


@pytest.mark.parametrize("basis", ["hankel", "hankel_l"])
def test_spectral_representation_against_least_squares(basis):
    phi = spectral_filters(301, 7, basis)[1]
    bank = FilterBank(phi)
    nodes = torch.tensor([0.999, 0.9, 0.3], dtype=torch.float64)
    responses = nodes.numpy() ** np.arange(301)[:, None]
    exact = np.linalg.lstsq(phi.numpy(), responses, rcond=None)[0].T
    np.testing.assert_allclose(spectral_representation(bank, nodes).numpy(), exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("basis", ["hankel", "hankel_l"])
def test_theorem_1_is_about_the_inverse_of_the_representation(basis):
    phi = spectral_filters(301, 7, basis)[1]
    fit = fit_lds(phi, 20)
    systems = fit.A[:10] if basis == "hankel" else fit.A  # of both signs where the filters represent both
    responses = systems.numpy() ** np.arange(301)[:, None]
    representation = np.linalg.lstsq(phi.numpy(), responses, rcond=None)[0].T
    largest = np.linalg.norm(np.linalg.pinv(representation), 2)
    assert fit.report["lambda_max"] == pytest.approx(largest, rel=1e-6)
    assert fit.report["lambda_max_h"] == pytest.approx(largest * len(systems), rel=1e-6)
    decay = math.exp(-7 / math.log(301))
    assert fit.report["theorem_1_bound"] == pytest.approx(largest * len(systems) * decay, rel=1e-6)


def test_as_many_systems_as_filters_make_the_inverse_the_fit():
    """Then M is square, and what it leaves out of the impulse responses is small beside the filters."""
    phi = spectral_filters(1024, 6)[1]
    bank = FilterBank(phi)
    fit = fit_lds(bank, 12, "balanced", torch.float64)
    inverse = torch.linalg.inv(spectral_representation(bank, fit.A[:6]))
    assert float((fit.C[:6, :6].T - inverse).norm() / inverse.norm()) < 0.2
    assert theorem_1(bank, fit.A[:6])["lambda_max"] == pytest.approx(fit.report["coefficient_spectral_norm"], rel=0.2)
