"""Shared against separate STU branches at equal steps, in the hybrid and in an STU-only model.

    python scripts/bench/branches.py [--steps 400] [--runs runs/branches] [--output results/cpu]

A shared-branch STU sees even lags only: this trains the four models of that question on the
embedded corpus, with the quickstart's settings and data order, and compares their losses. Runs that are finished are
not trained again.
"""

from pathlib import Path

import yaml
from trained import CONFIG, STRETCH, train

from flash_stu.arguments import integer, output_directory
from flash_stu.devices import default_device
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.figures import save_figure
from flash_stu.results import environment, finish, page, panels, table

KINDS = {"hybrid": ["linear_attention", "sliding_attention"], "STU only": ["linear_attention"]}


def compare(steps: int, runs: Path) -> list[dict]:
    """The losses of the four models."""
    layers = yaml.safe_load(Path(CONFIG).read_text())["model"]["num_hidden_layers"]
    rows = []
    for kind, pattern in KINDS.items():
        for branches in ("shared", "separate"):
            run = runs / f"{kind.replace(' ', '-').lower()}-{branches}-{steps}"
            types = [pattern[i % len(pattern)] for i in range(layers)]
            losses = train(run, steps, {"model.stu_branches": branches, "model.layer_types": types})
            rows.append({"model": kind, "branches": branches, **losses})
    return rows


def render(results: dict) -> str:
    """One table of the four models."""
    what = f"{results['steps']} steps of {CONFIG} on the embedded corpus; losses in nats per byte."
    header = ["model, branches", "validation loss", f"training loss, last {STRETCH} steps"]
    rows = [
        [f"{row['model']}, {row['branches']}", f"{row['validation']:.4f}", f"{row['curve'][-1][1]:.4f}"]
        for row in results["rows"]
    ]
    return page(results, what, table(header, rows))


def plot(results: dict, path: Path) -> None:
    figure, (axes,) = panels()
    for row in results["rows"]:
        color, style = f"C{list(KINDS).index(row['model'])}", "--" if row["branches"] == "shared" else "-"
        label = f"{row['model']}, {row['branches']}"
        axes.plot(*zip(*row["curve"], strict=True), style, color=color, linewidth=1.6, label=label)
        axes.plot(results["steps"], row["validation"], "o", color=color, markerfacecolor="white", clip_on=False)
    axes.set(xlabel="step", ylabel="training loss, nats per byte")
    axes.set_title("circles: validation loss at the end", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--steps", type=integer(), default=400)
    parser.add_argument(
        "--runs", type=output_directory, default="runs/branches", metavar="DIR", help="where the run directories are"
    )
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write branches.json and .png there")
    args = parser.parse_args()
    results = {"environment": environment(default_device()), "steps": args.steps}
    results["rows"] = compare(args.steps, Path(args.runs))
    finish("branches", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
