"""Bounds on the error of any linear dynamical system: Hankel singular values and the AAK bound."""

import math

import torch

from flash_stu.filters.exponentials import powers
from flash_stu.filters.lags import CompressedLags

FLOOR = 1e-14  # Hankel singular values below this fraction of the largest are rounding


def hankel_blocks(coefficients: torch.Tensor, triangle: torch.Tensor) -> torch.Tensor:
    """Compute the Hankel matrices of a diagonal system in an orthonormal basis of its inputs and outputs, stacked.

    The Hankel matrix of one output, H[i, j] = sum_n c[n] decay[n]^(i + j), is V diag(c) V^T with V the
    Vandermonde matrix of the decays. With V = Q R it has the singular values of the small R diag(c) R^T.

    Args:
        coefficients: (states, outputs); triangle: R, (rank, states).

    Returns:
        (outputs * rank, rank), float64.
    """
    blocks = torch.einsum("pn,nk,qn->kpq", triangle, coefficients, triangle)
    return blocks.reshape(-1, triangle.shape[0])


def hankel_singular_values(
    decay: torch.Tensor, coefficients: torch.Tensor, length: int, weighted: bool = False
) -> torch.Tensor:
    """Compute singular values of the Hankel matrix that a filter bank of a given length determines, largest first.

    The matrix maps past inputs to future outputs, H[(i, k), j] = f_k(i + j), with i and j below (length + 1)
    / 2, so that only lags of the filters enter. H is never formed.

    A linear dynamical system of dimension r has a Hankel matrix of rank r: no such system comes closer to
    the bank than the (r+1)-st value in Hankel norm (Adamyan, Arov, Krein; for a finite section it is Eckart
    and Young's theorem), and sum_{j > r} values_j^2 bounds its squared error in Frobenius norm. `weighted`
    scales row i and column j by w_i w_j with w_i^2 = binom(2i, i) / 4^i. Those squares convolve to one, so
    each lag counts at most once and the same sum bounds the squared error of the filters themselves, summed
    over lags and outputs.

    Args:
        decay: eigenvalues in (-1, 1), (states,); coefficients: (states, outputs); both float64, a system that
            reproduces the bank over `length` lags.
        length: lags of the filters, in tokens.
        weighted: see above.

    Returns:
        at most `states` values, float64, (values,).
    """
    rows = []
    for parity in (0, 1):  # negative eigenvalues are smooth on every other lag
        lags = CompressedLags(((length + 1) // 2 - parity + 1) // 2)
        points = parity + 2 * lags.points
        values = powers(decay.abs(), points) * decay.sign() ** parity
        if weighted:
            square = torch.lgamma(points + 0.5) - torch.lgamma(points + 1) - 0.5 * math.log(math.pi)
            values *= (0.5 * square).exp()[:, None]
        rows.append(lags.compress(values))
    triangle = torch.linalg.qr(torch.cat(rows), mode="r")[1]
    return torch.linalg.svdvals(torch.linalg.qr(hankel_blocks(coefficients, triangle), mode="r")[1])


class Bounds:
    """Bounds that hold for any system that approximates given filters, for every state dimension.

    Args:
        decay, coefficients, length: as for `hankel_singular_values`.

    Attributes:
        hankel: Hankel singular values, largest first, cut off where they are below float64's rounding.
        weighted: the same for the weighted matrix.
    """

    def __init__(self, decay: torch.Tensor, coefficients: torch.Tensor, length: int) -> None:
        self._entries = coefficients.shape[1] * length
        self.hankel = _above_rounding(hankel_singular_values(decay, coefficients, length))
        self.weighted = _above_rounding(hankel_singular_values(decay, coefficients, length, weighted=True))

    def aak(self, state_dim: int) -> float:
        """Returns the least Hankel-norm error of a system of this dimension; 0.0 where it is below rounding."""
        return float(self.hankel[state_dim]) if state_dim < len(self.hankel) else 0.0

    def mse(self, state_dim: int) -> float:
        """Returns the mean squared error that no system of this dimension undercuts; 0.0 where it is below rounding."""
        return float(self.weighted[state_dim:].square().sum()) / self._entries


def _above_rounding(values: torch.Tensor) -> torch.Tensor:
    return values[values > FLOOR * values[0]]
