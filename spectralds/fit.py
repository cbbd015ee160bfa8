"""Fit a diagonal linear dynamical system to spectral filters, in closed form."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from flash_stu.errors import UserError
from flash_stu.filters.exponentials import powers
from spectralds.balanced import balanced_nodes
from spectralds.bank import FilterBank, quadrature_nodes
from spectralds.options import AUTO, MAX_AUTO_DIM, MAX_STATE_DIM, METHODS, TOLERANCE
from spectralds.sampled import sampled_nodes, theorem_1

_NODES = {"quadrature": quadrature_nodes, "balanced": balanced_nodes, "sampled": sampled_nodes}
DTYPES = (torch.float32, torch.float64)
_ROWS = 16384  # lags of an impulse response computed at once


@dataclass(frozen=True)
class LDSFit:
    """A linear dynamical system S_t = A S_{t-1} + B x_t, y_t = C^T S_t: its 2K outputs are the features.

    Attributes:
        A: real eigenvalues in (-1, 1), (states,): the nodes, then their negatives.
        B: input weights, all one, (states,).
        C: output weights, (states, 2K): features U+ (filters phi_k(t)), then U- (filters (-1)^t phi_k(t)).
        report: how good the fit is, JSON-ready; see `fit_lds`.
    """

    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    report: dict = field(repr=False)

    def impulse_response(self, length: int) -> torch.Tensor:
        """Returns the outputs after a unit impulse at time 0, (length, 2K), float64."""
        lags = torch.arange(length, dtype=torch.float64)
        return torch.cat([powers(self.A, part) @ (self.B[:, None] * self.C) for part in lags.split(_ROWS)])


def fit_lds(
    phi: torch.Tensor | FilterBank,
    state_dim: int | str = 160,
    method: str = AUTO,
    dtype: torch.dtype = torch.float32,
    dilation: int = 1,
    tolerance: float = TOLERANCE,
) -> LDSFit:
    """Fit an LDS to spectral filters: choose decays, round them, solve for the output weights.

    A spectral filter is an integral of decaying exponentials, so nothing has to be trained: state_dim / 2
    decays are chosen, rounded to what the run-time dtype can hold (a decay to the power 8192 amplifies its
    rounding), and the output weights are a truncated least squares solution, whose coefficients stay small
    enough for that dtype.

    Args:
        phi: filters, (length, filters), or a FilterBank, which keeps what several fits can share.
        state_dim: h, the number of eigenvalues: half positive, and their negatives. "auto": the smallest h whose
            run_time_error is at most `tolerance`.
        method: how the decays are chosen. "quadrature" spaces them evenly in ln(-ln a); "balanced" takes them from a
            balanced truncation; "sampled" picks them out of sampled systems, as the SpectraLDS paper does; "auto" is
            whichever of the three leaves the least error.
        dtype: the dtype in which the system will run, torch.float32 or torch.float64. A, B and C are float64.
        dilation: tokens per step of the recurrence that will run; A ** dilation is exact in `dtype`.
        tolerance: relative error of the impulse responses, used with state_dim "auto".

    Returns:
        the system. Its report holds, beside the arguments (method: the one that was used; tolerance: None where
        state_dim was given): mse, max_abs_error and relative_error (Frobenius) over all filters, the same three per
        filter; run_time_error, the relative error of the impulse responses once C is rounded to `dtype` as well, and
        rounding_floor, its limit for many states; max_coefficient, coefficient_norm (of
        exponentials scaled to unit length), coefficient_spectral_norm (of the map from impulse responses to filters);
        lambda_max, lambda_max_h and theorem_1_bound (see `theorem_1`); hankel_norm of the features and
        hankel_error (Frobenius norm of the error's Hankel matrix, at least its Hankel norm) with aak_bound,
        and mse_bound: no system of this dimension undercuts these, and 0.0 means that they are below
        float64's rounding; seconds.

    Raises:
        UserError: for invalid filters or an invalid state dimension, method, dtype, dilation or tolerance.

    Source: Shah et al. 2025, SpectraLDS (arXiv 2505.17868) for the system's form; the closed form replaces
    its sampling of systems.
    """
    start = time.perf_counter()
    check_arguments(state_dim, method, dtype, dilation, tolerance)
    bank = phi if isinstance(phi, FilterBank) else FilterBank(phi)
    with few_threads():
        if isinstance(state_dim, str):
            candidate = _smallest(bank, method, dtype, dilation, tolerance)
        else:
            candidate = best_candidate(bank, state_dim, method, dtype, dilation)
        nodes, coefficients = candidate.nodes, candidate.coefficients
        theorem, floor, bounds = theorem_1(bank, nodes), rounding_floor(bank, dtype), bank.bounds
    A, C = bank.features(nodes, coefficients)
    report = {
        "method": candidate.method,
        "state_dim": len(A),
        "tolerance": tolerance if state_dim == AUTO else None,
        "dtype": str(dtype).removeprefix("torch."),
        "dilation": dilation,
        "length": bank.length,
        "num_filters": bank.num_filters,
        **_errors(bank, bank.evaluate(nodes, coefficients)),
        "run_time_error": candidate.run_time_error(bank, dtype),
        "rounding_floor": floor,
        "max_coefficient": float(C.abs().max()),
        "coefficient_norm": float(candidate.norm),
        "coefficient_spectral_norm": float(torch.linalg.matrix_norm(coefficients, 2)),
        **theorem,
        "hankel_norm": bounds.aak(0),
        "aak_bound": bounds.aak(len(A)),
        "mse_bound": bounds.mse(len(A)),
        "seconds": time.perf_counter() - start,
    }
    return LDSFit(A, torch.ones_like(A), C, report)


@dataclass(frozen=True)
class Candidate:
    """Nodes of one sign and their coefficients, with nothing computed of them but the error.

    Attributes:
        method: that chose the nodes; nodes: (n,); coefficients: (n, filters); norm: of the coefficients, see `solve`.
        relative_error: Frobenius, of the filters.
    """

    method: str
    nodes: torch.Tensor
    coefficients: torch.Tensor
    norm: torch.Tensor
    relative_error: float

    def run_time_error(self, bank: FilterBank, dtype: torch.dtype) -> float:
        """Returns the relative error with coefficients rounded to `dtype`."""
        return bank.relative_error(self.nodes, self.coefficients.to(dtype).double())


def best_candidate(bank: FilterBank, state_dim: int, method: str, dtype: torch.dtype, dilation: int) -> Candidate:
    """Returns the candidate of a method, or for "auto" the one of least error; arguments as in `fit_lds`."""
    candidates = [
        _candidate(bank, name, _NODES[name](bank, state_dim // 2), dtype, dilation)
        for name in (METHODS if method == AUTO else (method,))
    ]
    return min(candidates, key=lambda candidate: candidate.relative_error)


def rounding_floor(bank: FilterBank, dtype: torch.dtype) -> float:
    """Returns the error that rounding leaves: the run-time error of the bank's fine realisation, which has more states
    than any fit needs.

    It is the filters' share of the floor. Small filters whose coefficients would have to be large are given up in
    `FilterBank.solve`; at K = 24 and length 8192 nothing is, and rounded output weights are all of it.
    """
    nodes = bank.realisation[0]
    return _candidate(bank, "fine", nodes, dtype, 1).run_time_error(bank, dtype)


def _candidate(bank: FilterBank, method: str, nodes: torch.Tensor, dtype: torch.dtype, dilation: int) -> Candidate:
    nodes = round_nodes(nodes, dtype, dilation)
    coefficients, norm = bank.solve(nodes, torch.finfo(dtype).eps)
    return Candidate(method, nodes, coefficients, norm, bank.relative_error(nodes, coefficients))


def _smallest(bank: FilterBank, method: str, dtype: torch.dtype, dilation: int, tolerance: float) -> Candidate:
    """Returns the candidate of the smallest state dimension whose run-time error is at most `tolerance`.

    The bound on the error tells where to begin: no smaller system can reach the tolerance. From there every state
    dimension is tried, because rounding makes the error jump about once it is near its floor.
    """
    least, at = math.inf, 0
    for state_dim in range(2, MAX_AUTO_DIM + 1, 2):
        if math.sqrt(bank.bounds.mse(state_dim) * bank.phi.numel()) > tolerance * bank.norm:
            continue
        candidate = best_candidate(bank, state_dim, method, dtype, dilation)
        error = candidate.run_time_error(bank, dtype)
        if error <= tolerance:
            return candidate
        if error < least:
            least, at = error, state_dim
    raise UserError(
        f"tolerance is {tolerance:g}; state dimensions up to {MAX_AUTO_DIM} do not reach it: the least error is"
        f" {least:.1e}, with {at} states, and rounding to {str(dtype).removeprefix('torch.')} alone leaves about"
        f" {rounding_floor(bank, dtype):.1e}"
    )


def check_arguments(
    state_dim: int | str,
    method: str,
    dtype: torch.dtype = torch.float32,
    dilation: int = 1,
    tolerance: float = TOLERANCE,
) -> None:
    """Raise the UserError that `fit_lds` would raise for these arguments, whatever the filters."""
    number = type(state_dim) is int and state_dim % 2 == 0 and 2 <= state_dim <= MAX_STATE_DIM
    if not number and state_dim != AUTO:
        raise UserError(f"state_dim is {state_dim!r}; allowed: even numbers from 2 to {MAX_STATE_DIM}, or {AUTO}")
    if method not in (AUTO, *METHODS):
        raise UserError(f"method is {method!r}; allowed: {', '.join((AUTO, *METHODS))}")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype}; allowed: {', '.join(str(d) for d in DTYPES)}")
    if dilation not in (1, 2):
        raise UserError(f"dilation is {dilation!r}; allowed: 1, 2")
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance is {tolerance!r}; allowed: relative errors between 0 and 1")


def round_nodes(nodes: torch.Tensor, dtype: torch.dtype, dilation: int) -> torch.Tensor:
    """Move nodes so that node ** dilation is a number of the given dtype below one, float64, (nodes,)."""
    below_one = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    return (nodes**dilation).to(dtype).clamp(max=below_one).double() ** (1 / dilation)


@contextmanager
def few_threads() -> Iterator[None]:
    """Run on one thread: factorisations of a few hundred rows are so small that more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _errors(bank: FilterBank, filters: torch.Tensor) -> dict:
    difference = (filters - bank.phi).abs()
    norms, sizes = difference.norm(dim=0), bank.phi.norm(dim=0)
    tiny = torch.finfo(torch.float64).tiny
    # how often a lag occurs in the Hankel matrix whose rows and columns end at half the length
    lags, half = torch.arange(bank.length), (bank.length + 1) // 2
    occurrences = torch.minimum(lags + 1, 2 * half - 1 - lags).clamp(min=0)
    return {
        "mse": float(difference.square().mean()),
        "max_abs_error": float(difference.max()),
        "relative_error": float(norms.norm() / sizes.norm().clamp(min=tiny)),
        "hankel_error": float((2 * occurrences[:, None] * difference.square()).sum().sqrt()),
        "per_filter": {
            "mse": difference.square().mean(dim=0).tolist(),
            "max_abs_error": difference.amax(dim=0).tolist(),
            "relative_error": (norms / sizes.clamp(min=tiny)).tolist(),
        },
    }
