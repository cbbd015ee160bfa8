"""Nodes by square-root balanced truncation of a fine realisation, diagonalised."""

import torch

from flash_stu.filters.exponentials import powers
from flash_stu.filters.lags import CompressedLags
from spectralds.bank import FilterBank, quadrature_nodes
from spectralds.bounds import FLOOR, hankel_blocks


def balanced_nodes(bank: FilterBank, count: int) -> torch.Tensor:
    """Compute the decays of the balanced truncation of a filter bank, slowest first.

    The fine realisation's Hankel matrix H = U S V^T, over the lags below length / 2 on either side, is
    truncated to its `count` largest singular values; in those coordinates the state matrix is S^-1/2 U^T (H
    shifted) V S^-1/2 and its eigenvalues are the decays (Moore 1981; the shifted form is Ho and Kalman's, in
    the basis of the fine nodes). A bank that lives on every other lag is reduced in steps of two lags, whose
    decays are squares of the nodes.

    Past float64's resolution the small singular values are noise, and eigenvalues leave (0, 1): at length 8192 and 24
    filters 44 nodes are resolved. Any more are placed between those, evenly in s = ln(-ln a), so that the error
    keeps falling. A bank too rough for any truncation gets the nodes of the quadrature.

    Args:
        bank: the filters.
        count: how many nodes, of one sign.

    Returns:
        nodes in (0, 1), float64, (count,).
    """
    factors = bank.shared(_hankel)
    for order in range(min(count, bank.shared(_largest_order)), 1, -1):
        decays = _truncate(*factors, order)
        if decays is not None:
            return _fill(decays ** (1 / bank.step), count)
    return quadrature_nodes(bank, count)


def _hankel(bank: FilterBank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns U, S and V^T of the Hankel matrix, in an orthonormal basis of inputs and outputs, and the shifted one."""
    nodes, coefficients = bank.realisation
    decay, readout = nodes**bank.step, coefficients * nodes[:, None] ** bank.first
    lags = CompressedLags((bank.length // bank.step + 1) // 2)
    triangle = torch.linalg.qr(lags.compress(powers(nodes, bank.step * lags.points)), mode="r")[1]
    factors = torch.linalg.svd(hankel_blocks(readout, triangle), full_matrices=False)
    return *factors, hankel_blocks(readout * decay[:, None], triangle)


def _largest_order(bank: FilterBank) -> int:
    factors = bank.shared(_hankel)
    order = int((factors[1] > FLOOR * 1e-4 * factors[1][0]).sum())
    while order > 0 and _truncate(*factors, order) is None:
        order -= 1
    return order


def _truncate(
    left: torch.Tensor, singular: torch.Tensor, right: torch.Tensor, shifted: torch.Tensor, order: int
) -> torch.Tensor | None:
    """Returns decays of the truncation, slowest first, or None if they are not all real and in (0, 1)."""
    root = singular[:order].sqrt()
    decays = torch.linalg.eigvals((left[:, :order].T @ shifted @ right[:order].T) / root / root[:, None])
    if (decays.imag != 0).any() or decays.real.min() <= 0 or decays.real.max() >= 1:
        return None
    return decays.real.sort(descending=True).values


def _fill(nodes: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the given nodes, and others in the gaps between them, spread over the gaps, up to `count`."""
    gaps, extra = len(nodes) - 1, count - len(nodes)
    if extra <= 0:
        return nodes
    s = nodes.log().neg().log()
    filled = [s]
    for gap in range(gaps):
        inside = (gap + 1) * extra // gaps - gap * extra // gaps
        parts = torch.arange(1, inside + 1, dtype=torch.float64) / (inside + 1)
        filled.append(s[gap] + parts * (s[gap + 1] - s[gap]))
    return torch.cat(filled).sort().values.exp().neg().exp()
