"""A bank of spectral filters as sums of decaying exponentials: the least squares behind every fit."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import torch

from flash_stu.errors import UserError
from flash_stu.filters.exponentials import column_norms, powers
from flash_stu.filters.lags import CompressedLags
from spectralds.bounds import Bounds

T = TypeVar("T")
_ROWS = 65536  # lags evaluated at once: a filter of 2^20 lags then needs no more memory than one of 2^16
_SPACING = 0.12  # of the fine realisation's nodes, in s = ln(-ln a): finer ones lower no residual in float64


class FilterBank:
    """Filters phi (length, filters), and all that is computed from them before a state dimension is chosen.

    A spectral filter is an integral of decaying exponentials, so a sum over enough nodes a_j reproduces it:
    phi_k(t) = sum_j c[j, k] a_j^t. The filters of the "hankel_l" basis vanish on every other lag; they are
    such sums on the lags they live on. `step` is 2 for such a bank and else 1; filter k lives on the lags
    first[k], first[k] + step, ...

    Args:
        phi: filters, (length, filters), any floating dtype; used in float64.

    Raises:
        UserError: if phi is not a finite floating matrix with at least two rows.
    """

    def __init__(self, phi: torch.Tensor) -> None:
        if phi.ndim != 2 or not phi.is_floating_point() or phi.shape[0] < 2 or phi.shape[1] < 1:
            raise UserError(f"phi is {phi.dtype} of shape {tuple(phi.shape)}; allowed: floating, (length, filters)")
        if not phi.isfinite().all():
            raise UserError("phi has entries that are not finite; allowed: finite filters")
        self.phi = phi.detach().to(device="cpu", dtype=torch.float64)
        self.length, self.num_filters = self.phi.shape
        even_only = (self.phi[1::2] == 0).all(dim=0)
        odd_only = (self.phi[0::2] == 0).all(dim=0) & ~even_only
        self.step = 2 if bool((even_only | odd_only).all()) else 1
        self.first = odd_only.long() if self.step == 2 else torch.zeros(self.num_filters, dtype=torch.long)
        self._shared = {}

    def shared(self, compute: Callable[["FilterBank"], T]) -> T:
        """Returns compute(self), computed once for all fits of these filters."""
        if compute not in self._shared:
            self._shared[compute] = compute(self)
        return self._shared[compute]

    @cached_property
    def groups(self) -> list["Group"]:
        """The filters, those that live on the same lags together."""
        return [Group(self, first) for first in sorted(set(self.first.tolist()))]

    def solve(self, nodes: torch.Tensor, precision: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute least squares coefficients of the filters on given nodes, each filter on the lags it lives on.

        Large coefficients cancel, and what cancels is lost to rounding at run time. The singular value
        decomposition is therefore truncated where the residual plus `precision` times the coefficient norm
        is least, and then extended as far as the norm does not grow by more than a tenth.

        Args:
            nodes: decays a_j in (0, 1), float64, (nodes,).
            precision: relative rounding error of the arithmetic that will run the sum, 1.2e-7 for float32.

        Returns:
            coefficients (nodes, filters), float64; and their Frobenius norm, a scalar, when each exponential
            is scaled to unit length.
        """
        coefficients = torch.zeros(len(nodes), self.num_filters, dtype=torch.float64)
        energy = torch.zeros((), dtype=torch.float64)
        for group in self.groups:
            # norms as if every filter began at lag 0: at run time the whole exponential cancels
            scale = column_norms(nodes, group.count, self.step)
            rows = torch.cat([group.exponentials(nodes) / scale, group.targets], dim=1)
            triangle = torch.linalg.qr(rows, mode="r")[1]
            count = min(len(nodes), len(rows))
            scaled = _truncated_solve(
                triangle[:count, : len(nodes)],
                triangle[:count, len(nodes) :],
                torch.hypot(triangle[count:, len(nodes) :].norm(), group.outside),
                precision,
            )
            coefficients[:, group.columns] = scaled / scale[:, None]
            energy += scaled.square().sum()
        return coefficients, energy.sqrt()

    def relative_error(self, nodes: torch.Tensor, coefficients: torch.Tensor) -> float:
        """Returns the Frobenius norm of the difference between the filters and the sums with these coefficients, over
        that of the filters; at the cost of a few hundred lags.
        """
        squares = [
            (group.exponentials(nodes) @ coefficients[:, group.columns] - group.targets).square().sum()
            + group.outside.square()
            for group in self.groups
        ]
        return float(sum(squares, start=torch.zeros((), dtype=torch.float64)).sqrt() / self.norm)

    @cached_property
    def realisation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fine nodes (n,) and coefficients (n, filters) that reproduce the filters to float64's rounding."""
        span = math.log(8 * self.length)
        nodes = quadrature_nodes(self, max(80, math.ceil(span / _SPACING)))
        return nodes, self.solve(nodes, torch.finfo(torch.float64).eps)[0]

    @cached_property
    def norm(self) -> float:
        """Frobenius norm of the filters, never zero."""
        return float(self.phi.norm().clamp(min=torch.finfo(torch.float64).tiny))

    @cached_property
    def bounds(self) -> Bounds:
        """The least errors that any system for both branches' features can reach."""
        return Bounds(*self.features(*self.realisation), self.length)

    def features(self, nodes: torch.Tensor, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the system of both branches' features, U+ (filters phi) and U- (filters (-1)^t phi).

        Args:
            nodes: (n,); coefficients: of the filters on these nodes, (n, filters).

        Returns:
            A: the nodes, then their negatives, (2n,); C: (2n, 2 * filters), U+ first. B is all ones.
        """
        if self.step == 1:
            zero = torch.zeros_like(coefficients)
            plus, minus = torch.cat([coefficients, zero]), torch.cat([zero, coefficients])
        else:
            # a filter on the lags of one parity p: (a^t + (-1)^p (-a)^t) / 2 is a^t there and zero elsewhere
            sign = 1 - 2 * self.first
            plus = torch.cat([coefficients, coefficients * sign]) / 2
            minus = plus * sign
        return torch.cat([nodes, -nodes]), torch.cat([plus, minus], dim=1)

    def evaluate(self, nodes: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """Returns the sums of exponentials with coefficients (nodes, filters): (length, filters), float64."""
        filters = torch.zeros(self.length, self.num_filters, dtype=torch.float64)
        for group in self.groups:
            lags = torch.arange(group.first, self.length, self.step)
            for rows in lags.split(_ROWS):
                filters[rows[:, None], group.columns] = powers(nodes, rows.double()) @ coefficients[:, group.columns]
        return filters


class Group:
    """The filters of a bank that begin at one lag, compressed.

    Attributes:
        columns: their indices; first: the lag; count: how many lags they live on.
        targets: rows of the filters (rows, columns); outside: the norm of the filters' part that the rows do not hold.
    """

    def __init__(self, bank: FilterBank, first: int) -> None:
        self.columns, self.first, self._step = (bank.first == first).nonzero()[:, 0], first, bank.step
        values = bank.phi[first :: bank.step, self.columns]
        self.count = len(values)
        self._lags = CompressedLags(self.count)
        self.targets, self.outside = self._lags.project(values)

    def exponentials(self, nodes: torch.Tensor) -> torch.Tensor:
        """Returns rows of nodes ** lag over the group's lags, (rows, nodes)."""
        return self._lags.compress(powers(nodes, self.first + self._step * self._lags.points))


def slowest_and_fastest(bank: FilterBank) -> tuple[float, float]:
    """Returns the range of s = ln(-ln a) for every time constant a filter can show: from its length to 1/8 token."""
    return -math.log(bank.length), math.log(8)


def quadrature_nodes(bank: FilterBank, count: int) -> torch.Tensor:
    """Returns `count` decays a = exp(-e^s), s equally spaced over `slowest_and_fastest`, slowest first, float64."""
    return torch.linspace(*slowest_and_fastest(bank), count, dtype=torch.float64).exp().neg().exp()


def _truncated_solve(
    matrix: torch.Tensor, targets: torch.Tensor, residual: torch.Tensor, precision: float
) -> torch.Tensor:
    """Returns the minimum norm least squares solution of matrix x = targets, truncated as in `FilterBank.solve`.

    residual: norm of the targets' rows below `matrix`.
    """
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    parts = left.T @ targets
    size = parts.square().sum(dim=1)
    usable = int((singular > torch.finfo(torch.float64).eps * singular[0]).sum())
    tail = torch.cat([size, size.new_zeros(1)]).flip(0).cumsum(0).flip(0)[1 : usable + 1]
    error = (tail + residual.square()).sqrt()
    norm = (size[:usable] / singular[:usable].square()).cumsum(0).sqrt()
    best = (error + precision * norm).argmin()
    rank = int((norm <= 1.1 * norm[best]).sum())
    return right[:rank].T @ (parts[:rank] / singular[:rank, None])
