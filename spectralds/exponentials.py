"""Matrices of decaying exponentials."""

import torch


def powers(nodes: torch.Tensor, lags: torch.Tensor) -> torch.Tensor:
    """Vandermonde matrix nodes[j] ** lags[t], (lags, nodes), float64; nodes may be negative at whole lags."""
    return nodes[None] ** lags[:, None]


def column_norms(nodes: torch.Tensor, count: int, step: int = 1) -> torch.Tensor:
    """Euclidean norms of nodes ** (0, step, 2 step, ...), `count` terms; a geometric sum that does not
    cancel near one.

    Args:
        nodes: in (0, 1), float64, (nodes,).
    """
    rate = -2 * step * nodes.log()
    return (torch.expm1(-rate * count) / torch.expm1(-rate)).sqrt()
