"""Long ranges of lags compressed to a few hundred rows, without loss for what decays exponentially."""

import torch

_DENSE = 64  # lags kept one by one
_POINTS = 24  # per block [n, 2n): the largest error of an exponential, whatever its rate, is 6^-24 = 2e-19


class CompressedLags:
    """Sums of squares over the lags 0 .. count - 1, from few values of the function that is squared.

    An exponential a^t, a in (0, 1), is on [n, 2n) a polynomial of degree 23 to float64's rounding: it is small there
    or smooth. On each such block the values at 24 Chebyshev points give it, and the triangular factor of the map from
    these values to the lags gives its inner products: ||f(lags)|| = ||mix f(points)||. Least squares over 2^20 lags
    become least squares over 400 rows, whose solutions differ by rounding alone. Data on the lags themselves are
    projected on the same polynomials.

    Args:
        count: how many lags.

    Attributes:
        points: where a function has to be known, (rows,), float64, in lags.
    """

    def __init__(self, count: int) -> None:
        dense = min(count, _DENSE)
        self._dense = dense
        self.points = torch.arange(dense, dtype=torch.float64)
        self._blocks = []  # first lag, end, orthonormal basis (lags, points), map from values at the points to rows
        start = dense
        while start < count:
            end = min(2 * start, count)
            points, basis, mix = _block(start, end)
            self._blocks.append((start, end, basis, mix))
            self.points = torch.cat([self.points, points])
            start = end

    def compress(self, values: torch.Tensor) -> torch.Tensor:
        """Returns rows whose inner products are those of functions over all lags.

        Args:
            values: of the functions at `points`, (points, columns).
        """
        parts, place = [values[: self._dense]], self._dense
        for _, _, _, mix in self._blocks:
            parts.append(mix @ values[place : place + mix.shape[1]])
            place += mix.shape[1]
        return torch.cat(parts)

    def project(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns rows for data on the lags, (count, columns), and the norm of the part that no smooth function has."""
        parts, outside = [values[: self._dense]], values.new_zeros(())
        for start, end, basis, _ in self._blocks:
            block = values[start:end]
            parts.append(basis.T @ block)
            outside += (block - basis @ parts[-1]).square().sum()
        return torch.cat(parts), outside.sqrt()

    def expand(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the function on every lag, (count, columns), of which these are the rows, (rows, columns)."""
        parts, place = [rows[: self._dense]], self._dense
        for _, _, basis, _ in self._blocks:
            parts.append(basis @ rows[place : place + basis.shape[1]])
            place += basis.shape[1]
        return torch.cat(parts)


def _block(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns points, orthonormal basis and map of one block of lags."""
    lags = torch.arange(start, end, dtype=torch.float64)
    if len(lags) <= _POINTS:
        identity = torch.eye(len(lags), dtype=torch.float64)
        return lags, identity, identity
    degrees = torch.arange(_POINTS, dtype=torch.float64)
    angles = (degrees + 0.5) * (torch.pi / _POINTS)  # of the zeros of the Chebyshev polynomial of degree _POINTS
    middle, radius = (start + end - 1) / 2, (end - 1 - start) / 2
    polynomials = torch.outer(((lags - middle) / radius).clamp(-1, 1).arccos(), degrees).cos_()
    basis, triangle = torch.linalg.qr(polynomials)
    coefficients = torch.outer(degrees, angles).cos() * (2 / _POINTS)  # of the polynomial through values at the points
    coefficients[0] /= 2
    return middle + radius * angles.cos(), basis, triangle @ coefficients
