"""Least squares on designs of any number of rows, through the triangle of their QR factorisation.

Factorisations and larger products are PyTorch's, whose threads `few_threads` can hold back: of matrices this small,
several threads mostly wait for each other.
"""

from collections.abc import Iterable

import numpy as np
import torch

_LARGEST_SHARE = 0.5  # of the rows, in effective parameters: generalised cross-validation fails beyond
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


def ridge(factor: np.ndarray, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression with a penalty for each target, chosen by generalised cross-validation.

    The penalty falls on the weights as they are: the lengths of the columns are the prior.

    Args:
        factor: the triangle of the design, then the targets.
        columns: of the design.
        rows: of the data.

    Returns:
        weights, (columns, targets), and the noise variance of each target, (targets,).

    Source: Golub, Heath and Wahba 1979, Generalized cross-validation as a method for choosing a good ridge parameter.
    """
    design, targets = factor[:, :columns], factor[:, columns:]
    left, singular, right = svd(design)
    kept = singular > np.finfo(float).eps * singular[0]
    left, singular, right = left[:, kept], singular[kept], right[kept]
    parts = left.T @ targets
    outside = ((targets - left @ parts) ** 2).sum(axis=0)
    penalties = np.geomspace(_SMALLEST_PENALTY, 1e4, 101) * singular[0] ** 2
    shrinkage = penalties[:, None] / (singular**2 + penalties[:, None])
    used = len(singular) - shrinkage.sum(axis=1)
    allowed = used <= _LARGEST_SHARE * rows
    penalties, shrinkage, used = penalties[allowed], shrinkage[allowed], used[allowed]
    squares = outside + shrinkage**2 @ parts**2
    best = np.argmin(squares / (rows - used[:, None]) ** 2, axis=0)
    gains = singular[:, None] / (singular[:, None] ** 2 + penalties[best])
    return right.T @ (gains * parts), squares[best, np.arange(targets.shape[1])] / (rows - used[best])
