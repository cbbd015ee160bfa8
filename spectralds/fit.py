"""Fit a diagonal linear dynamical system to spectral filters, in closed form."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from flash_stu.errors import UserError
from spectralds.balanced import balanced_nodes
from spectralds.bank import FilterBank, quadrature_nodes
from spectralds.bounds import theorem_1
from spectralds.exponentials import ROWS, powers

_NODES = {"quadrature": quadrature_nodes, "balanced": balanced_nodes}
METHODS = tuple(_NODES)
DTYPES = (torch.float32, torch.float64)
MAX_STATE_DIM = 1024
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
        """The outputs after a unit impulse at time 0, (length, 2K), float64."""
        lags = torch.arange(length, dtype=torch.float64)
        return torch.cat([powers(self.A, part) @ (self.B[:, None] * self.C) for part in lags.split(_ROWS)])


def fit_lds(
    phi: torch.Tensor | FilterBank,
    state_dim: int = 160,
    method: str = "quadrature",
    dtype: torch.dtype = torch.float32,
    dilation: int = 1,
) -> LDSFit:
    """Fit an LDS to spectral filters: choose decays, round them, solve for the output weights.

    A spectral filter is an integral of decaying exponentials, so nothing has to be trained: state_dim / 2
    decays are chosen, rounded to what the run-time dtype can hold (a decay to the power 8192 amplifies its
    rounding), and the output weights are a truncated least squares solution, whose coefficients stay small
    enough for that dtype.

    Args:
        phi: filters, (length, filters), or a FilterBank, which keeps what several fits can share.
        state_dim: h, the number of eigenvalues: half positive, and their negatives.
        method: "quadrature" spaces the decays evenly in ln(-ln a); "balanced" takes them from a balanced
            truncation, which needs fewer of them for the same error and resolves at most about 88 (length
            8192, 24 filters).
        dtype: the dtype in which the system will run, torch.float32 or torch.float64. A, B and C are float64.
        dilation: tokens per step of the recurrence that will run; A ** dilation is exact in `dtype`.

    Returns:
        the system. Its report holds, beside the arguments: mse, max_abs_error and relative_error (Frobenius)
        over all filters, the same three per filter, max_coefficient, coefficient_norm (of exponentials
        scaled to unit length), lambda_max and lambda_max_h (Theorem 1), hankel_norm of the features and
        hankel_error (Frobenius norm of the error's Hankel matrix, at least its Hankel norm) with aak_bound,
        and mse_bound: no system of this dimension undercuts these, and 0.0 means that they are below
        float64's rounding; seconds.

    Raises:
        UserError: for filters, a state dimension, method, dtype or dilation that cannot be.

    Source: Shah et al. 2025, SpectraLDS (arXiv 2505.17868) for the system's form; the closed form replaces
    its sampling of systems.
    """
    start = time.perf_counter()
    check_arguments(state_dim, method, dtype, dilation)
    bank = phi if isinstance(phi, FilterBank) else FilterBank(phi)
    with _threads(bank.length):
        nodes = round_nodes(_NODES[method](bank, state_dim // 2), dtype, dilation)
        coefficients, norm = bank.solve(nodes, torch.finfo(dtype).eps)
        A, C = bank.features(nodes, coefficients)
        report = {
            "method": method,
            "state_dim": state_dim,
            "dtype": str(dtype).removeprefix("torch."),
            "dilation": dilation,
            "length": bank.length,
            "num_filters": bank.num_filters,
            **_errors(bank, bank.evaluate(nodes, coefficients)),
            "max_coefficient": float(C.abs().max()),
            "coefficient_norm": float(norm),
            **theorem_1(coefficients),
            "hankel_norm": bank.bounds.aak(0),
            "aak_bound": bank.bounds.aak(state_dim),
            "mse_bound": bank.bounds.mse(state_dim),
            "seconds": time.perf_counter() - start,
        }
    return LDSFit(A, torch.ones_like(A), C, report)


def check_arguments(state_dim: int, method: str, dtype: torch.dtype = torch.float32, dilation: int = 1) -> None:
    """Raise the UserError that `fit_lds` would raise for these arguments, whatever the filters."""
    if type(state_dim) is not int or state_dim % 2 or not 2 <= state_dim <= MAX_STATE_DIM:
        raise UserError(f"state_dim is {state_dim!r}; allowed: even numbers from 2 to {MAX_STATE_DIM}")
    if method not in METHODS:
        raise UserError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype}; allowed: {', '.join(str(d) for d in DTYPES)}")
    if dilation not in (1, 2):
        raise UserError(f"dilation is {dilation!r}; allowed: 1, 2")


def round_nodes(nodes: torch.Tensor, dtype: torch.dtype, dilation: int) -> torch.Tensor:
    """Move nodes so that node ** dilation is a number of the given dtype below one, float64, (nodes,)."""
    below_one = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    return (nodes**dilation).to(dtype).clamp(max=below_one).double() ** (1 / dilation)


@contextmanager
def _threads(length: int):
    """One thread for a short bank: its factorisations are so small that more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if length <= ROWS else before)
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
