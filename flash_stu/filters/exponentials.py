"""The far end of spectral filters as a short sum of decaying exponentials.

Spectral filters are integrals of decaying exponentials, so no search is needed: decays are spaced evenly in
ln(-ln a), and the weights are linear in the filter. That linear map depends on lengths only; it is computed once for
each, and applying it costs nothing beside a convolution. It is exact for such filters alone: of any other filter it
keeps the part that such exponentials span.

Filters that also oscillate, (-1)^t phi(t) or those of the hankel_l basis, need every decay with both signs.
"""

import math
from functools import cache

import torch

_FASTEST = 12.0  # decay of the fastest exponential over the offset, in e-foldings
_SLOWEST = 0.5  # decay of the slowest over the whole filter
_SPACING = 0.28  # of the logarithms of the rates
_SAMPLES = 768
_RCOND = 1e-9


def _states(lags: int, offset: int) -> int:
    """How many exponentials of one sign, a multiple of eight."""
    return 8 * math.ceil(math.log(_FASTEST / _SLOWEST * lags / offset) / _SPACING / 8)


@cache
def _tail_map(lags: int, offset: int, both_signs: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decays (states,), which lags to look at (samples,), and the weights from the filter there (states, samples).

    Least squares over lags spaced evenly in their logarithm, in neighbouring pairs if both signs are to be told apart,
    weighted as if all lags took part. The decays are float32 numbers, because a^lags would amplify their rounding.
    From offset 33 on, the spectral filters of length 512 to 131,072 are met within 2e-7 of their norm (K = 24), and
    no weight is above 1; of length 128, within 4e-6.
    """
    first, last = math.log(_SLOWEST / lags), math.log(_FASTEST / offset)
    rates = torch.linspace(first, last, _states(lags, offset), dtype=torch.float64).exp()
    decay = torch.exp(-rates).float().double()
    points = torch.logspace(0, math.log2(lags - offset), _SAMPLES, base=2, dtype=torch.float64).round().long() - 1
    if both_signs:
        decay, points = torch.cat([decay, -decay]), torch.cat([points, points + 1])
    points = points[points < lags - offset].unique()
    edges = torch.cat([points[:1], (points[1:] + points[:-1]) / 2, points[-1:]])
    weight = edges.diff().clamp(min=0.5).sqrt()
    columns = decay ** points[:, None] * weight[:, None]
    norms = columns.norm(dim=0)
    inverse = torch.linalg.pinv(columns / norms, rtol=_RCOND)
    return decay, points + offset, inverse * weight / norms[:, None]


@torch.library.custom_op("flash_stu::exponential_tail", mutates_args=())
def exponential_tail(filters: torch.Tensor, offset: int, both_signs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Decays and weights with filters[offset + n] = sum_j decay[j]^n weights[j].

    Args:
        filters: constant filters (lags, features), lags > offset.
        offset: the first lag to be met, at least 1.
        both_signs: whether the filters oscillate, see above.

    Returns:
        decay (states,), float64, and weights (states, features), float32, on the filters' device.
    """
    decay, points, weights = (tensor.to(filters.device) for tensor in _tail_map(len(filters), offset, both_signs))
    return decay.clone(), (weights @ filters[points].double()).float()


@exponential_tail.register_fake
def _(filters: torch.Tensor, offset: int, both_signs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    states = _states(len(filters), offset) * (1 + both_signs)
    return (
        filters.new_empty(states, dtype=torch.float64),
        filters.new_empty((states, filters.shape[1]), dtype=torch.float32),
    )
