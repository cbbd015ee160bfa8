"""Theorem 1 of SpectraLDS: how well h systems of dimension one reproduce the spectral filters, and the theorem's bound.

    python scripts/experiments/theorem_1.py [--quick | --full] [--output results/experiments]

For each number h of decays: the largest singular value lambda_max of the inverse of their spectral representation, the
bound lambda_max h exp(-K / log L) with c = 1, and two errors. That of the inverse itself is what the theorem bounds,
Algorithm 2 of the paper; that of the regression on the same systems is what distill.py uses. Decays are those of our
closed forms, those that greedy selection takes from a sample, and random ones, in several draws. All in float64.
"""

import math
import statistics
from pathlib import Path

import torch

from flash_stu.errors import run_cli
from flash_stu.figures import save_figure
from flash_stu.filters.exponentials import powers
from flash_stu.filters.spectral import compute_filters
from flash_stu.results import environment, experiment_parser, finish, page, panels, table
from spectralds.balanced import balanced_nodes
from spectralds.bank import FilterBank, quadrature_nodes, slowest_and_fastest
from spectralds.fit import few_threads
from spectralds.sampled import sampled_nodes, spectral_representation, theorem_1

CLOSED = {"quadrature": quadrature_nodes, "balanced": balanced_nodes, "sampled, greedy": sampled_nodes}
RANDOM = "sampled, random"
SIZES = {  # filter length, filters, numbers of decays, draws
    "quick": (256, 8, (8, 16), 2),
    "default": (8192, 24, tuple(range(8, 81, 4)), 8),
    "full": (8192, 24, tuple(range(8, 161, 2)), 32),
}
QUANTITIES = {
    "lambda_max": "largest singular value",
    "lambda_max_h": "lambda_max h",
    "bound": "bound, c = 1",
    "inverse": "error of the inverse",
    "regression": "error of the regression",
}


def random_nodes(bank: FilterBank, count: int, seed: int) -> torch.Tensor:
    """Returns decays exp(-e^s), s uniform over the time constants that a filter can show, (count,)."""
    slowest, fastest = slowest_and_fastest(bank)
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (slowest + (fastest - slowest) * draws).exp().neg().exp()


def measure(bank: FilterBank, nodes: torch.Tensor) -> dict[str, float]:
    """Returns the quantities of one choice of decays; errors are Frobenius norms over that of the filters."""
    theorem = theorem_1(bank, nodes)
    inverse = torch.linalg.pinv(spectral_representation(bank, nodes))  # (filters, nodes)
    impulses = powers(nodes, torch.arange(bank.length, dtype=torch.float64))
    coefficients, _ = bank.solve(nodes, torch.finfo(torch.float64).eps)
    return {
        "lambda_max": theorem["lambda_max"],
        "lambda_max_h": theorem["lambda_max_h"],
        "bound": theorem["theorem_1_bound"],
        "inverse": float((bank.phi - impulses @ inverse.T).norm()) / bank.norm,
        "regression": bank.relative_error(nodes, coefficients),
    }


def rows(length: int, filters: int, counts: tuple[int, ...], draws: int) -> list[dict]:
    """Returns a row for each choice of decays and number of them, of random ones with every draw."""
    bank = FilterBank(compute_filters(length, filters, "hankel")[1])
    result = []
    with few_threads():
        for count in counts:
            for name, choose in CLOSED.items():
                result.append({"decays": name, "h": count, "draws": [measure(bank, choose(bank, count))]})
            random = [measure(bank, random_nodes(bank, count, seed)) for seed in range(draws)]
            result.append({"decays": RANDOM, "h": count, "draws": random})
    return result


def median(row: dict, quantity: str) -> float:
    """Returns the median of a quantity over the draws of a row."""
    return statistics.median(draw[quantity] for draw in row["draws"])


def render(results: dict) -> str:
    """Every quantity at some numbers of decays."""
    what = (
        f"{results['filters']} filters of length {results['length']:,}; "
        f"exp(-K / log L) = {math.exp(-results['filters'] / math.log(results['length'])):.3f}. "
        f"Random decays: median of {results['draws']} draws. Errors are relative."
    )
    counts = sorted({row["h"] for row in results["rows"]})
    shown = counts[:: max(1, len(counts) // 3)]
    lines = [
        [f"{row['decays']}, h = {row['h']}", *(f"{median(row, quantity):.1e}" for quantity in QUANTITIES)]
        for row in sorted(results["rows"], key=lambda row: [*CLOSED, RANDOM].index(row["decays"]))
        if row["h"] in shown
    ]
    return page(results, what, table(["decays", *QUANTITIES.values()], lines))


def plot(results: dict, path: Path) -> None:
    figure, axes = panels(4, width=4.2, height=4.2)
    for axis, quantity in zip(axes, ("lambda_max", "lambda_max_h", "inverse", "regression"), strict=True):
        for i, name in enumerate([*CLOSED, RANDOM]):
            mine = [row for row in results["rows"] if row["decays"] == name]
            counts = [row["h"] for row in mine]
            axis.plot(counts, [median(row, quantity) for row in mine], color=f"C{i}", linewidth=1.6, label=name)
            if name == RANDOM:
                low, high = ([pick(draw[quantity] for draw in row["draws"]) for row in mine] for pick in (min, max))
                axis.fill_between(counts, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
        axis.set(yscale="log", xlabel="h, decays of one sign")
        axis.set_title(QUANTITIES[quantity], loc="left", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    args = experiment_parser(__doc__, "theorem_1").parse_args()
    length, filters, counts, draws = SIZES[args.size]
    results = {
        "environment": environment(torch.device("cpu")),
        "size": args.size,
        "length": length,
        "filters": filters,
        "draws": draws,
        "rows": rows(length, filters, counts, draws),
    }
    finish("theorem_1", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
