"""Identification by ridge regression on the states of fixed poles."""

from collections.abc import Iterator

import numpy as np

from spectralds.identification.records import STARTED, Records, filtered
from spectralds.identification.regression import ridge, triangle
from spectralds.identification.response import Response

_POLES = 81


def fit_grid(records: Records, max_states: int) -> Response:
    """Fit the residues of poles of both signs, spaced evenly in their atanh.

    Near the unit circle that is even spacing of the logarithm of the rate. Convex, closed form.

    Args:
        records: the data.
        max_states: poles beyond what it allows are not taken.
    """
    count = int(np.clip(max_states // records.rank, 2, _POLES))
    poles, weights, noise, _ = _regression(records, count)
    return Response.of_weights(poles, weights, noise, max_states)


def started(records: Records) -> Records:
    """Returns the records with initial states to be found, if the data are likelier with them than from rest.

    Not tried for more trajectories than `STARTED`, nor for a few samples only.
    """
    batch, _, inputs = records.inputs.shape
    if batch > STARTED or records.rows < 8 * (inputs + batch):
        return records
    other = records.started()
    return other if _regression(other, _POLES)[-1] < _regression(records, _POLES)[-1] else records


def _regression(records: Records, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Returns the poles, (count,), the weights of their states and of the inputs, and what else `ridge` returns."""
    logits = np.linspace(-records.largest_logit, records.largest_logit, count)
    poles, unit = np.tanh(logits), 1 / np.cosh(logits)  # with which a state has variance one for white inputs

    def blocks() -> Iterator[np.ndarray]:
        for inputs, outputs in records.blocks():
            states = (filtered(inputs, poles) * unit[:, None]).reshape(*inputs.shape[:2], -1)
            rows = np.concatenate([states, inputs, outputs], axis=2)
            yield rows.reshape(-1, rows.shape[2])

    inputs = records.inputs.shape[2]
    weights, noise, surprise = ridge(triangle(blocks()), (count + 1) * inputs, records.rows)
    weights[:-inputs] *= np.repeat(unit, inputs)[:, None]
    return poles, weights, noise, surprise
