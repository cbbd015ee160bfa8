"""Forms of the STU as linear regression: what each combines, its least squares in float64, and how it runs.

    plain             y_t = M^u_1 u_t + sum_k M_k U_{t,k}
    eq. 4, free       y_t = y_{t-2} + sum_{i<=3} M^u_i u_{t+1-i} + sum_k M_k U_{t-2,k}, run on its own outputs
    eq. 4, fed        the same, fed the true y_{t-2}
    eq. 5, free       a learned matrix M^y before y_{t-2}, run on its own outputs

All are fitted to the true past. U are the features of both branches of the spectral filters.

Source: Agarwal et al. 2023, Spectral State Space Models (arXiv 2312.06837), eqs. 4 and 5.
"""

from collections.abc import Iterable

import numpy as np

from spectralds.identification.regression import triangle

FORMS = {  # what is fitted, and the ways to run it
    "plain": ("plain",),
    "eq. 4": ("eq. 4, free", "eq. 4, fed"),
    "eq. 5": ("eq. 5, free",),
}


def delayed(signal: np.ndarray, steps: int) -> np.ndarray:
    """Returns a signal (time, channels) so many steps later, zero before."""
    return np.concatenate([np.zeros_like(signal[:steps]), signal[: len(signal) - steps]])


def design(fit: str, phi: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a form combines linearly, (time, columns), and what that should give, (time, outputs).

    Args:
        fit: a key of FORMS.
        phi: filters of both branches, (time, 2 K).
        inputs, outputs: (time, channels).
    """
    size = 2 * len(phi)
    spectrum = np.fft.rfft(phi, size, axis=0)[:, :, None] * np.fft.rfft(inputs, size, axis=0)[:, None]
    features = np.fft.irfft(spectrum, size, axis=0)[: len(phi)].reshape(len(phi), -1)
    if fit == "plain":
        return np.concatenate([features, inputs], axis=1), outputs
    columns = [delayed(features, 2), *(delayed(inputs, i) for i in range(3))]
    if fit == "eq. 4":
        return np.concatenate(columns, axis=1), outputs - delayed(outputs, 2)
    return np.concatenate([*columns, delayed(outputs, 2)], axis=1), outputs


def predict(form: str, weights: np.ndarray, rows: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Returns the outputs of a form, (time, outputs).

    Args:
        form: a way to run one, of FORMS.
        weights: (columns, outputs).
        rows: of `design`; the past outputs among them are not read when the form runs freely.
        outputs: the true ones, for the form that is fed.
    """
    if form == "plain":
        return rows @ weights
    feedback = np.eye(outputs.shape[1])
    if form.startswith("eq. 5"):
        rows, weights, feedback = rows[:, : -len(feedback)], weights[: -len(feedback)], weights[-len(feedback) :]
    driven = rows @ weights
    if form.endswith("fed"):
        return driven + delayed(outputs, 2) @ feedback
    for t in range(2, len(driven)):
        driven[t] += driven[t - 2] @ feedback
    return driven


def least_squares(blocks: Iterable[np.ndarray], targets: int) -> np.ndarray:
    """Returns the weights (columns, targets) of blocks of [design, targets], through QR and columns of unit length."""
    factor = triangle(blocks)
    columns, wanted = factor[:, :-targets], factor[:, -targets:]
    scale = np.linalg.norm(columns, axis=0)
    return np.linalg.lstsq(columns / scale, wanted, rcond=1e-15)[0] / scale[:, None]
