"""Nodes chosen among sampled systems, as in the SpectraLDS paper, with regression for descent; its Theorem 1."""

import math

import torch

from flash_stu.filters.exponentials import column_norms
from spectralds.bank import FilterBank, slowest_and_fastest

_POOL = 1024  # systems sampled
_RESOLVED = 1e-13  # part of a unit vector that is more than rounding


def sampled_nodes(bank: FilterBank, count: int) -> torch.Tensor:
    """Decays of the systems of dimension one that greedy selection takes out of a sample, slowest first.

    Algorithm 1 of the paper samples systems and learns each one's spectral representation, the coefficients M of its
    impulse response on the filters; Algorithm 2 picks systems whose joint representation reproduces the filters, and
    inverts it. The authors' program learns M by gradient descent, picks subsets at random, adds systems one by one,
    each time the one that leaves the least error, inverts M and improves the inverse by gradient descent. The limit
    of that descent is the regression of the filters on the impulse responses, whatever M it began with; so here the
    systems are added one by one from the first, and the output weights are the regression that every method shares.
    The sample is fixed: 1024 decays a = exp(-e^s) with s uniform over the range of `quadrature_nodes`.

    Args:
        bank: the filters.
        count: how many nodes, of one sign.

    Returns:
        nodes in (0, 1), float64, (count,).

    Source: Shah et al. 2025, SpectraLDS (arXiv 2505.17868), Algorithms 1 and 2; its program's selection,
    github.com/dshah02/SpectraLDS.
    """
    return bank.shared(_greedy_order)[:count].sort(descending=True).values


def _greedy_order(bank: FilterBank) -> torch.Tensor:
    """The sampled decays, (_POOL,): each the one that lowers the filters' squared error most beside those before it.

    Orthogonalised columns that have shrunk to rounding are left for the end.
    """
    generator = torch.Generator().manual_seed(0)
    slowest, fastest = slowest_and_fastest(bank)
    s = slowest + (fastest - slowest) * torch.rand(_POOL, generator=generator, dtype=torch.float64)
    nodes = s.exp().neg().exp()
    columns = [group.exponentials(nodes) / column_norms(nodes, group.count, bank.step) for group in bank.groups]
    residuals = [group.targets.clone() for group in bank.groups]
    order, left = [], torch.ones(_POOL, dtype=torch.bool)
    while left.any():
        gain = torch.zeros(_POOL, dtype=torch.float64)
        usable = torch.zeros(_POOL, dtype=torch.bool)
        for column, residual in zip(columns, residuals, strict=True):
            energy = column.square().sum(dim=0)
            resolved = energy > _RESOLVED**2
            gain += torch.where(resolved, (residual.T @ column).square().sum(dim=0) / energy, 0.0)
            usable |= resolved
        gain[~(left & usable)] = -1
        best = int(gain.argmax())
        if gain[best] < 0:
            break
        order.append(best)
        left[best] = False
        for column, residual in zip(columns, residuals, strict=True):
            direction = column[:, best] / column[:, best].norm().clamp(min=_RESOLVED)
            residual -= torch.outer(direction, direction @ residual)
            column -= torch.outer(direction, direction @ column)
    return nodes[order + left.nonzero()[:, 0].tolist()]


def spectral_representation(bank: FilterBank, nodes: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 in closed form: coefficients M, (nodes, filters), that reproduce each node's impulse response.

    Least squares over the filters' length: a^t ~ sum_k M[j, k] phi_k(t), on the lags where filter k lives.
    """
    representation = torch.zeros(len(nodes), bank.num_filters, dtype=torch.float64)
    for group in bank.groups:
        solution = torch.linalg.lstsq(group.targets, group.exponentials(nodes), driver="gelsd").solution
        representation[:, group.columns] = solution.T
    return representation


def theorem_1(bank: FilterBank, nodes: torch.Tensor) -> dict[str, float]:
    """Compute the quantities of the paper's Theorem 1 for the h systems of dimension one that are a fit's nodes.

    Each impulse response is a combination of the k filters up to an error that falls like exp(-k / log L): mu = M Phi
    + E. With the Penrose inverse M~ of M, Phi - M~ mu = -M~ E, hence the theorem's bound c lambda_max h exp(-k / log
    L), with lambda_max the largest singular value of M~ (the theorem says eigenvalue; M~ is not square). Impulse
    responses begin with 1 here, and M is that of `spectral_representation`; for filters on every other lag the negated
    nodes are systems too. Singular values of M that are rounding are left out of the inverse.

    Returns:
        lambda_max; lambda_max_h = lambda_max * h; theorem_1_bound = lambda_max_h * exp(-k / log L), the bound for c =
        1.

    Source: Shah et al. 2025, SpectraLDS (arXiv 2505.17868), Theorem 1.
    """
    representation = spectral_representation(bank, nodes)
    if bank.step == 2:
        representation = torch.cat([representation, representation * (1 - 2 * bank.first)])
    singular = torch.linalg.svdvals(representation)
    usable = singular > singular[0] * max(representation.shape) * torch.finfo(torch.float64).eps
    largest = 1 / float(singular[usable][-1]) if usable.any() else 0.0
    product = largest * len(representation)
    decay = math.exp(-bank.num_filters / math.log(bank.length))
    return {"lambda_max": largest, "lambda_max_h": product, "theorem_1_bound": product * decay}
