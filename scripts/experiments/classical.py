"""Classical identification in closed form, to compare with: Ho-Kalman, ARX, and the subspace method of nfoursid.

Each takes inputs and outputs (time, channels), float64, and returns a function that gives the outputs of other inputs,
from rest, and none of the outputs' past.

Sources: Ho and Kalman 1966, on Markov parameters by least squares; Ljung 1999, System Identification, section 4.2, for
ARX; Verhaegen and Verdult 2007, Filtering and System Identification, for what nfoursid runs.
"""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

Simulate = Callable[[np.ndarray], np.ndarray]
_ORDER = 8  # states of Ho-Kalman and of the subspace method
_LAGS = 32  # of ARX
_MARKOV = 128  # block rows and block columns of Ho-Kalman's matrix
_BLOCK_ROWS = 16  # of nfoursid


def methods() -> dict[str, Callable[[np.ndarray, np.ndarray], Simulate]]:
    """Returns the methods that are installed, by name."""
    always = {"Ho-Kalman": ho_kalman, "ARX": arx}
    return always | ({"subspace (nfoursid)": subspace} if find_spec("nfoursid") else {})


def ho_kalman(inputs: np.ndarray, outputs: np.ndarray) -> Simulate:
    """Markov parameters by least squares, then a realisation of order 8 whose eigenvalues are clipped to the disc."""
    channels, wanted = inputs.shape[1], outputs.shape[1]
    lags = min(2 * _MARKOV, len(inputs) // (4 * channels))
    weights = np.linalg.lstsq(_past(inputs, lags + 1), outputs, rcond=None)[0]
    markov = weights.reshape(lags + 1, channels, wanted).transpose(0, 2, 1)
    rows = lags // 2
    hankel = np.block([[markov[i + j + 1] for j in range(lags - rows)] for i in range(rows)])
    left, values, right = np.linalg.svd(hankel, full_matrices=False)
    order = min(_ORDER, int(np.sum(values > 1e-12 * values[0])))
    root = np.sqrt(values[:order])
    observe, control = left[:, :order] * root, root[:, None] * right[:order]
    A = np.linalg.lstsq(observe[:-wanted], observe[wanted:], rcond=None)[0]
    eigenvalues, vectors = np.linalg.eig(A)
    eigenvalues = eigenvalues / np.maximum(np.abs(eigenvalues), 1)
    A = (vectors * eigenvalues @ np.linalg.inv(vectors)).real
    return _state_space(A, control[:, :channels], observe[:wanted], markov[0])


def arx(inputs: np.ndarray, outputs: np.ndarray) -> Simulate:
    """Regression on 32 past outputs and as many past inputs, simulated on its own outputs."""
    lags, wanted = min(_LAGS, len(inputs) // (4 * (inputs.shape[1] + outputs.shape[1]))), outputs.shape[1]
    design = np.concatenate([_past(outputs, lags + 1)[:, wanted:], _past(inputs, lags + 1)], axis=1)
    weights = np.linalg.lstsq(design, outputs, rcond=None)[0]
    feedback, direct = weights[: lags * wanted], weights[lags * wanted :]

    def simulate(inputs: np.ndarray) -> np.ndarray:
        driven = _past(inputs, lags + 1) @ direct
        past = np.zeros((lags + len(inputs), wanted))  # latest first, so that a window of it is a row of the design
        for t in range(len(inputs)):
            place = len(inputs) - 1 - t
            past[place] = driven[t] + past[place + 1 : place + 1 + lags].ravel() @ feedback
        return past[: len(inputs)][::-1]

    return simulate


def subspace(inputs: np.ndarray, outputs: np.ndarray) -> Simulate:
    """nfoursid's PO-MOESP with 16 block rows and 8 states."""
    import pandas
    from nfoursid.nfoursid import NFourSID  # pyright: ignore[reportMissingImports]

    names = [[f"{kind}{i}" for i in range(signal.shape[1])] for kind, signal in (("u", inputs), ("y", outputs))]
    frame = pandas.DataFrame(np.concatenate([inputs, outputs], axis=1), columns=pandas.Index(sum(names, [])))
    method = NFourSID(frame, output_columns=names[1], input_columns=names[0], num_block_rows=_BLOCK_ROWS)
    method.subspace_identification()
    system, _ = method.system_identification(rank=_ORDER)
    return _state_space(system.a, system.b, system.c, system.d)


def _past(signal: np.ndarray, lags: int) -> np.ndarray:
    """Returns a signal (time, channels) and its last values, latest first, (time, lags * channels)."""
    padded = np.concatenate([np.zeros((lags - 1, signal.shape[1])), signal])
    windows = np.lib.stride_tricks.sliding_window_view(padded, lags, axis=0)[:, :, ::-1]
    return windows.transpose(0, 2, 1).reshape(len(signal), -1)


def _state_space(A: np.ndarray, B: np.ndarray, C: np.ndarray, D: np.ndarray) -> Simulate:
    """Returns the simulation of x_{t+1} = A x_t + B u_t, y_t = C x_t + D u_t."""

    def simulate(inputs: np.ndarray) -> np.ndarray:
        states, driven = np.zeros((len(inputs) + 1, len(A))), inputs @ B.T
        for t, change in enumerate(driven):
            states[t + 1] = A @ states[t] + change
        return states[:-1] @ C.T + inputs @ D.T

    return simulate
