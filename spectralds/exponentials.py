"""Matrices of decaying exponentials."""

import torch

ROWS = 65536  # rows held at once: a filter of 2^20 lags then needs no more memory than one of 2^16


def powers(nodes: torch.Tensor, lags: torch.Tensor) -> torch.Tensor:
    """Vandermonde matrix nodes[j] ** lags[t], (lags, nodes), float64; nodes may be negative."""
    return nodes[None] ** lags[:, None]


def triangular_factor(
    nodes: torch.Tensor,
    lags: torch.Tensor,
    scale: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """R factor of the QR decomposition of [diag(weights) powers(nodes, lags) diag(scale), targets], block by
    block.

    Args:
        nodes: (nodes,); lags: (lags,); scale: per node, (nodes,); ones if None.
        targets: further columns, (lags, columns); none if None.
        weights: per lag, (lags,); ones if None.

    Returns:
        an upper triangular matrix (min(lags, nodes + columns), nodes + columns), float64.
    """
    triangle = torch.zeros(0, len(nodes) + (0 if targets is None else targets.shape[1]), dtype=torch.float64)
    for start in range(0, len(lags), ROWS):
        rows = slice(start, start + ROWS)
        block = powers(nodes, lags[rows])
        if scale is not None:
            block *= scale
        if weights is not None:
            block *= weights[rows, None]
        if targets is not None:
            block = torch.cat([block, targets[rows]], dim=1)
        triangle = torch.linalg.qr(torch.cat([triangle, block]), mode="r")[1]
    return triangle


def column_norms(nodes: torch.Tensor, count: int, step: int = 1) -> torch.Tensor:
    """Euclidean norms of nodes ** (0, step, 2 step, ...), `count` terms; a geometric sum that does not
    cancel near one.

    Args:
        nodes: in (0, 1), float64, (nodes,).
    """
    rate = -2 * step * nodes.log()
    return (torch.expm1(-rate * count) / torch.expm1(-rate)).sqrt()
