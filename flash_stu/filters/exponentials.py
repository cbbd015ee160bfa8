"""Powers of decays, and the far end of spectral filters as a short sum of them.

Spectral filters are integrals of decaying exponentials, so fitting their far lags needs no search: decays are spaced
evenly in ln(-ln a), and the weights are linear in the filter. That linear map depends on lengths only; it is computed
once for each, and applying it costs nothing beside a convolution. It is exact for such filters alone: of any other
filter it keeps the part that such exponentials span.

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


def powers(decay: torch.Tensor, lags: torch.Tensor | int) -> torch.Tensor:
    """Returns decay[j] ** lags[t], (lags, states), float64.

    Args:
        decay: (states,); may be negative at whole lags.
        lags: (lags,), or their number for 0, 1, 2, ...
    """
    if not isinstance(lags, torch.Tensor):
        lags = torch.arange(lags, dtype=torch.float64, device=decay.device)
    return decay.double() ** lags[:, None]


def column_norms(decay: torch.Tensor, count: int, step: int = 1) -> torch.Tensor:
    """Returns the Euclidean norms of decay ** (0, step, 2 step, ...), `count` terms, (states,), float64.

    It is a geometric sum in a form that does not cancel near one; `decay` is in (0, 1), float64.
    """
    rate = -2 * step * decay.log()
    return (torch.expm1(-rate * count) / torch.expm1(-rate)).sqrt()


def tail_states(lags: int, offset: int) -> int:
    """Returns how many exponentials of one sign `tail_map` takes, a multiple of eight."""
    return 8 * math.ceil(math.log(_FASTEST / _SLOWEST * lags / offset) / _SPACING / 8)


@cache
def tail_map(
    lags: int, offset: int, both_signs: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns decays (states,), sampled lags (samples,), and the map from a filter there to weights (states, samples).

    With them, filter[offset + n] = sum_j decay[j]^n weights[j] for all n < lags - offset.

    Least squares over lags spaced evenly in their logarithm, in neighbouring pairs if both signs are to be told apart,
    weighted as if all lags took part. The decays are float32 numbers, because a^lags would amplify their rounding.
    From offset 33 on, the spectral filters of length 512 to 131,072 are met within 2e-7 of their norm (K = 24), and
    no weight is above 1; of length 128, within 4e-6.
    """
    if device.type != "cpu":  # kept there too: a copy at every call would have to be waited for
        decay, points, weights = tail_map(lags, offset, both_signs, torch.device("cpu"))
        return decay.to(device), points.to(device), weights.to(device)
    first, last = math.log(_SLOWEST / lags), math.log(_FASTEST / offset)
    rates = torch.linspace(first, last, tail_states(lags, offset), dtype=torch.float64).exp()
    decay = torch.exp(-rates).float().double()
    points = torch.logspace(0, math.log2(lags - offset), _SAMPLES, base=2, dtype=torch.float64).round().long() - 1
    if both_signs:
        decay, points = torch.cat([decay, -decay]), torch.cat([points, points + 1])
    points = points[points < lags - offset].unique()
    edges = torch.cat([points[:1], (points[1:] + points[:-1]) / 2, points[-1:]])
    weight = edges.diff().clamp(min=0.5).sqrt()
    columns = powers(decay, points) * weight[:, None]
    norms = columns.norm(dim=0)
    inverse = torch.linalg.pinv(columns / norms, rtol=_RCOND)
    return decay, points + offset, inverse * weight / norms[:, None]
