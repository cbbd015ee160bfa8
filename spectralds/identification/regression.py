"""Least squares on designs of any number of rows, through the triangle of their QR factorisation.

Factorisations and larger products are PyTorch's, whose threads `few_threads` can hold back: of matrices this small,
several threads mostly wait for each other.
"""

from collections.abc import Iterable

import numpy as np
import torch

_SMALLEST_PENALTY = 1e-16  # of the largest squared singular value: smaller ones let rounding and gaps of the model in


def triangle(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the triangular factor of stacked blocks of rows: its columns have the inner products of theirs.

    Args:
        blocks: (rows, columns) each; only one is held at a time.

    Returns:
        (at most columns, columns).
    """
    factor = None
    for block in blocks:
        rows = block if factor is None else np.concatenate([factor, block])
        factor = torch.linalg.qr(torch.from_numpy(rows), mode="r")[1].numpy()
    if factor is None:
        raise ValueError("there are no rows")
    return factor


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the reduced singular value decomposition: left vectors, values, right vectors as rows."""
    left, singular, right = torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False)
    return left.numpy(), singular.numpy(), right.numpy()


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns the matrix product."""
    return (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()


def ridge(factor: np.ndarray, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Ridge regression with a penalty for each target, the one under which the data are most likely.

    The penalty falls on the weights as they are: the lengths of the columns are the prior. Likelihood instead of
    generalised cross-validation, which now and then takes a penalty that is far too small.

    Args:
        factor: the triangle of the design, then the targets.
        columns: of the design.
        rows: of the data.

    Returns:
        weights, (columns, targets); the noise variance of each target, (targets,); and the least of minus twice the
        logarithm of the likelihood, up to a constant for each row.

    Source: MacKay 1992, Bayesian Interpolation.
    """
    design, targets = factor[:, :columns], factor[:, columns:]
    left, singular, right = svd(design)
    kept = singular > np.finfo(float).eps * singular[0]
    left, singular, right = left[:, kept], singular[kept], right[kept]
    parts = left.T @ targets
    outside = ((targets - left @ parts) ** 2).sum(axis=0)
    penalties = np.geomspace(_SMALLEST_PENALTY, 1e4, 101) * singular[0] ** 2
    shrinkage = penalties[:, None] / (singular**2 + penalties[:, None])
    variances = np.maximum(outside + shrinkage @ parts**2, np.finfo(float).tiny) / rows
    surprise = rows * np.log(variances) - np.log(shrinkage).sum(axis=1)[:, None]
    best = np.argmin(surprise, axis=0)
    gains = singular[:, None] / (singular[:, None] ** 2 + penalties[best])
    chosen = best, np.arange(targets.shape[1])
    return right.T @ (gains * parts), variances[chosen], float(surprise[chosen].sum())
