"""The far lags of spectral filters as decaying exponentials, as an operator that torch.compile sees as one node."""

import torch

from flash_stu.filters.exponentials import tail_map, tail_states
from flash_stu.ops.kept import kept_op


@kept_op("flash_stu::exponential_tail")
def exponential_tail(filters: torch.Tensor, offset: int, both_signs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Decays and weights with filters[offset + n] = sum_j decay[j]^n weights[j].

    Args:
        filters: constant filters (lags, features), lags > offset.
        offset: the first lag to be met, at least 1.
        both_signs: whether the filters oscillate, see flash_stu.filters.exponentials.

    Returns:
        decay (states,), float64, and weights (states, features), float32, on the filters' device.
    """
    decay, points, weights = tail_map(len(filters), offset, both_signs, filters.device)
    return decay.clone(), (weights @ filters[points].double()).float()


@exponential_tail.register_fake
def _(filters: torch.Tensor, offset: int, both_signs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    states = tail_states(len(filters), offset) * (1 + both_signs)
    return (
        filters.new_empty(states, dtype=torch.float64),
        filters.new_empty((states, filters.shape[1]), dtype=torch.float32),
    )
