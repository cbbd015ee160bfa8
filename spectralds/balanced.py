"""Nodes by square-root balanced truncation of a fine realisation, diagonalised."""

import torch

from flash_stu.errors import UserError
from spectralds.bank import FilterBank
from spectralds.bounds import hankel_blocks
from spectralds.exponentials import triangular_factor


def balanced_nodes(bank: FilterBank, count: int) -> torch.Tensor:
    """Decays of the balanced truncation of a filter bank, slowest first.

    The fine realisation's Hankel matrix H = U S V^T, over the lags below length / 2 on either side, is
    truncated to its `count` largest singular values; in those coordinates the state matrix is S^-1/2 U^T (H
    shifted) V S^-1/2 and its eigenvalues are the decays (Moore 1981; the shifted form is Ho and Kalman's, in
    the basis of the fine nodes). A bank that lives on every other lag is reduced in steps of two lags, whose
    decays are squares of the nodes.

    Args:
        bank: the filters.
        count: how many nodes, of one sign.

    Returns:
        nodes in (0, 1), float64, (count,).

    Raises:
        UserError: if `count` exceeds what float64 resolves of this bank.
    """
    nodes, coefficients = bank.realisation
    decay = nodes**bank.step
    readout = coefficients * nodes[:, None] ** bank.first
    lags = torch.arange((bank.length // bank.step + 1) // 2, dtype=torch.float64)
    triangle = triangular_factor(decay, lags)
    hankel = hankel_blocks(decay, readout, triangle)
    shifted = hankel_blocks(decay, readout * decay[:, None], triangle)
    left, singular, right = torch.linalg.svd(hankel, full_matrices=False)

    order = min(count, len(singular))
    while order > 0:
        root = singular[:order].sqrt()
        state = (left[:, :order].T @ shifted @ right[:order].T) / root / root[:, None]
        reduced = torch.linalg.eigvals(state)
        if (reduced.imag == 0).all() and reduced.real.min() > 0 and reduced.real.max() < 1:
            break
        order -= 1  # past float64's resolution the small singular values are noise, and so are eigenvalues
    if order < count:
        raise UserError(
            f"state_dim is {2 * count}; balanced truncation resolves at most {2 * order} for these filters in"
            " float64: use that or less, or method 'quadrature'"
        )
    return reduced.real.sort(descending=True).values ** (1 / bank.step)
