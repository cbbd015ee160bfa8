"""The 4-state marginally stable system of Spectral State Space Models, Figs. 3 to 5: STU against LRU, error against K.

    python scripts/experiments/marginal_lds.py [--quick | --full] [--output results/experiments]

Three measurements. Learning curves of an STU (K = 25) and an LRU over the rates of gradient descent and of Adam, on a
fresh sequence in every step. What the LRU's settings do to its error after as many steps, one at a time. And the error
against K of four forms of the STU, by least squares in float64 and by Adam, on the same sequences:

    plain             y_t = M^u_1 u_t + sum_k M_k U_{t,k}
    eq. 4, free       y_t = y_{t-2} + sum_{i<=3} M^u_i u_{t+1-i} + sum_k M_k U_{t-2,k}, run on its own outputs
    eq. 4, fed        the same, fed the true y_{t-2}
    eq. 5, free       a learned matrix M^y before y_{t-2}, run on its own outputs

All are fitted to the true past. U are the features of both branches of the hankel filters. Errors are squared, on
fresh sequences without noise, over the outputs' power.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learners import LDS, LRU, STU, Data, both_branches, descend, spaced
from scipy.fft import irfft, rfft
from torch import nn

from flash_stu.errors import run_cli
from flash_stu.figures import save_figure
from flash_stu.filters.spectral import spectral_filters
from flash_stu.results import environment, experiment_parser, finish, page, panels, table
from spectralds.fit import few_threads
from spectralds.identification.regression import triangle
from spectralds.identification.systems import marginal, trial


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        steps: of a training; length: of its sequences.
        seeds: of the learning curves.
        gradient, adam: rates of gradient descent and of Adam.
        states: of the LRU.
        filters: numbers K of the last measurement; filter_length: T of its sequences; sequences: how many are fitted.
        descent: steps of its trainings.
    """

    steps: int
    length: int
    seeds: int
    gradient: tuple[float, ...]
    adam: tuple[float, ...]
    states: int
    filters: tuple[int, ...]
    filter_length: int
    sequences: int
    descent: int


SIZES = {
    "quick": Size(20, 128, 1, (0.1, 1.0), (0.01,), 8, (5, 10), 256, 2, 10),
    "default": Size(1000, 1024, 1, (0.05, 0.1, 0.5, 1, 5, 10), (1e-3, 1e-2, 0.1), 64, (5, 10, 15, 20, 25, 30), 4096, 8, 800),
    "full": Size(8000, 4096, 3, (0.05, 0.1, 0.5, 1, 5, 10), (1e-3, 3e-3, 1e-2, 3e-2, 0.1), 64, (5, 10, 15, 20, 25, 30, 35), 4096, 8, 8000),
}  # fmt: skip
FILTERS = 25  # the paper's K
FORMS = ("plain", "eq. 4, free", "eq. 4, fed", "eq. 5, free")
NOISE = (0.0, 0.1)  # over the outputs' standard deviation, in the sequences that are fitted
RATES = (1e-3, 1e-2, 0.1)  # of Adam in the last measurement
REACHED = 0.1  # the error whose steps are compared
RINGS = tuple((low, high) for low in (0.0, 0.9, 0.99, 0.999) for high in (0.9, 0.99, 0.999, 1.0) if low < high)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ring of |a|": [{"r_min": low, "r_max": high} for low, high in RINGS],
    "max phase": [{"max_phase": phase} for phase in (1.57, 3.14, 6.28)],
    "parametrisation": [{"parametrisation": name} for name in ("log", "exponential", "cartesian")],
    "gamma": [{"normalise": on} for on in (True, False)],
    "weight decay": [{"weight_decay": decay} for decay in (0.0, 1e-2, 0.1)],
    "rate": [{"cosine": on} for on in (False, True)],
}


def fresh(length: int, seed: int) -> tuple[Data, torch.Tensor]:
    """Returns what gives a new sequence of the system in every step, and the outputs' scale (channels,).

    Outputs are divided by their root mean square, that of four sequences, so that a rate means the same for all.
    """
    system = marginal()
    exact = LDS(len(system.A), 3, 3)
    with torch.no_grad():
        for name in "ABCD":
            getattr(exact, name).copy_(getattr(system, name))

    def sequences(step: int, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(1_000_000 * seed + step)
        inputs = torch.randn(count, length, 3, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            return inputs, exact(inputs)

    scale = sequences(0, 4)[1].square().mean(dim=(0, 1)).sqrt()

    def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, outputs = sequences(step)
        return inputs, outputs / scale

    return data, scale


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Returns the squared error over the power, of all channels together."""
    return float((found - true).square().sum() / true.square().sum())


def train(size: Size, seed: int, learner: str, optimizer: str, rate: float, **settings: Any) -> dict:
    """Returns one training: its curve of [step, CPU seconds, error], and the error at its end, None if it diverged."""
    data, scale = fresh(size.length, seed)
    inputs, outputs = (
        torch.cat(parts) for parts in zip(*(fresh(size.length, 99)[0](i) for i in range(1, 5)), strict=True)
    )
    decay, cosine = settings.pop("weight_decay", 0.0), settings.pop("cosine", False)
    torch.manual_seed(seed)
    model = STU(size.length, FILTERS, 3, 3) if learner == "STU" else LRU(size.states, 3, 3, **settings)
    kind = torch.optim.SGD if optimizer == "gradient" else torch.optim.AdamW
    descent = kind(model.parameters(), lr=rate, weight_decay=decay)

    def error(model: nn.Module) -> float:
        return relative_error(model(inputs) * scale, outputs * scale)

    curve = descend(model, descent, data, size.steps, spaced(size.steps), error, cosine)
    done = bool(curve) and curve[-1][0] == size.steps
    return {"learner": learner, "optimizer": optimizer, "rate": rate, "seed": seed, "curve": curve,
            "error": curve[-1][2] if done else None}  # fmt: skip


def over_rates(size: Size) -> list[dict]:
    """Returns the trainings of both learners with every rate."""
    return [
        train(size, seed, learner, optimizer, rate)
        for learner in ("STU", "LRU")
        for optimizer, rates in (("gradient", size.gradient), ("Adam", size.adam))
        for rate in rates
        for seed in range(size.seeds)
    ]


def over_settings(size: Size, rate: float) -> list[dict]:
    """Returns the LRU's error with every setting changed, by Adam at one rate."""
    return [
        {"setting": name, "value": value, "error": train(size, 0, "LRU", "Adam", rate, **value)["error"]}
        for name, values in SETTINGS.items()
        for value in values
    ]


def best(trainings: list[dict], learner: str, optimizer: str | None = None) -> dict | None:
    """Returns the training of a learner, of the first seed, that ends at the smallest error."""
    done = [
        row
        for row in trainings
        if row["learner"] == learner and row["error"] is not None and row["seed"] == 0
        and optimizer in (None, row["optimizer"])
    ]  # fmt: skip
    return min(done, key=lambda row: row["error"], default=None)


def delayed(signal: np.ndarray, steps: int) -> np.ndarray:
    """Returns a signal (time, channels) so many steps later, zero before."""
    return np.concatenate([np.zeros_like(signal[:steps]), signal[: len(signal) - steps]])


def design(form: str, phi: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a form combines linearly, (time, columns), and what that should give, (time, outputs).

    Args:
        form: one of FORMS.
        phi: filters of both branches, (time, 2 K).
        inputs, outputs: (time, channels).
    """
    size = 2 * len(phi)
    spectrum = rfft(phi, size, axis=0)[:, :, None] * rfft(inputs, size, axis=0)[:, None]
    features = irfft(spectrum, size, axis=0)[: len(phi)].reshape(len(phi), -1)
    if form == "plain":
        return np.concatenate([features, inputs], axis=1), outputs
    columns = [delayed(features, 2), *(delayed(inputs, i) for i in range(3))]
    if form.startswith("eq. 4"):
        return np.concatenate(columns, axis=1), outputs - delayed(outputs, 2)
    return np.concatenate([*columns, delayed(outputs, 2)], axis=1), outputs


def predict(form: str, weights: np.ndarray, rows: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Returns the outputs of a form, (time, outputs).

    Args:
        form: one of FORMS.
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


def least_squares(blocks: Iterator[np.ndarray], targets: int) -> np.ndarray:
    """Returns the weights (columns, targets) of blocks of [design, targets], through QR and columns of unit length."""
    factor = triangle(blocks)
    columns, wanted = factor[:, :-targets], factor[:, -targets:]
    scale = np.linalg.norm(columns, axis=0)
    return np.linalg.lstsq(columns / scale, wanted, rcond=1e-15)[0] / scale[:, None]


def by_adam(size: Size, designs: list[tuple[np.ndarray, np.ndarray]], error: Callable) -> float | None:
    """Returns the least error of Adam's rates after so many steps, each on the next sequence; None if all diverged."""
    scale = np.sqrt(np.mean([np.mean(targets**2, axis=0) for _, targets in designs], axis=0))
    pairs = [(torch.from_numpy(rows)[None], torch.from_numpy(targets / scale)[None]) for rows, targets in designs]
    errors = []
    for rate in RATES:
        learner = nn.Linear(designs[0][0].shape[1], len(scale), bias=False, dtype=torch.float64)
        nn.init.zeros_(learner.weight)
        descent = torch.optim.Adam(learner.parameters(), lr=rate)
        curve = descend(learner, descent, lambda step: pairs[step % len(pairs)], size.descent, [size.descent],
                        lambda learner: error(learner.weight.numpy().T * scale))  # fmt: skip
        errors += [point[2] for point in curve]
    return min(errors, default=None)


def over_filters(size: Size) -> list[dict]:
    """Returns the error of every form and K, by least squares at every noise, and by Adam without noise."""
    system, T = marginal(), size.filter_length
    tests = [trial(system, T, 0.0, 1000 + seed) for seed in range(4)]
    tests = [(test.fresh_inputs.numpy(), test.fresh_outputs.numpy()) for test in tests]
    power = sum(np.sum(outputs**2) for _, outputs in tests)
    rows = []
    for sigma in NOISE:
        trials = [trial(system, T, sigma, seed) for seed in range(size.sequences)]
        fitted = [(trial.inputs.numpy(), trial.outputs.numpy()) for trial in trials]
        for count in size.filters:
            phi = both_branches(spectral_filters(T, count)[1]).numpy()
            for form in FORMS:
                tested = [(design(form, phi, *test)[0], test[1]) for test in tests]

                def error(weights: np.ndarray, form: str = form, tested: list = tested) -> float:
                    with np.errstate(over="ignore", invalid="ignore"):
                        squares = [np.sum((predict(form, weights, *test) - test[1]) ** 2) for test in tested]
                        return float(sum(squares) / power)

                designs = [design(form, phi, *sequence) for sequence in fitted]
                several = error(least_squares(map(np.hstack, designs), 3))
                row = {"sigma": sigma, "form": form, "K": count, "closed": several}
                row["one sequence"] = error(least_squares(map(np.hstack, designs[:1]), 3))
                row["trained"] = by_adam(size, designs, error) if sigma == 0 else None
                rows.append(row)
    return rows


def shown(error: float | None) -> str:
    """Returns an error in a table."""
    return "diverged" if error is None else f"{error:.1e}"


def steps_to(training: dict | None, error: float) -> int | None:
    """Returns the first measured step of a training at or below an error."""
    return next((step for step, _, reached in training["curve"] if reached <= error), None) if training else None


def seeds_of(results: dict, **wanted: Any) -> str:
    """Returns the errors of the trainings of a table's cell."""
    rows = [row for row in results["trainings"] if all(row[key] == value for key, value in wanted.items())]
    errors = sorted(row["error"] if row["error"] is not None else float("inf") for row in rows)
    if not errors:
        return ""
    cells = [
        shown(None if value == float("inf") else value) for value in (errors[len(errors) // 2], errors[0], errors[-1])
    ]
    return cells[0] if len(errors) == 1 else f"{cells[0]} ({cells[1]}-{cells[2]})"


def render(results: dict) -> str:
    """The rates, the LRU's settings, the forms against K."""
    what = (
        f"STU with K = {FILTERS} and LRU with {results['states']} complex states; T = {results['length']:,}, a fresh "
        f"sequence in each of {results['steps']:,} steps, {results['seeds']} seed(s). Relative squared errors."
    )
    rates = [
        [f"{'gradient descent' if optimizer == 'gradient' else 'Adam'}, rate {rate:g}",
         *(seeds_of(results, learner=learner, optimizer=optimizer, rate=rate) for learner in ("STU", "LRU"))]
        for optimizer, rate in dict.fromkeys((row["optimizer"], row["rate"]) for row in results["trainings"])
    ]  # fmt: skip
    reached = ", ".join(
        f"{learner} {steps_to(best(results['trainings'], learner), REACHED) or 'never'}" for learner in ("STU", "LRU")
    )
    steps = f"Steps, of those measured, after which the best training of each is at {REACHED:g} or below: {reached}."
    settings = [
        [row["setting"], ", ".join(f"{key} {value}" for key, value in row["value"].items()), shown(row["error"])]
        for row in results["settings"]
    ]
    lru = (
        f"The LRU by Adam at {results['rate']:g}, one setting changed (else r_min 0, r_max 1, max phase 6.28, log "
        "parametrisation, gamma, no decay, constant rate):"
    )
    counts = sorted({row["K"] for row in results["filters"]})
    header = ["form", "noise", *(f"K = {count}" for count in counts)]
    forms = [
        [f"{form}, {label}", f"{sigma:g}",
         *(shown(row[key]) for row in results["filters"] if (row["form"], row["sigma"]) == (form, sigma))]
        for sigma in NOISE
        for key, label in (("closed", "least squares"), ("one sequence", "least squares on one sequence"), ("trained", "Adam"))
        if sigma == 0 or key == "closed"
        for form in FORMS
    ]  # fmt: skip
    closed = (
        f"Error against K: {results['sequences']} sequences of T = {results['filter_length']:,} are fitted, in float64; "
        f"Adam at the best of {', '.join(f'{rate:g}' for rate in RATES)} (chosen on the test), "
        f"{results['descent']:,} steps:"
    )
    parts = [what, table(["optimizer", "STU", "LRU"], rates), steps, lru]
    parts += [table(["setting", "value", "error"], settings), closed, table(header, forms)]
    return page(results, *parts)


def plot(results: dict, path: Path) -> None:
    figure, axes = panels(4, width=4.2, height=4.2)
    colors = {"STU": "C0", "LRU": "C1"}
    for learner, color in colors.items():
        winner = best(results["trainings"], learner)
        for row in (
            row for row in results["trainings"] if row["learner"] == learner and row["seed"] == 0 and row["curve"]
        ):
            steps, _, errors = zip(*row["curve"], strict=True)
            style = (
                {"linewidth": 2.2, "label": f"{learner}, best"} if row is winner else {"linewidth": 0.8, "alpha": 0.5}
            )
            axes[0].plot(steps, errors, "-" if row["optimizer"] == "Adam" else "--", color=color, **style)
        for optimizer, mark in (("gradient", "o--"), ("Adam", "s-")):
            rows = [
                r for r in results["trainings"] if (r["learner"], r["optimizer"], r["seed"]) == (learner, optimizer, 0)
            ]
            done = [(row["rate"], row["error"]) for row in rows if row["error"] is not None]
            name = "gradient descent" if optimizer == "gradient" else optimizer
            axes[1].plot(
                *(zip(*done, strict=True) if done else ([], [])), mark, color=color, label=f"{learner}, {name}"
            )
            axes[1].plot([row["rate"] for row in rows if row["error"] is None],
                         [3 if learner == "STU" else 4.5] * (len(rows) - len(done)), "x", color=color)  # fmt: skip
    axes[0].set(xscale="log", yscale="log", xlabel="steps", ylim=(None, 6))
    axes[0].set_title("all rates; dashed: gradient descent", loc="left", fontsize=10)
    axes[1].set(xscale="log", yscale="log", xlabel="rate", ylim=(None, 6))
    axes[1].set_title(f"after {results['steps']:,} steps; x: diverged", loc="left", fontsize=10)
    names = list(dict.fromkeys(row["setting"] for row in results["settings"]))[::-1]
    for row in results["settings"]:
        x, mark = (row["error"], "o") if row["error"] is not None else (4.5, "x")
        axes[2].plot(x, names.index(row["setting"]), mark, color="C1", alpha=0.7)
    winner = best(results["trainings"], "STU")
    if winner:
        axes[2].axvline(winner["error"], color="C0", linewidth=1.4, label="STU, best")
    axes[2].set(xscale="log", xlim=(None, 6), yticks=range(len(names)), yticklabels=names)
    axes[2].set_title("LRU, one setting changed; x: diverged", loc="left", fontsize=10)
    for i, form in enumerate(FORMS):
        rows = [row for row in results["filters"] if row["form"] == form and row["sigma"] == 0]
        counts = [row["K"] for row in rows]
        axes[3].plot(counts, [row["closed"] for row in rows], "o-", color=f"C{i}", label=form)
        axes[3].plot(counts, [row["trained"] or np.nan for row in rows], "s:", color=f"C{i}", markersize=4)
    axes[3].set(yscale="log", xlabel="K")
    axes[3].set_title("least squares; dotted: Adam", loc="left", fontsize=10)
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    args = experiment_parser(__doc__, "marginal_lds").parse_args()
    size = SIZES[args.size]
    with few_threads():
        trainings = over_rates(size)
        fastest = best(trainings, "LRU", "Adam")
        rate = fastest["rate"] if fastest else size.adam[0]
        results = {
            "environment": environment(torch.device("cpu")),
            "size": args.size,
            **{key: getattr(size, key) for key in ("steps", "length", "seeds", "states", "filter_length", "sequences", "descent")},
            "rate": rate,
            "trainings": trainings,
            "settings": over_settings(size, rate),
            "filters": over_filters(size),
        }  # fmt: skip
    finish("marginal_lds", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
