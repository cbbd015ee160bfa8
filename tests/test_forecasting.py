"""Forecasts of a series: origins and quarters that belong together, closed forms on systems that are known."""

import sys

import numpy as np
import pytest
import torch

import spectralds
from flash_stu import UserError


@pytest.fixture
def forecasting(scripts):
    return scripts["forecasting"]


def test_windows_and_errors_are_of_the_quarters_they_say(forecasting):
    series = torch.arange(80.0)[:, None] * torch.tensor([1.0, 10.0])
    parts = forecasting.windows(series, 5, 3)
    assert parts.shape == (26, 5, 2) and parts[1, :, 1].tolist() == [30, 40, 50, 60, 70]
    first, horizon = 70, forecasting.HORIZON
    found = forecasting.errors(lambda past: past[:, -1:].expand(-1, horizon, -1), series, first)
    # the last value is h behind in one channel, 10 h in the other, h quarters ahead
    ahead = torch.arange(1.0, horizon + 1, dtype=torch.float64)
    assert found.shape == (80 - first - horizon + 1, horizon, 2)
    assert torch.equal(found, torch.stack([ahead, 10 * ahead], dim=-1).square().expand(len(found), -1, -1))


def test_own_last_value_is_exact_for_series_of_its_form(forecasting):
    series = torch.stack([0.9 ** torch.arange(40.0) + 1, 2 - (-0.8) ** torch.arange(40.0)], dim=-1)
    forecast = forecasting.of_predictor(forecasting.Predictor(forecasting.own_last_value(series)))
    found = forecast(series[None, 10:20])
    # float32 in, float64 normal equations whose condition is near 100
    torch.testing.assert_close(found, series[None, 20 : 20 + forecasting.HORIZON], atol=1e-4, rtol=1e-4)


def test_a_systems_forecast_reads_its_own_outputs(forecasting):
    random = np.random.default_rng(0)
    a, (b, c, d) = np.array([0.5, -0.3]), random.standard_normal((3, 2, 2)) / 3
    system = spectralds.SymmetricLDS(*map(torch.from_numpy, (a, b, c, d)))
    past = torch.from_numpy(random.standard_normal((3, 6, 2)))
    seen, expected = past.clone(), []
    for _ in range(forecasting.HORIZON):
        states = torch.zeros(3, 2, dtype=torch.float64)
        for now in seen.unbind(1):
            states = states * system.A + now @ system.B.T
        expected.append(states @ system.C.T + seen[:, -1] @ system.D.T)
        seen = torch.cat([seen, expected[-1][:, None]], dim=1)
    torch.testing.assert_close(forecasting.of_system(system)(past), torch.stack(expected, dim=1))


def test_the_economy_as_it_is_scaled(forecasting):
    pytest.importorskip("statsmodels", reason="statsmodels is not installed")
    series = forecasting.economy().double()
    fitted = series[: forecasting.FITTED]
    assert series.shape == (202, len(forecasting.SERIES)) and bool(series.isfinite().all())
    # float32's rounding of 123 values of order one
    assert float(fitted.mean(0).abs().max()) < 1e-6
    assert float((fitted.var(0, correction=0) - 1).abs().max()) < 1e-5


def test_without_statsmodels_it_is_one_line(forecasting, monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'flash-stu\[experiments\]'"):
        forecasting.economy()
