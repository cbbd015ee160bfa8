"""Fits against impulse responses, recurrences and convolutions in float64, and against published errors."""

import math

import numpy as np
import pytest
import torch

from flash_stu.errors import UserError
from flash_stu.filters.spectral import spectral_filters
from spectralds.bank import FilterBank
from spectralds.fit import METHODS, LDSFit, best_candidate, fit_lds, round_nodes

LENGTH, FILTERS = 8192, 24


@pytest.fixture(scope="module")
def banks() -> dict[str, FilterBank]:
    return {basis: FilterBank(spectral_filters(LENGTH, FILTERS, basis)[1]) for basis in ("hankel", "hankel_l")}


def features(phi: torch.Tensor) -> torch.Tensor:
    """The filters of U+ and U-, (length, 2K)."""
    signs = torch.ones(len(phi), 1, dtype=phi.dtype)
    signs[1::2] = -1
    return torch.cat([phi, signs * phi], dim=1)


def recurrence(fit: LDSFit, x: torch.Tensor) -> torch.Tensor:
    """S = A S + B x, y = C^T S in float64, token by token; x (length,), y (length, 2K)."""
    state, outputs = torch.zeros_like(fit.A), []
    for value in x:
        state = fit.A * state + fit.B * value
        outputs.append(fit.C.T @ state)
    return torch.stack(outputs)


def convolution(filters: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Causal convolution of x (length,) with filters (length, columns), by a zero-padded FFT in float64."""
    size = 2 * len(x)
    spectrum = torch.fft.rfft(filters, n=size, dim=0) * torch.fft.rfft(x, n=size)[:, None]
    return torch.fft.irfft(spectrum, n=size, dim=0)[: len(x)]


@pytest.mark.parametrize("basis", ["hankel", "hankel_l"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_state_160_with_float32_nodes_reproduces_both_branches(banks, basis, dilation):
    bank = banks[basis]
    fit = fit_lds(bank, 160, dilation=dilation)
    assert fit.A.shape == fit.B.shape == (160,)
    assert fit.C.shape == (160, 2 * FILTERS)
    assert fit.A.abs().max() < 1
    error = fit.impulse_response(LENGTH) - features(bank.phi)
    assert error.square().mean() <= 1e-24
    assert fit.report["mse"] <= 1e-24
    assert fit.report["max_coefficient"] < 50
    assert error.abs().max() == pytest.approx(fit.report["max_abs_error"], rel=0.2, abs=1e-15)


@pytest.mark.parametrize(
    "state_dim, method, dtype, mse",
    [
        (48, "auto", torch.float32, 1.2e-12),  # the paper's error, with 160 states there
        (52, "balanced", torch.float32, 1e-13),
        (56, "balanced", torch.float32, 5e-15),
        (64, "balanced", torch.float32, 1e-18),
        (80, "balanced", torch.float32, 1e-24),
        (96, "balanced", torch.float32, 1e-28),  # past what the truncation resolves
        (160, "sampled", torch.float32, 7.7e-19),  # the best published file
        (160, "sampled", torch.float64, 1e-26),
        (80, "quadrature", torch.float64, 1e-18),
        (96, "quadrature", torch.float64, 2.7e-22),
        (128, "quadrature", torch.float64, 1e-25),
    ],
)
def test_error_falls_with_the_state_dimension(banks, state_dim, method, dtype, mse):
    fit = fit_lds(banks["hankel"], state_dim, method, dtype)
    assert len(fit.A) == state_dim
    assert fit.report["mse"] <= mse
    error = fit.impulse_response(LENGTH) - features(banks["hankel"].phi)
    assert error.square().mean() == pytest.approx(fit.report["mse"], rel=0.2, abs=1e-28)


def test_auto_is_the_best_method(banks):
    for state_dim in (24, 40, 56, 96, 160):
        reports = [fit_lds(banks["hankel"], state_dim, method).report for method in ("auto", *METHODS)]
        best = min(reports[1:], key=lambda report: report["relative_error"])
        assert reports[0]["method"] == best["method"] and reports[0]["mse"] == best["mse"]


@pytest.mark.parametrize(
    "length, count, basis",
    [
        *((64, 8, "hankel"), (64, 8, "hankel_l"), (64, 64, "hankel"), (64, 64, "hankel_l")),
        *((101, 13, "hankel"), (500, 33, "hankel_l"), (8192, 8, "hankel_l"), (8192, 64, "hankel")),
        (20001, 24, "hankel"),
    ],
)
def test_the_fit_reaches_the_floor_of_every_size(length, count, basis):
    sigma, phi = spectral_filters(length, count, basis)
    bank = FilterBank(phi)
    report = fit_lds(bank, 160, dtype=torch.float64).report
    each = torch.tensor(report["per_filter"]["relative_error"], dtype=torch.float64)
    assert (each <= reachable(sigma, torch.float64)).all()
    assert report["mse_bound"] <= report["mse"] and report["aak_bound"] <= report["hankel_error"]

    sizes = sigma**0.25
    in_float32 = (reachable(sigma, torch.float32) * sizes).norm() / sizes.norm()
    assert fit_lds(bank, 160).report["run_time_error"] <= in_float32 <= 2e-2


def reachable(sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The relative error of each filter that rounding allows, with room for another order of summation.

    Filter k is V's left singular vector times sigma_k^(1/4), and V's singular values are sqrt(sigma), so its output
    weights are of the size sigma_k^(-1/4): rounding them costs eps sqrt(sigma_1 / sigma_k) of the filter. Where that
    is more than the filter itself, the fit gives it up.
    """
    return (32 * torch.finfo(dtype).eps * (sigma[0] / sigma).sqrt()).clamp(max=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method, tolerance", [("auto", 1e-5), ("balanced", 1e-3), ("quadrature", 1e-2)])
@pytest.mark.parametrize("basis", ["hankel", "hankel_l"])
def test_auto_finds_the_smallest_state_dimension(basis, method, tolerance, dtype):
    bank = FilterBank(spectral_filters(1000, 12, basis)[1])
    fit = fit_lds(bank, "auto", method, dtype, tolerance=tolerance)
    signs = (-1.0) ** torch.arange(1000, dtype=torch.float64)[:, None]
    exact = torch.cat([bank.phi, signs * bank.phi], dim=1)
    rounded = LDSFit(fit.A, fit.B, fit.C.to(dtype).double(), {})
    error = float((rounded.impulse_response(1000) - exact).norm() / exact.norm())
    assert error <= tolerance
    assert fit.report["run_time_error"] == pytest.approx(error, rel=1e-3)
    assert fit.report["state_dim"] == len(fit.A) and fit.report["tolerance"] == tolerance
    for state_dim in range(2, len(fit.A), 2):
        assert best_candidate(bank, state_dim, method, dtype, 1).run_time_error(bank, dtype) > tolerance


def test_a_tolerance_below_rounding_is_refused_with_the_floor(banks):
    with pytest.raises(
        UserError,
        match=r"tolerance is 1e-09; state dimensions up to 256 do not reach it: the least "
        r"error is [12]\..e-06, with \d+ states, and rounding to float32 alone leaves about "
        r"[1-5]\..e-06$",
    ):
        fit_lds(banks["hankel"], "auto", "balanced", tolerance=1e-9)
    assert fit_lds(banks["hankel"], "auto", dtype=torch.float64, tolerance=1e-9).report["state_dim"] <= 80


@pytest.mark.parametrize("method, state_dim", [("quadrature", 80), ("balanced", 28), ("sampled", 40)])
@pytest.mark.parametrize("basis", ["hankel", "hankel_l"])
@pytest.mark.parametrize("length, count", [(64, 8), (101, 9), (257, 10)])
def test_system_is_the_recurrence_it_claims_to_be(length, count, basis, method, state_dim):
    phi = spectral_filters(length, count, basis)[1]
    fit = fit_lds(phi, state_dim, method, torch.float64)
    x = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = recurrence(fit, x)
    # float64 over coefficients in the thousands, which cancel
    torch.testing.assert_close(y, convolution(fit.impulse_response(length), x), rtol=1e-9, atol=1e-9)
    expected = convolution(features(phi), x)
    assert (y - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("basis", ["hankel", "hankel_l"])
@pytest.mark.parametrize("branches", ["shared", "separate", "positive"])
@pytest.mark.parametrize("method, state_dim", [("auto", 160), ("quadrature", 160), ("balanced", 72), ("balanced", 100)])
def test_float32_recurrence_of_8192_steps(banks, basis, branches, method, state_dim):
    bank, channels = banks[basis], 8
    dilation = 2 if branches == "shared" else 1
    fit = fit_lds(bank, state_dim, method, dilation=dilation)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(LENGTH, generator=generator).double()
    plus, minus = torch.randn(2, FILTERS, channels, generator=generator, dtype=torch.float64)
    minus = {"shared": plus, "separate": minus, "positive": torch.zeros_like(minus)}[branches]

    readout, decay = fit.C @ torch.cat([plus, minus]), fit.A
    if dilation == 2:
        half = state_dim // 2
        readout, decay = readout[:half] + readout[half:], decay[:half] ** 2
    y = run_recurrence(x, decay, readout, dilation, np.float32)
    expected = convolution(features(bank.phi) @ torch.cat([plus, minus]), x)
    rounding = expected_rounding(x, decay, readout, dilation)
    assert rounding <= 2.5e-5 * expected.norm()  # small output weights: of 160 states as of 72
    assert (y - expected).norm() <= 2.5 * rounding + 1e-7 * expected.norm()


def run_recurrence(x, decay, readout, dilation: int, dtype) -> torch.Tensor:
    """The system's outputs, (length, channels), computed token by token in a numpy dtype."""
    decay, readout, x = (tensor.numpy().astype(dtype) for tensor in (decay, readout, x))
    slots = [np.zeros(len(decay), dtype) for _ in range(dilation)]
    y = np.zeros((len(x), readout.shape[1]), dtype)
    for t in range(len(x)):
        slots[t % dilation] = decay * slots[t % dilation] + x[t]
        y[t] = slots[t % dilation] @ readout
    return torch.from_numpy(y).double()


def expected_rounding(x, decay, readout, dilation: int) -> float:
    """The norm of the error that float32's rounding is expected to add to the outputs.

    A product and a sum each add a random error of variance u^2 / 3 of what they round, u = 2^-24. In a state these
    errors decay as the state does; the output weights' own rounding, and that of their sum, are of the same size
    once and not accumulated.
    """
    state, variance = np.zeros((dilation, len(decay))), np.zeros((dilation, len(decay)))
    a, weights, total = decay.numpy(), readout.square().sum(dim=1).numpy(), 0.0
    for t, value in enumerate(x.numpy()):
        slot = t % dilation
        state[slot] = a * state[slot] + value
        size = state[slot] ** 2
        variance[slot] = a**2 * variance[slot] + 2 / 3 * size
        total += (variance[slot] + 2 / 3 * size) @ weights
    return 2.0**-24 * math.sqrt(total)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_decays_are_exact_in_the_run_time_dtype(banks, method, dilation):
    A = fit_lds(banks["hankel"], 64, method, dilation=dilation).A
    assert (A**dilation - (A**dilation).float().double()).abs().max() <= 2.0**-52
    assert torch.equal(A[:32], -A[32:])


def test_rounding_never_reaches_one():
    slow = torch.tensor([1 - 1e-12, 0.5], dtype=torch.float64)
    assert round_nodes(slow, torch.float32, 1).tolist() == [1 - 2.0**-24, 0.5]


def test_report_against_a_direct_calculation():
    phi = spectral_filters(300, 10)[1]
    fit = fit_lds(phi, 40)
    error = fit.impulse_response(300)[:, :10] - phi
    report = fit.report
    assert report["mse"] == pytest.approx(float(error.square().mean()), rel=1e-6)
    assert report["relative_error"] == pytest.approx(float(error.norm() / phi.norm()), rel=1e-6)
    for key, values in {
        "mse": error.square().mean(dim=0),
        "max_abs_error": error.abs().amax(dim=0),
        "relative_error": error.norm(dim=0) / phi.norm(dim=0),
    }.items():
        assert report["per_filter"][key] == pytest.approx(values.tolist(), rel=1e-5)
    assert report["max_coefficient"] == pytest.approx(float(fit.C.abs().max()))
    lengths = (fit.A[:20, None] ** torch.arange(300)).norm(dim=1)
    assert report["coefficient_norm"] == pytest.approx(float((fit.C[:20, :10] * lengths[:, None]).norm()), rel=1e-9)
    largest = np.linalg.norm(fit.C[:20, :10].numpy(), 2)
    assert report["coefficient_spectral_norm"] == pytest.approx(largest)
    assert all(math.isfinite(value) for value in report.values() if isinstance(value, float))


def test_filters_in_half_precision_do_not_blow_up_the_coefficients():
    """Noise in the filters must not be fitted: the coefficients would cancel and ruin the recurrence."""
    phi = spectral_filters(1024, 16)[1].bfloat16()
    fit = fit_lds(phi, 160)
    assert fit.report["coefficient_norm"] < 500
    assert fit.report["relative_error"] < 5e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"state_dim": 41}, "state_dim is 41; allowed: even numbers from 2 to 1024, or auto"),
        ({"state_dim": "small"}, "state_dim is 'small'"),
        ({"state_dim": 0}, "state_dim is 0"),
        ({"state_dim": 4096}, "state_dim is 4096"),
        ({"state_dim": True}, "state_dim is True"),
        ({"method": "sgd"}, "method is 'sgd'; allowed: auto, quadrature, balanced, sampled"),
        ({"dtype": torch.bfloat16}, "dtype is torch.bfloat16; allowed: torch.float32, torch.float64"),
        ({"dilation": 3}, "dilation is 3; allowed: 1, 2"),
        ({"phi": torch.zeros(8)}, "shape (8,)"),
        ({"phi": torch.zeros(8, 2, dtype=torch.int64)}, "torch.int64"),
        ({"phi": torch.full((8, 2), math.nan)}, "not finite"),
        ({"tolerance": 0.0}, "tolerance is 0.0; allowed: relative errors between 0 and 1"),
        ({"tolerance": math.nan}, "tolerance is nan"),
    ],
)
def test_bad_input_is_one_line_that_names_it(change, message):
    arguments = {"phi": spectral_filters(64, 4)[1], **change}
    with pytest.raises(UserError) as error:
        fit_lds(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("state_dim", [2, 4])
def test_smallest_systems_are_stable_and_finite(state_dim):
    for method in METHODS:
        fit = fit_lds(spectral_filters(64, 4)[1], state_dim, method)
        assert fit.A.abs().max() < 1
        assert fit.impulse_response(1000).isfinite().all()


@pytest.mark.parametrize("phi", [torch.zeros(9, 2), torch.eye(2), torch.tensor([[1.0], [-1.0]])])
def test_odd_banks_give_finite_systems(phi):
    for method in METHODS:
        fit = fit_lds(phi.double(), 6, method)
        assert fit.A.abs().max() < 1 and fit.C.isfinite().all()
        assert all(math.isfinite(value) for value in fit.report.values() if isinstance(value, float))
