"""Identifying a linear system from one noisy trajectory, SpectraLDS Fig. 1: error against steps and CPU seconds.

    python scripts/experiments/identification.py [--quick | --full] [--output results/experiments]

Two parts. Learning curves: SpectraLDS's methods (spectral, grid, refine; closed form) beside an STU, an LDS by
descent, an LRU, an S4D-style system, Mamba-2 and a small Transformer, all on the same trajectory, with and without
noise; every learner's optimizer and rate were chosen on a trajectory of another seed. And a table of the closed forms,
Ho-Kalman, ARX and nfoursid's subspace method (if it is installed) among them, at four noise levels.

Errors are squared errors on a fresh sequence without noise, over the outputs' power (rel) or over the variance of the
training data's noise (excess). Seconds are those of one thread of the CPU. Figures over seeds are geometric means.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classical import Simulate
from classical import methods as classical_methods
from learners import LDS, LRU, S4D, STU, Network, descend, each, spaced
from scipy.stats import t as student
from torch import nn

from flash_stu.errors import run_cli
from flash_stu.figures import save_figure
from flash_stu.results import environment, experiment_parser, finish, page, panels, table
from spectralds import identify
from spectralds.fit import few_threads
from spectralds.identification.options import METHODS
from spectralds.identification.systems import Trial, dense, marginal, slow, trial


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        length: of the learning curves' trajectories; steps: of a training; seeds: of them.
        states: of LDS, LRU and S4D.
        network_steps, network_seeds: of Mamba-2 and the Transformer.
        systems: of the table; table_length: of its trajectories; table_seeds: of them.
        slow_seeds: of nfoursid's method.
        processes: that share the work.
    """

    length: int
    steps: int
    seeds: int
    states: int
    network_steps: int
    network_seeds: int
    systems: tuple[str, ...]
    table_length: int
    table_seeds: int
    slow_seeds: int
    processes: int = 2


SIZES = {
    "quick": Size(64, 6, 2, 4, 2, 1, ("marginal",), 128, 2, 0, processes=1),
    "default": Size(1024, 300, 5, 64, 40, 1, ("marginal", "dense"), 4096, 8, 1),
    "full": Size(1024, 4000, 8, 64, 1000, 8, ("marginal", "dense", "slow"), 4096, 8, 8),
}
SYSTEMS: dict[str, Callable[[int], Any]] = {"marginal": lambda _seed: marginal(), "dense": dense, "slow": slow}
CURVES = ("marginal", "dense")
NOISE = (0.0, 0.1)  # of the curves, over the outputs' standard deviation
TABLE_NOISE = (0.0, 0.01, 0.1, 0.5)
SUBSPACE = "subspace (nfoursid)"
DESCENT = "LDS by descent"  # as SpectraLDS begins; "A uniform": the eigenvalues are drawn from (-1, 1)
LEARNERS: dict[str, Callable[[Size], nn.Module]] = {
    "STU": lambda size: STU(size.length, 24, 3, 3),
    DESCENT: lambda size: LDS(size.states, 3, 3),
    f"{DESCENT}, A uniform": lambda size: LDS(size.states, 3, 3, uniform=True),
    "LRU": lambda size: LRU(size.states, 3, 3),
    "S4D": lambda size: S4D(size.states, 3, 3),
    "Mamba-2": lambda _: Network("mamba2", 3, 3),
    "Transformer": lambda _: Network("transformer", 3, 3),
}
NETWORKS = ("Mamba-2", "Transformer")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"Adagrad": torch.optim.Adagrad, "Adam": torch.optim.Adam}
CHOICES = {  # optimizer and rate
    "STU": (("Adagrad", 1.0), ("Adam", 0.01), ("Adam", 0.1)),
    **dict.fromkeys((DESCENT, f"{DESCENT}, A uniform", "LRU", "S4D"), (("Adam", 1e-2), ("Adam", 3e-2))),
    **dict.fromkeys(NETWORKS, (("Adam", 1e-3), ("Adam", 5e-3))),
}
LOWEST = 1e-12  # of the picture
TUNING = 100  # the seed on which the rates are chosen
TUNING_NOISE = 0.1
COLORS = {name: f"C{i}" for i, name in enumerate(LEARNERS)}
MARKS = dict(zip(METHODS, (("s", "black"), ("^", "dimgray"), ("*", "crimson")), strict=True))


def train(size: Size, name: str, data: Trial, seed: int, choice: tuple[str, float]) -> list[list[float]]:
    """Returns a learner's curve of [steps, CPU seconds, rel]; channels are scaled to root mean square one."""
    torch.manual_seed(seed)
    learner = LEARNERS[name](size)
    scale = data.outputs.square().mean(dim=0).sqrt()
    inputs, outputs, fresh = data.inputs[None], (data.outputs / scale)[None], data.fresh_inputs[None]

    def error(learner: nn.Module) -> float:
        return _relative(data, (learner(fresh)[0] * scale).numpy())

    steps = size.network_steps if name in NETWORKS else size.steps
    optimizer = OPTIMIZERS[choice[0]](learner.parameters(), lr=choice[1])
    return descend(learner, optimizer, lambda _: (inputs, outputs), steps, spaced(steps, 20), error)


def curves_of(size: Size, system: str, name: str) -> list[dict]:
    """Returns the trainings of a learner on every noise and seed, with the rate chosen beforehand."""
    tuning = trial(SYSTEMS[system](TUNING), size.length, TUNING_NOISE, TUNING)
    ends = {choice: train(size, name, tuning, TUNING, choice)[-1:] for choice in CHOICES[name]}
    choice = min(ends, key=lambda choice: ends[choice][0][2] if ends[choice] else np.inf)
    rows = []
    for sigma in NOISE:
        for seed in range(size.network_seeds if name in NETWORKS else size.seeds):
            data = trial(SYSTEMS[system](seed), size.length, sigma, seed)
            row = {"system": system, "sigma": sigma, "learner": name, "optimizer": choice[0], "rate": choice[1]}
            rows.append({**row, "seed": seed, "curve": train(size, name, data, seed, choice)})
    return rows


def closed_forms(system: str, sigma: float, length: int, seeds: int, slow_seeds: int) -> list[dict]:
    """Returns the errors and CPU seconds of every closed form on one system and noise."""
    ours = {name: lambda u, y, name=name: identify(u, y, method=name).simulate for name in METHODS}
    rows = []
    for seed in range(seeds):
        data = trial(SYSTEMS[system](seed), length, sigma, seed)
        for name, method in (ours | classical_methods()).items():
            if name != SUBSPACE or seed < slow_seeds:
                rows.append({"system": system, "sigma": sigma, "method": name, "seed": seed, **_run(method, data)})
    return rows


def _run(method: Callable[[np.ndarray, np.ndarray], Simulate], data: Trial) -> dict:
    began = time.process_time()
    simulate = method(data.inputs.numpy(), data.outputs.numpy())
    seconds = time.process_time() - began
    with np.errstate(over="ignore", invalid="ignore"):
        rel = _relative(data, simulate(data.fresh_inputs.numpy()))
    noise = float(data.noise_variance.sum())
    over_noise = _power(data) / noise if noise else None
    return {"seconds": seconds, "rel": rel if np.isfinite(rel) else None, "power_over_noise": over_noise}


def _power(data: Trial) -> float:
    return float(data.fresh_outputs.square().mean(dim=0).sum())


def _relative(data: Trial, found: np.ndarray) -> float:
    return float(np.square(found - data.fresh_outputs.numpy()).mean(axis=0).sum()) / _power(data)


def band(values: list[float]) -> tuple[float, float, float]:
    """Returns a geometric mean and its 95 % confidence interval, by Student's t of the logarithms."""
    logs = np.log(np.maximum(values, 1e-300))
    half = 0.0
    if len(logs) > 1:
        half = float(student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs)))
    return float(np.exp(logs.mean())), float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))


def shown(values: list[float | None], interval: bool = False) -> str:
    """Returns a geometric mean in a table, and its interval if there are several values."""
    if not values:
        return ""
    if any(value is None for value in values):
        return "diverged"
    middle, low, high = band([value for value in values if value is not None])
    return f"{middle:.1e} ({low:.0e}-{high:.0e})" if interval and len(values) > 1 else f"{middle:.1e}"


def average(curves: list[list[list[float]]]) -> tuple[list[float], list[float], list[tuple[float, float, float]]]:
    """Returns steps, mean CPU seconds and bands of the errors of several curves, as far as all of them go."""
    points = list(zip(*curves, strict=False))
    steps, seconds = [point[0][0] for point in points], [float(np.mean([c[1] for c in point])) for point in points]
    return steps, seconds, [band([curve[2] for curve in point]) for point in points]


def _ends(results: dict, system: str, sigma: float, learner: str) -> list[dict]:
    return [
        row for row in results["curves"] if (row["system"], row["sigma"], row["learner"]) == (system, sigma, learner)
    ]


def _points(results: dict, system: str, sigma: float, method: str, key: str = "points") -> list[dict]:
    return [row for row in results[key] if (row["system"], row["sigma"], row["method"]) == (system, sigma, method)]


def render(results: dict) -> str:
    """The ends of the curves, how far the LDS by descent is behind, and the table of closed forms."""
    what = (
        f"One trajectory of T = {results['length']:,}; {results['seeds']} seeds, {results['network_seeds']} of "
        f"{' and '.join(NETWORKS)}; {results['steps']:,} steps, {results['network_steps']:,} of the networks. "
        "Relative error without noise at the end: geometric mean (95 % interval)."
    )
    cases = [(system, sigma) for system in CURVES for sigma in NOISE]
    header = ["learner", "optimizer", *(f"{system}, noise {sigma:g}" for system, sigma in cases), "CPU s"]
    lines = []
    for name in LEARNERS:
        rows = [_ends(results, *case, name) for case in cases]
        chosen = ", ".join(dict.fromkeys(f"{row['optimizer']} {row['rate']:g}" for case in rows for row in case))
        cells = [shown([row["curve"][-1][2] if row["curve"] else None for row in case], True) for case in rows]
        seconds = [row["curve"][-1][1] for case in rows for row in case if row["curve"]]
        lines.append([name, chosen, *cells, shown(seconds)])
    for name in METHODS:
        rows = [_points(results, *case, name) for case in cases]
        cells = [shown([row["rel"] for row in case], True) for case in rows]
        lines.append([name, "closed form", *cells, shown([row["seconds"] for case in rows for row in case])])
    return page(results, what, table(header, lines), _against_descent(results), *_table_of_closed_forms(results))


def _against_descent(results: dict) -> str:
    """One line for each noise and way to begin: how far descent ends above each closed form, in which time."""
    lines = []
    for name, sigma in ((name, sigma) for name in LEARNERS if name.startswith(DESCENT) for sigma in NOISE):
        slow_way = [row["curve"][-1] for row in _ends(results, "marginal", sigma, name) if row["curve"]]
        parts = []
        for method in METHODS if slow_way else ():
            rows = [row for row in _points(results, "marginal", sigma, method) if row["rel"] is not None]
            error = band([end[2] for end in slow_way])[0] / band([row["rel"] for row in rows])[0]
            seconds = band([row["seconds"] for row in rows])[0] / band([end[1] for end in slow_way])[0]
            parts.append(f"{method} {error:,.2g} in {seconds:.2g} of its CPU time")
        if parts:
            lines.append(f"- {name}, noise {sigma:g}: {'; '.join(parts)}.")
    return "\n".join(["Error of descent over that of a closed form, marginal:", "", *lines]) if lines else ""


def _table_of_closed_forms(results: dict) -> list[str]:
    names = list(dict.fromkeys(row["method"] for row in results["table"]))
    seeds = f"{results['table_seeds']} seeds, {results['slow_seeds']} of nfoursid"
    parts = [f"Closed forms on one trajectory of T = {results['table_length']:,}; {seeds}. Geometric means:"]
    header = ["system, method", "rel, noise 0", *(f"excess, {sigma:g}" for sigma in TABLE_NOISE[1:]), "CPU s"]
    lines = []
    for system in dict.fromkeys(row["system"] for row in results["table"]):
        for name in names:
            rows = {sigma: _points(results, system, sigma, name, "table") for sigma in TABLE_NOISE}
            cells = [shown([row["rel"] for row in rows[0.0]])]
            for sigma in TABLE_NOISE[1:]:
                cells.append(shown([row["rel"] and row["rel"] * row["power_over_noise"] for row in rows[sigma]]))
            seconds = [row["seconds"] for several in rows.values() for row in several]
            lines.append([f"{system}, {name}", *cells, shown(seconds)])
    parts.append(table(header, lines))
    if SUBSPACE not in names:
        parts.append("nfoursid was not installed: its subspace method was left out.")
    return parts


def plot(results: dict, path: Path) -> None:
    cases = [(system, sigma) for system in CURVES for sigma in NOISE]
    figure, axes = panels(len(cases), width=4.2, height=4.0, rows=2)
    for column, (system, sigma) in enumerate(cases):
        above, below = axes[column], axes[column + len(cases)]
        for name, color in COLORS.items():
            steps, seconds, errors = average([row["curve"] for row in _ends(results, system, sigma, name)])
            middle, low, high = zip(*errors, strict=True) if errors else ((), (), ())
            for axis, xs in ((above, steps), (below, seconds)):
                axis.plot(xs, middle, color=color, linewidth=1.6, label=name)
                axis.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
        for name, (mark, color) in MARKS.items():
            rows = [row for row in _points(results, system, sigma, name) if row["rel"] is not None]
            error, seconds = (band([row[key] for row in rows])[0] for key in ("rel", "seconds"))
            level = max(error, LOWEST)
            above.axhline(level, color=color, linewidth=1.2, linestyle="-." if mark == "*" else ":")
            below.plot(seconds, level, mark, color=color, markersize=10 if mark == "*" else 7, label=name)
            if level > error:
                place = (0.03, level * 1.6)
                above.text(
                    *place, f"{name}: {error:.0e}", color=color, fontsize=8, transform=above.get_yaxis_transform()
                )
                below.annotate(f"{error:.0e}", (seconds, level), (6, 5), textcoords="offset points", fontsize=8)
        for axis, label in ((above, "steps"), (below, "CPU seconds")):
            axis.set(xscale="log", yscale="log", xlabel=label, ylim=(None, 5))
        above.set_title(f"{system}, noise {sigma:g}", loc="left", fontsize=10)
    axes[0].set_ylabel("relative error")
    axes[len(cases)].set_ylabel("relative error")
    axes[len(cases)].legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def main() -> None:
    args = experiment_parser(__doc__, "identification").parse_args()
    size = SIZES[args.size]
    kept = ("length", "steps", "seeds", "network_steps", "network_seeds", "table_length", "table_seeds", "slow_seeds")
    points = (size.length, size.seeds, 0)
    figures = (size.table_length, size.table_seeds, size.slow_seeds)
    jobs = {
        "curves": (curves_of, [(size, system, name) for system in CURVES for name in LEARNERS]),
        "points": (closed_forms, [(system, sigma, *points) for system in CURVES for sigma in NOISE]),
        "table": (closed_forms, [(system, sigma, *figures) for system in size.systems for sigma in TABLE_NOISE]),
    }
    with few_threads():
        results = {
            "environment": environment(torch.device("cpu")),
            "size": args.size,
            **{key: getattr(size, key) for key in kept},
            **{key: list(chain(*each(function, rows, size.processes))) for key, (function, rows) in jobs.items()},
        }
    finish("identification", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
