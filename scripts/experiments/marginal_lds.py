"""The 4-state marginally stable system of Spectral State Space Models, Figs. 3 to 5: STU against LRU, error against K.

    python scripts/experiments/marginal_lds.py [--quick | --full] [--output results/experiments]

Three measurements. Learning curves of an STU (K = 25) and an LRU over the rates of gradient descent and of Adam, on a
fresh sequence in every step. What the LRU's settings do to its error after as many steps, one at a time. And the error
against K of four forms of the STU, by least squares in float64 and by Adam, on the same sequences.

The forms are those of stu_forms.py. Errors are squared, on fresh sequences without noise, over the outputs' power.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learners import LDS, LRU, STU, both_branches, descend, each, spaced
from stu_forms import FORMS, design, least_squares, predict
from torch import nn

from flash_stu.errors import run_cli
from flash_stu.figures import save_figure
from flash_stu.filters.spectral import spectral_filters
from flash_stu.results import environment, experiment_parser, finish, page, panels, table
from spectralds.fit import few_threads
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
        processes: that share the work.
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
    processes: int = 2


GRADIENT = (0.05, 0.1, 0.5, 1, 5, 10)  # the paper's rates
DEFAULT = Size(
    steps=600,
    length=1024,
    seeds=1,
    gradient=GRADIENT,
    adam=(1e-3, 1e-2, 0.1),
    states=64,
    filters=(5, 10, 15, 20, 25, 30),
    filter_length=4096,
    sequences=8,
    descent=400,
)
SIZES = {
    "quick": Size(20, 128, 1, (0.1, 1.0), (0.01,), 8, (5, 10), 256, 2, 10, processes=1),
    "default": DEFAULT,
    "full": replace(DEFAULT, steps=8000, length=4096, seeds=3, adam=(1e-3, 3e-3, 1e-2, 3e-2, 0.1), descent=8000),
}
FILTERS = 25  # the paper's K
TEST = 1000  # the first seed of the test sequences
NOISE = (0.0, 0.1)  # over the outputs' standard deviation, in the sequences that are fitted
KEPT = ("steps", "length", "seeds", "states", "filter_length", "sequences", "descent")  # of the size, in the results
RATES = (1e-2, 0.1)  # of Adam in the last measurement
FITS = {"closed": "least squares", "one sequence": "least squares on one sequence", "trained": "Adam"}
COLORS = {"STU": "C0", "LRU": "C1"}
NAMES = {"gradient": "gradient descent", "Adam": "Adam"}
DIVERGED = 10.0  # an error from which on a training is said to have diverged
REACHED = 0.1  # the error whose steps are compared
RINGS = tuple((low, high) for low in (0.0, 0.9, 0.99, 0.999) for high in (0.9, 0.99, 0.999, 1.0) if low < high)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "radii": [{"r_min": low, "r_max": high} for low, high in RINGS],
    "max phase": [{"max_phase": phase} for phase in (1.57, 3.14, 6.28)],
    "parametrisation": [{"parametrisation": name} for name in ("log", "exponential", "cartesian")],
    "gamma": [{"normalise": on} for on in (True, False)],
    "weight decay": [{"weight_decay": decay} for decay in (0.0, 1e-2, 0.1)],
    "rate": [{"cosine": on} for on in (False, True)],
}


@cache
def exact() -> LDS:
    """Returns the system as a layer."""
    system = marginal()
    layer = LDS(len(system.A), 3, 3)
    with torch.no_grad():
        for name, values in {"A": system.A, "B": system.B, "C": system.C, "D": system.D}.items():
            layer.get_parameter(name).copy_(values)
    return layer


def fresh(length: int, seed: int, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `count` sequences of the system, inputs and outputs (count, length, channels), float64."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, length, 3, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        return inputs, exact()(inputs)


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Returns the squared error over the power, of all channels together."""
    return float((found - true).square().sum() / true.square().sum())


def train(size: Size, seed: int, learner: str, optimizer: str, rate: float, settings: dict[str, Any]) -> dict:
    """Returns one training: its curve of [step, CPU seconds, error], and the error at its end, None if it diverged.

    Outputs are divided by the root mean square of 16 other sequences, so that a rate means the same for all.
    """
    inputs, outputs = fresh(size.length, TEST, 4)
    scale = fresh(size.length, TEST + 1, 16)[1].square().mean(dim=(0, 1)).sqrt()
    settings = dict(settings)
    decay, cosine = settings.pop("weight_decay", 0.0), settings.pop("cosine", False)
    torch.manual_seed(seed)
    model = STU(size.length, FILTERS, 3, 3) if learner == "STU" else LRU(size.states, 3, 3, **settings)
    kind = torch.optim.SGD if optimizer == "gradient" else torch.optim.AdamW
    descent = kind(model.parameters(), lr=rate, weight_decay=decay)

    def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, outputs = fresh(size.length, 1_000_000 * (seed + 1) + step)
        return inputs, outputs / scale

    def error(model: nn.Module) -> float:
        return relative_error(model(inputs) * scale, outputs)

    curve = descend(model, descent, data, size.steps, spaced(size.steps), error, cosine)
    done = bool(curve) and curve[-1][0] == size.steps
    row = {"learner": learner, "optimizer": optimizer, "rate": rate, "seed": seed}
    return {**row, "curve": curve, "error": curve[-1][2] if done else None}


def over_rates(size: Size) -> list[dict]:
    """Returns the trainings of both learners with every rate."""
    jobs = [
        (size, seed, learner, optimizer, rate, {})
        for learner in ("STU", "LRU")
        for optimizer, rates in (("gradient", size.gradient), ("Adam", size.adam))
        for rate in rates
        for seed in range(size.seeds)
    ]
    return each(train, jobs, size.processes)


def over_settings(size: Size, rate: float) -> list[dict]:
    """Returns the LRU's error with every setting changed, by Adam at one rate."""
    changes = [(name, value) for name, values in SETTINGS.items() for value in values]
    trained = each(train, [(size, 0, "LRU", "Adam", rate, value) for _, value in changes], size.processes)
    return [
        {"setting": name, "value": value, "error": row["error"]}
        for (name, value), row in zip(changes, trained, strict=True)
    ]


def best(trainings: list[dict], learner: str, optimizer: str | None = None) -> dict | None:
    """Returns the training of a learner, of the first seed, that ends at the smallest error; None if all diverged."""
    mine = [row for row in trainings if (row["learner"], row["seed"]) == (learner, 0) and converged(row["error"])]
    mine = [row for row in mine if optimizer in (None, row["optimizer"])]
    return min(mine, key=lambda row: row["error"], default=None)


def converged(error: float | None) -> bool:
    """Returns whether an error is one, not a divergence."""
    return error is not None and error < DIVERGED


def by_adam(steps: int, rate: float, designs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns weights (columns, outputs) after so many steps, each on the next sequence; NaN if they diverged."""
    scale = np.sqrt(np.mean([np.mean(targets**2, axis=0) for _, targets in designs], axis=0))
    pairs = [(torch.from_numpy(rows)[None], torch.from_numpy(targets / scale)[None]) for rows, targets in designs]
    learner = nn.Linear(designs[0][0].shape[1], len(scale), bias=False, dtype=torch.float64)
    nn.init.zeros_(learner.weight)
    descent = torch.optim.Adam(learner.parameters(), lr=rate)
    descend(learner, descent, lambda step: pairs[step % len(pairs)], steps, [], lambda _: 0.0)
    return learner.weight.detach().numpy().T * scale


def at_filters(size: Size, sigma: float, count: int) -> list[dict]:
    """Returns the errors of every form at one noise and K, by least squares, and by Adam if there is no noise."""
    system, T = marginal(), size.filter_length
    trials = [trial(system, T, sigma, seed) for seed in range(size.sequences)]
    fitted = [(trial.inputs.numpy(), trial.outputs.numpy()) for trial in trials]
    trials = [trial(system, T, 0.0, TEST + seed) for seed in range(4)]
    tests = [(test.fresh_inputs.numpy(), test.fresh_outputs.numpy()) for test in trials]
    phi = both_branches(spectral_filters(T, count)[1]).numpy()
    rows = []
    for fit, forms in FORMS.items():
        designs, tested = ([design(fit, phi, *sequence) for sequence in several] for several in (fitted, tests))
        weights = {
            "closed": [least_squares(map(np.hstack, designs), 3)],
            "one sequence": [least_squares(map(np.hstack, designs[:1]), 3)],
            "trained": [by_adam(size.descent, rate, designs) for rate in RATES if sigma == 0],
        }
        inputs = [rows for rows, _ in tested]
        for form in forms:
            errors = {key: _least(form, several, inputs, [y for _, y in tests]) for key, several in weights.items()}
            rows.append({"sigma": sigma, "form": form, "K": count, **errors})
    return rows


def _least(form: str, weights: list[np.ndarray], inputs: list[np.ndarray], outputs: list[np.ndarray]) -> float | None:
    """Returns the least error that a form has with one of the weights; None if it is finite with none."""
    errors = []
    with np.errstate(over="ignore", invalid="ignore"):
        for several in weights:
            found = [predict(form, several, rows, true) for rows, true in zip(inputs, outputs, strict=True)]
            errors.append(relative_error(*(torch.from_numpy(np.stack(values)) for values in (found, outputs))))
    return min(filter(np.isfinite, errors), default=None)


def over_filters(size: Size) -> list[dict]:
    """Returns the errors of every form, noise and K."""
    jobs = [(size, sigma, count) for sigma in NOISE for count in size.filters]
    return [row for rows in each(at_filters, jobs, size.processes) for row in rows]


def shown(error: float | None) -> str:
    """Returns an error in a table."""
    return f"{error:.1e}" if error is not None and converged(error) else "diverged"


def steps_to(training: dict | None, error: float) -> int | None:
    """Returns the first measured step of a training at or below an error."""
    return next((step for step, _, reached in training["curve"] if reached <= error), None) if training else None


def cell(results: dict, learner: str, optimizer: str, rate: float) -> str:
    """Returns the median of a training's error over the seeds (least-greatest)."""
    wanted = (learner, optimizer, rate)
    rows = [row for row in results["trainings"] if (row["learner"], row["optimizer"], row["rate"]) == wanted]
    errors = sorted((row["error"] for row in rows), key=lambda error: math.inf if error is None else error)
    middle, low, high = map(shown, (errors[len(errors) // 2], errors[0], errors[-1]))
    return middle if len(errors) == 1 else f"{middle} ({low}-{high})"


def render(results: dict) -> str:
    """The rates, the LRU's settings, the forms against K."""
    what = (
        f"STU with K = {FILTERS} and LRU with {results['states']} complex states; T = {results['length']:,}, a fresh "
        f"sequence in each of {results['steps']:,} steps, seeds: {results['seeds']}. Relative squared errors, "
        f"diverged from {DIVERGED:g} on."
    )
    rates = [
        [f"{NAMES[optimizer]}, rate {rate:g}", *(cell(results, learner, optimizer, rate) for learner in ("STU", "LRU"))]
        for optimizer, rate in dict.fromkeys((row["optimizer"], row["rate"]) for row in results["trainings"])
    ]
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
        [
            f"{form}, {label}",
            f"{sigma:g}",
            *(shown(row[key]) for row in results["filters"] if (row["form"], row["sigma"]) == (form, sigma)),
        ]
        for sigma in NOISE
        for key, label in FITS.items()
        if sigma == 0 or key == "closed"
        for form in chain(*FORMS.values())
    ]
    closed = (
        f"Error against K: {results['sequences']} sequences of T = {results['filter_length']:,} are fitted in float64; "
        f"Adam at the best of {', '.join(f'{rate:g}' for rate in RATES)} (chosen on the test), "
        f"{results['descent']:,} steps:"
    )
    parts = [what, table(["optimizer", "STU", "LRU"], rates), steps, lru]
    parts += [table(["setting", "value", "error"], settings), closed, table(header, forms)]
    return page(results, *parts)


def plot(results: dict, path: Path) -> None:
    figure, axes = panels(4, width=4.2, height=4.2)
    trainings = [row for row in results["trainings"] if row["seed"] == 0]
    for learner, color in COLORS.items():
        winner = best(trainings, learner)
        for row in (row for row in trainings if row["learner"] == learner and row["curve"]):
            steps, _, errors = zip(*row["curve"], strict=True)
            style = {"linewidth": 0.8, "alpha": 0.5}
            if row is winner:
                style = {"linewidth": 2.2, "label": f"{learner}, best: {NAMES[row['optimizer']]}, {row['rate']:g}"}
            axes[0].plot(steps, errors, "-" if row["optimizer"] == "Adam" else "--", color=color, **style)
        for optimizer, mark in (("gradient", "o--"), ("Adam", "s-")):
            rows = [row for row in trainings if (row["learner"], row["optimizer"]) == (learner, optimizer)]
            good = [row for row in rows if converged(row["error"])]
            bad = [row["rate"] for row in rows if row not in good]
            rates, errors = ([row[key] for row in good] for key in ("rate", "error"))
            axes[1].plot(rates, errors, mark, color=color, label=f"{learner}, {NAMES[optimizer]}")
            axes[1].plot(bad, [3 if learner == "STU" else 2] * len(bad), "x", color=color)
    lowest = min((row["error"] for row in trainings if converged(row["error"])), default=1.0)
    for axis, label in ((axes[0], "steps"), (axes[1], "rate")):
        axis.set(xscale="log", yscale="log", xlabel=label, ylim=(lowest / 2, 4))
    axes[0].set(ylabel="relative error")
    axes[0].set_title("all rates; dashed: gradient descent", loc="left", fontsize=10)
    axes[1].set_title(f"after {results['steps']:,} steps; x: diverged", loc="left", fontsize=10)
    names = list(SETTINGS)[::-1]
    for row in results["settings"]:
        x, mark = (row["error"], "o") if converged(row["error"]) else (3, "x")
        axes[2].plot(x, names.index(row["setting"]), mark, color=COLORS["LRU"], alpha=0.7)
    winner = best(trainings, "STU")
    if winner:
        axes[2].axvline(winner["error"], color=COLORS["STU"], linewidth=1.6, label="STU, best")
        axes[2].legend(frameon=False, fontsize=8)
    axes[2].set(xscale="log", xlim=(None, 4), yticks=range(len(names)), yticklabels=names, xlabel="relative error")
    axes[2].set_title("LRU, one setting changed; x: diverged", loc="left", fontsize=10)
    for i, form in enumerate(chain(*FORMS.values())):
        rows = [row for row in results["filters"] if (row["form"], row["sigma"]) == (form, 0)]
        counts = [row["K"] for row in rows]
        axes[3].plot(counts, [row["closed"] for row in rows], "o-", color=f"C{i}", label=form)
        trained = [row["trained"] if converged(row["trained"]) else math.nan for row in rows]
        axes[3].plot(counts, trained, "s:", color=f"C{i}", markersize=4)
    axes[3].set(yscale="log", xlabel="K", ylabel="relative error")
    axes[3].set_title("least squares; dotted: Adam", loc="left", fontsize=10)
    for axis in (axes[0], axes[1], axes[3]):
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
            **{key: getattr(size, key) for key in KEPT},
            "rate": rate,
            "trainings": trainings,
            "settings": over_settings(size, rate),
            "filters": over_filters(size),
        }
    finish("marginal_lds", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
