"""Identification by poles that are found one at a time and refined together, with as many as the data can tell apart.

For given poles the rest of the system is linear least squares, so only the poles are searched: variable projection, a
Levenberg-Marquardt iteration on what least squares leaves. A new pole is the one of a grid that explains most of the
residual, and the Bayesian information criterion says how many there are. It then takes states away, as long as it
improves, and the rest is refined together: poles and, where a pole has fewer states than inputs, the directions in
which the inputs drive them.

Sources: Golub and Pereyra 1973 and Kaufman 1975 (variable projection, and its approximate Jacobian); Schwarz 1978 (the
criterion).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.signal import lfilter

from spectralds.identification.records import Records, filtered
from spectralds.identification.regression import product, svd, triangle
from spectralds.identification.response import Response

_SPACING = 0.25  # of the candidates, in atanh of the pole
_MAX_POLES = 16
_PATIENCE = 3  # poles that are added without an improvement of the criterion
_ITERATIONS = 40
_COARSE, _FINE = 0.3, 1e-3  # change of the criterion that ends a refinement
_EXACT = 1e-29  # share of an output's power that is rounding
_RCOND = 1e-14
_LONGEST_STEP = 1.0  # of a parameter in one iteration
_HIGHEST_DAMPING = 1e8


def fit_refine(records: Records, max_states: int, start: np.ndarray | None = None) -> Response:
    """Fit poles, their residues and the direct term.

    Args:
        records: the data.
        max_states: the largest number of states.
        start: poles to begin with, (poles,); None: none.
    """
    inputs = records.inputs.shape[2]
    most = min(_MAX_POLES, max(1, max_states // records.rank), records.rows // (4 * inputs))
    model = _Model.full(np.zeros(0) if start is None else np.arctanh(start[:most]), inputs)
    fit = _refine(_project(records, model), _COARSE)
    best, waited = fit, 0
    while len(fit.model.logits) < most and waited < _PATIENCE and not fit.exact:
        logit = _next_logit(fit)
        fit = _refine(_project(records, _Model.full(np.append(fit.model.logits, logit), inputs), fit.balance), _COARSE)
        best, waited = (fit, 0) if fit.criterion < best.criterion else (best, waited + 1)
    states = np.inf
    while (model := _reduced(best, max_states)).states < states:
        states = model.states
        best = _refine(_project(records, model, best.balance), _FINE, vary_directions=True)
    return best.response()


@dataclass(frozen=True)
class _Model:
    """The parameters of a system that its outputs are not linear in.

    Attributes:
        logits: atanh of the poles, (poles,).
        directions: of the inputs, one column for each state of the pole, (inputs, rank) for each pole.
    """

    logits: np.ndarray
    directions: tuple[np.ndarray, ...]

    @classmethod
    def full(cls, logits: np.ndarray, inputs: int) -> "_Model":
        """Returns the model with as many states of each pole as there are inputs."""
        return cls(logits, (np.eye(inputs),) * len(logits))

    @property
    def ranks(self) -> list[int]:
        return [part.shape[1] for part in self.directions]

    @property
    def states(self) -> int:
        return sum(self.ranks)

    def moved(self, step: np.ndarray, limit: float) -> "_Model":
        """Returns the model after a step of the logits, which stay within the limit, and if it is longer, of the
        directions, column by column.
        """
        count = len(self.logits)
        logits = np.clip(self.logits + step[:count], -limit, limit)
        if len(step) == count:
            return replace(self, logits=logits)
        parts = np.split(step[count:], np.cumsum([part.size for part in self.directions])[:-1])
        return _Model(logits, tuple(_unit(a + b.reshape(a.shape)) for a, b in zip(self.directions, parts, strict=True)))


@dataclass(frozen=True)
class _Fit:
    """Least squares for a model, in the space of the triangle of [states, inputs, outputs, derivatives].

    Attributes:
        records: the data.
        model: poles and directions.
        balance_used: what made the outputs' noise equally large, (outputs,).
        factor: the triangle, (rows of the triangle, columns); its outputs have the balance.
        basis: of the design's columns, orthonormal, (rows of the triangle, independent columns).
        solution: weights of the states and of the inputs, (states + inputs, outputs), with the balance.
        residual: (rows of the triangle, outputs), with the balance.
    """

    records: Records
    model: _Model
    balance_used: np.ndarray
    factor: np.ndarray
    basis: np.ndarray
    solution: np.ndarray
    residual: np.ndarray

    @property
    def total(self) -> float:
        """The sum of squares that is made small."""
        return float((self.residual**2).sum())

    @property
    def shares(self) -> np.ndarray:
        """Returns the power of each output that is left, never less than rounding leaves."""
        power = np.square(self.records.outputs).sum(axis=(0, 1))
        return np.maximum((self.residual**2).sum(axis=0) / self.balance_used**2 / power, _EXACT)

    @property
    def exact(self) -> bool:
        return bool((self.shares <= _EXACT).all())

    @property
    def balance(self) -> np.ndarray:
        """Returns the factors (outputs,) that make the outputs' noise equally large."""
        return 1 / np.sqrt(np.maximum(self.shares, 1e-12))

    @property
    def criterion(self) -> float:
        """The Bayesian information criterion, up to a constant, if no rank is reduced."""
        rows, outputs = self.records.rows, self.solution.shape[1]
        parameters = self.model.states * outputs + len(self.model.logits)
        return rows * float(np.log(self.shares).sum()) + parameters * np.log(rows * outputs)

    def states_of(self, pole: int) -> np.ndarray:
        """Returns a pole's states for each input alone, (rows of the triangle, inputs)."""
        inputs = self.records.inputs.shape[2]
        return self.factor[:, pole * inputs : (pole + 1) * inputs]

    def jacobian(self, vary_directions: bool) -> np.ndarray:
        """Returns the derivatives of the residual, (parameters, rows of the triangle * outputs)."""
        inputs, outputs = self.records.inputs.shape[2], self.solution.shape[1]
        slopes = self.factor[:, (len(self.model.logits) + 1) * inputs + outputs :]
        of_logits, of_directions, first = [], [], 0
        for j, directions in enumerate(self.model.directions):
            rank = directions.shape[1]
            weights = self.solution[first : first + rank]
            of_logits.append(slopes[:, j * inputs : (j + 1) * inputs] @ (directions @ weights))
            if vary_directions:
                moved = self.states_of(j).T[:, None, :, None] * weights[None, :, None, :]
                of_directions.extend(moved.reshape(inputs * rank, *self.residual.shape))
            first += rank
        moved = np.stack(of_logits + of_directions)
        left = moved - product(self.basis, product(self.basis.T, moved))
        left[np.linalg.norm(left, axis=(1, 2)) < 1e-7 * np.linalg.norm(moved, axis=(1, 2))] = 0.0  # moves nothing
        return -left.reshape(len(moved), -1)

    def response(self) -> Response:
        """Returns the system found, its states of variance one for white inputs."""
        inputs, states = self.records.inputs.shape[2], self.model.states
        A = np.repeat(np.tanh(self.model.logits), self.model.ranks)
        B = np.concatenate([np.zeros((0, inputs)), *(part.T for part in self.model.directions)])
        weights = (self.solution / self.balance_used).T
        gain = np.sqrt((1 - A) * (1 + A)) / np.linalg.norm(B, axis=1)
        squares = (self.residual**2).sum(axis=0) / self.balance_used**2
        noise = squares / (self.records.rows - len(self.solution))
        return Response(A, B * gain[:, None], weights[:, :states] / gain, weights[:, states:], noise)


def _project(records: Records, model: _Model, balance: np.ndarray | None = None) -> _Fit:
    """Returns the least squares fit for a model; balance: see `_Fit`, None for ones."""
    poles, inputs, outputs = np.tanh(model.logits), records.inputs.shape[2], records.outputs.shape[2]
    balance = np.ones(outputs) if balance is None else balance

    def blocks() -> Iterator[np.ndarray]:
        for u, y in records.blocks():
            states = filtered(u, poles)
            slopes = np.zeros_like(states)
            for j, pole in enumerate(poles):
                slopes[:, :, j] = lfilter([0.0, 1 - pole**2], [1.0, -pole], states[:, :, j], axis=1)
            flat = (*u.shape[:2], -1)
            rows = np.concatenate([states.reshape(flat), u, y * balance, slopes.reshape(flat)], axis=2)
            yield rows.reshape(-1, rows.shape[2])

    factor = triangle(blocks())
    columns = (len(poles) + 1) * inputs
    design, targets = _design(factor, model.directions, inputs), factor[:, columns : columns + outputs]
    basis, solution = _least_squares(design, targets)
    return _Fit(records, model, balance, factor, basis, solution, targets - basis @ (basis.T @ targets))


def _refine(fit: _Fit, tolerance: float, vary_directions: bool = False) -> _Fit:
    """Returns the fit at the nearest model whose sum of squares is a minimum.

    Args:
        fit: where to begin.
        tolerance: a change of the criterion that is not worth another iteration.
        vary_directions: also move the directions.
    """
    damping, limit = 1e-3, fit.records.largest_logit
    for _ in range(_ITERATIONS if len(fit.model.logits) else 0):
        jacobian = fit.jacobian(vary_directions)
        scale = np.linalg.norm(jacobian, axis=1)
        scale[scale == 0] = 1.0
        jacobian /= scale[:, None]
        curvature, gradient = product(jacobian, jacobian.T), product(jacobian, fit.residual.ravel())
        while damping < _HIGHEST_DAMPING:
            damped = curvature + damping * np.eye(len(scale))
            step = -np.linalg.solve(damped, gradient) / scale
            step *= min(1.0, _LONGEST_STEP / max(np.abs(step).max(), np.finfo(float).tiny))
            trial = _project(fit.records, fit.model.moved(step, limit), fit.balance_used)
            if trial.total < fit.total:
                break
            damping *= 8
        else:
            return fit
        gained = fit.records.rows * float(np.log(fit.shares / trial.shares).sum())
        fit, damping = trial, max(damping / 8, 1e-12)
        if abs(gained) < tolerance:
            break
    return fit


def _next_logit(fit: _Fit) -> float:
    """Returns the pole of a grid whose states explain most of the residual, beside the poles that are there."""
    records, poles = fit.records, np.tanh(fit.model.logits)
    inputs, columns, limit = records.inputs.shape[2], len(fit.solution), records.largest_logit
    candidates = np.tanh(np.linspace(-limit, limit, 2 * int(np.ceil(limit / _SPACING)) + 1))
    whitening = np.linalg.pinv(_design(fit.factor, fit.model.directions, inputs), rcond=1e-10) @ fit.basis
    own = np.zeros((len(candidates), inputs, inputs))
    with_design = np.zeros((len(candidates), inputs, whitening.shape[1]))
    with_residual = np.zeros((len(candidates), inputs, fit.solution.shape[1]))
    for u, y in records.blocks():
        design = np.concatenate([filtered(u, poles).reshape(*u.shape[:2], -1), u], axis=2).reshape(-1, columns)
        residual = y.reshape(len(design), -1) * fit.balance_used - product(design, fit.solution)
        basis = product(design, whitening)
        for i in range(len(candidates)):
            states = filtered(u, candidates[i : i + 1]).reshape(-1, inputs)
            own[i] += product(states.T, states)
            with_design[i] += product(states.T, basis)
            with_residual[i] += product(states.T, residual)
    size, vectors = np.linalg.eigh(own - with_design @ with_design.transpose(0, 2, 1))
    new = size > 1e-9 * np.trace(own, axis1=1, axis2=2)[:, None]
    parts = vectors.transpose(0, 2, 1) @ with_residual
    explained = ((parts**2).sum(axis=2) * new / np.where(new, size, 1.0)).sum(axis=1)
    return float(np.arctanh(candidates[np.argmax(explained)]))


def _reduced(fit: _Fit, max_states: int) -> _Model:
    """Returns the model with only those states that the criterion wants, and at most `max_states`.

    A residue of rank r needs r states. The least of them all, measured by how much the sum of squares would grow
    without it, is left out and the rest fitted again, as long as that lowers the criterion.
    """
    inputs, outputs = fit.records.inputs.shape[2], fit.solution.shape[1]
    targets = fit.factor[:, (len(fit.model.logits) + 1) * inputs :][:, :outputs]
    variance = fit.total / (fit.records.rows - len(fit.solution)) / outputs
    price = max(variance * np.log(fit.records.rows * outputs), _EXACT * float((targets**2).sum()))  # of a parameter
    directions = list(fit.model.directions)
    while any(part.shape[1] for part in directions):
        design = _design(fit.factor, directions, inputs)
        solution = _least_squares(design, targets)[1]
        gains, kept, first = [], [], 0
        for part in directions:
            rank = part.shape[1]
            if not rank:
                gains.append(np.inf)
                kept.append(part)
                continue
            own = slice(first, first + rank)
            others = _least_squares(np.delete(design, own, axis=1), targets)[0]
            alone = design[:, own] - others @ (others.T @ design[:, own])
            root = triangle([alone])
            left, size, _ = np.linalg.svd(root @ solution[own])
            spared = inputs + outputs - 2 * rank + 1 + (rank == 1)  # parameters
            gains.append(size[rank - 1] ** 2 - price * spared if rank <= len(size) else -np.inf)
            kept.append(_unit(part @ np.linalg.lstsq(root, left[:, : rank - 1], rcond=_RCOND)[0]))
            first += rank
        least = int(np.argmin(gains))
        if gains[least] > 0 and first <= max_states:
            break
        directions[least] = kept[least]
    driven = [j for j, part in enumerate(directions) if part.shape[1]]
    return _Model(fit.model.logits[driven], tuple(directions[j] for j in driven))


def _unit(columns: np.ndarray) -> np.ndarray:
    """Returns columns of length one."""
    return columns / np.maximum(np.linalg.norm(columns, axis=0), np.finfo(float).tiny)


def _design(factor: np.ndarray, directions: Sequence[np.ndarray], inputs: int) -> np.ndarray:
    """Returns the columns of the states that inputs along these directions drive, then those of the inputs."""
    parts = [factor[:, j * inputs : (j + 1) * inputs] @ part for j, part in enumerate(directions)]
    return np.concatenate([*parts, factor[:, len(parts) * inputs : (len(parts) + 1) * inputs]], axis=1)


def _least_squares(design: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns an orthonormal basis of the design's columns, and their weights of least norm at length one."""
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1.0
    left, singular, right = svd(design / scale)
    kept = singular > _RCOND * singular[0]
    left, solution = left[:, kept], right[kept].T / singular[kept]
    return left, solution @ (left.T @ targets) / scale[:, None]
