"""Identification of a symmetric linear dynamical system: the arguments, the choice of a method, the report."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flash_stu.errors import UserError
from spectralds.fit import few_threads
from spectralds.identification.grid import fit_grid, started
from spectralds.identification.options import AUTO, MAX_STATES, METHODS, STATES
from spectralds.identification.records import HELD_OUT, Records, read_records
from spectralds.identification.refine import fit_refine
from spectralds.identification.response import Response
from spectralds.identification.spectral import fit_spectral
from spectralds.identification.system import SymmetricLDS

_FITS: dict[str, Callable[[Records, int], Response]] = {
    "spectral": fit_spectral,
    "grid": fit_grid,
    "refine": fit_refine,
}


def identify(
    inputs: np.ndarray | torch.Tensor,
    outputs: np.ndarray | torch.Tensor,
    method: str = AUTO,
    max_states: int = STATES,
) -> SymmetricLDS:
    """Identify a symmetric linear dynamical system with a direct term from what went in and what came out.

    Each trajectory begins at rest, or in a state that is estimated too if the data are likelier with it; more than
    eight trajectories are taken to begin at rest. An offset of the outputs has to be subtracted. Float64, without
    gradient descent, and the same answer for the same data; it does not depend on the channels' units.

    Args:
        inputs: (time, inputs), or several trajectories (batch, time, inputs).
        outputs: (time, outputs) or (batch, time, outputs).
        method: "spectral", convex regression on spectral features, then the closed form of their system; "grid", ridge
            regression on the states of fixed poles; "refine", poles found one at a time and refined together, as many
            as the Bayesian information criterion wants; "auto", the one with the least error on held-out data, "refine"
            only if it also beats "grid" on a half of the data when the other half was fitted.
        max_states: the largest number of states, from 1 to 4096. A pole needs up to min(inputs, outputs) states.

    Returns:
        the system, fitted to all data. Its report holds method; states; held_out_error, squared error over the
        outputs' power (each output scaled to power one) on a fifth of the data when the rest was fitted: the last
        trajectories, or the end of a single one and of those that do not begin at rest, simulated from its beginning
        without being shown an output; held_out_errors, that of every method that was tried; noise_variance, an estimate
        for each output; initial_state, what `simulate` takes as the state to reproduce the data, (states,) or (batch,
        states), or None: at rest; samples, the number of time steps; and seconds.

    Raises:
        UserError: for signals that are not finite real numbers, differ in length, are too short, or have a constant
            channel, and for an unknown method or number of states.

    Sources: Shah et al. 2025, SpectraLDS (arXiv 2505.17868); Golub and Pereyra 1973 for "refine".
    """
    return search(inputs, outputs, method, max_states).system


@dataclass(frozen=True)
class Found:
    """The result of `search`.

    Attributes:
        system: fitted to all data, with its report.
        trained: by the same method, fitted without the held-out data.
        state: of `trained` before the trajectory's first input, (states,).
        first: the time step from which on `trained` was judged, in the trajectories from `trajectory` on.
        trajectory: the first that was judged.
    """

    system: SymmetricLDS
    trained: SymmetricLDS
    state: torch.Tensor
    first: int
    trajectory: int


def search(
    inputs: np.ndarray | torch.Tensor, outputs: np.ndarray | torch.Tensor, method: str, max_states: int
) -> Found:
    """As `identify`, with the system that was judged."""
    start = time.perf_counter()
    if method not in (AUTO, *METHODS):
        raise UserError(f"method is {method!r}; allowed: {', '.join((AUTO, *METHODS))}")
    if type(max_states) is not int or not 1 <= max_states <= MAX_STATES:
        raise UserError(f"max_states is {max_states!r}; allowed: integers from 1 to {MAX_STATES}")
    given, input_scale, output_scale = read_records(inputs, outputs)

    def units(response: Response) -> tuple[SymmetricLDS, torch.Tensor]:
        return response.system(input_scale, output_scale, records.impulses)

    with few_threads():
        records = started(given)
        training, judged, first = records.split(HELD_OUT)
        tried = {name: _FITS[name](training, max_states) for name in (METHODS if method == AUTO else (method,))}
        errors = {name: _held_out_error(response, judged, first) for name, response in tried.items()}
        best = min(errors, key=errors.__getitem__)
        if method == AUTO and best == "refine" and not _refine_wins_early(records, max_states):
            best = min((name for name in errors if name != "refine"), key=errors.__getitem__)
        if best == "refine":
            found = fit_refine(records, max_states, start=np.unique(tried[best].A))
        else:
            found = _FITS[best](records, max_states)
    system, states = units(found)
    trained, trained_states = units(tried[best])
    report: dict[str, Any] = {
        "method": best,
        "states": len(system.A),
        "held_out_error": errors[best],
        "held_out_errors": errors,
        "noise_variance": (found.noise * output_scale**2).tolist(),
        "initial_state": (states[0] if np.ndim(inputs) == 2 else states).tolist() if records.impulses else None,
        "samples": given.rows,
        "seconds": time.perf_counter() - start,
    }
    trajectory = len(records.inputs) - len(judged.inputs)
    state = trained_states[trajectory] if records.impulses else torch.zeros(len(trained.A), dtype=torch.float64)
    return Found(replace(system, report=report), trained, state, max(0, first - bool(records.impulses)), trajectory)


def _refine_wins_early(records: Records, max_states: int) -> bool:
    """Returns whether "refine" also beats "grid" on a half of the data when the other is fitted.

    The error of a slow state grows with the inputs that were not fitted, for which a fifth of the data is short: there
    "refine" may look better than on fresh data. A doubtful case is left to the penalised method.
    """
    training, judged, first = records.split(0.5)
    grid, refine = (_held_out_error(fit(training, max_states), judged, first) for fit in (fit_grid, fit_refine))
    return refine < grid


def _held_out_error(found: Response, judged: Records, first: int) -> float:
    """Returns the squared error from a time step on, over the power of the outputs there."""
    errors = found.system()[0].simulate(judged.inputs)[:, first:] - judged.outputs[:, first:]
    return float(np.square(errors).sum() / max(np.square(judged.outputs[:, first:]).sum(), np.finfo(float).tiny))
