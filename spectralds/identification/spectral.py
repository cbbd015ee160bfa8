"""Identification by convex regression on spectral features, then the closed form of their system."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from scipy.signal import oaconvolve

from flash_stu.filters.spectral import spectral_filters
from spectralds.fit import LDSFit, fit_lds
from spectralds.identification.records import Records
from spectralds.identification.regression import product, ridge, triangle
from spectralds.identification.response import Response

_FILTERS, _POLES = 24, 160


def fit_spectral(records: Records, max_states: int) -> Response:
    """Fit y_t = sum_k M_k (features k of the inputs) + D u_t, both signs, and put the filters' system in their place.

    Args:
        records: the data.
        max_states: the filters' system gets at most as many eigenvalues as it allows.

    Source: Agarwal et al. 2023 (arXiv 2312.06837) for the regression; Shah et al. 2025, SpectraLDS (arXiv 2505.17868),
    for the system of its features.
    """
    length, inputs = records.inputs.shape[1:]
    filters = min(_FILTERS, length)
    poles = int(np.clip(max_states // records.rank // 2 * 2, 2, _POLES))
    phi, system = _features(length, filters, poles)

    def blocks() -> Iterator[np.ndarray]:
        for u, y in records.blocks():
            features = [oaconvolve(u, column[None, :, None], axes=1)[:, :length] for column in phi.T]
            rows = np.concatenate([*features, u, y], axis=2)
            yield rows.reshape(-1, rows.shape[2])

    weights, noise, _ = ridge(triangle(blocks()), (2 * filters + 1) * inputs, records.rows)
    of_features = weights[:-inputs].reshape(2 * filters, -1)
    residues = product(system.C.numpy(), of_features).reshape(-1, weights.shape[1])
    return Response.of_weights(system.A.numpy(), np.concatenate([residues, weights[-inputs:]]), noise, max_states)


@lru_cache(maxsize=4)
def _features(length: int, filters: int, poles: int) -> tuple[np.ndarray, LDSFit]:
    """Returns the filters of both signs, (length, 2 * filters), and the system whose outputs they are."""
    phi = spectral_filters(length, filters)[1]
    fit = fit_lds(phi, poles, method="quadrature", dtype=torch.float64)
    signs = 1.0 - 2.0 * (np.arange(length) % 2)
    plus = phi.numpy()
    return np.concatenate([plus, plus * signs[:, None]], axis=1), fit
