"""Error against state dimension, for every method and for what no system can undercut."""

import torch

from spectralds.bank import FilterBank
from spectralds.fit import best_candidate, few_threads
from spectralds.options import METHODS

STATE_DIMS = (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 112, 128, 160)


def error_curve(
    bank: FilterBank, dtype: torch.dtype, dilation: int, state_dims: tuple[int, ...] = STATE_DIMS
) -> dict[str, list]:
    """Mean squared errors of the filters, as in the reports of `fit_lds`, at a hundredth of its cost.

    Args:
        bank, dtype, dilation: as in `fit_lds`.
        state_dims: where.

    Returns:
        lists as long as state_dims: state_dim, an error under the name of each method, and bound (see `Bounds.mse`).
    """
    curve: dict[str, list] = {"state_dim": list(state_dims)}
    with few_threads():
        for method in METHODS:
            errors = (best_candidate(bank, h, method, dtype, dilation).relative_error for h in state_dims)
            curve[method] = [(error * bank.norm) ** 2 / bank.phi.numel() for error in errors]
        curve["bound"] = [bank.bounds.mse(h) for h in state_dims]
    return curve
