"""AdamW against Muon at equal steps on the embedded corpus, each at its best learning rate of a few.

    python scripts/bench/optimizers.py [--steps 400] [--sweep-steps 150] [--rates 1e-3 3e-3 1e-2 3e-2]
        [--runs runs/optimizers] [--output results/cpu]

The quickstart's model with shared branches, its settings and data order; only the optimizer and its peak learning rate
differ. Both sweep the
same rates in short runs, then train the full number of steps at the best one. Runs that are finished are not trained
again.
"""

from argparse import Namespace
from pathlib import Path

from flash_stu.arguments import integer, number, output_directory
from flash_stu.devices import default_device
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.figures import save_figure
from flash_stu.results import environment, finish, page, panels, table
from flash_stu.training.trial import run_trial

CONFIG = "configs/quickstart.yaml"
OPTIMIZERS = ("adamw", "muon")


def compare(args: Namespace) -> list[dict]:
    """Both optimizers: their sweeps, and the long run at the best rate."""

    def run(name: str, rate: float, steps: int) -> dict:
        folder = Path(args.runs) / f"{name}-{rate:g}-{steps}"
        settings = ["model.stu_branches=shared", f"optimizer.name={name}", f"optimizer.learning_rate={rate:g}"]
        return run_trial(CONFIG, folder, steps, settings)

    rows = []
    for name in OPTIMIZERS:
        sweep = [[rate, run(name, rate, args.sweep_steps)["validation"]] for rate in args.rates]
        best, _ = min(sweep, key=lambda pair: pair[1])
        rows.append({"optimizer": name, "sweep": sweep, "best": best, **run(name, best, args.steps)})
    return rows


def render(results: dict) -> str:
    """One table: the sweeps, and the long runs."""
    what = f"{CONFIG} with shared branches on the embedded corpus; validation losses in nats per byte."
    header = ["optimizer", *(f"{rate:g}, {results['sweep_steps']} steps" for rate, _ in results["rows"][0]["sweep"])]
    rows = [
        [row["optimizer"], *(f"{loss:.4f}" for _, loss in row["sweep"]), f"{row['best']:g}", f"{row['validation']:.4f}"]
        for row in results["rows"]
    ]
    return page(results, what, table([*header, "best rate", f"{results['steps']} steps at it"], rows))


def plot(results: dict, path: Path) -> None:
    figure, (sweep, curve) = panels(2, 5)
    for row in results["rows"]:
        sweep.plot(*zip(*row["sweep"], strict=True), marker="o", markersize=4, label=row["optimizer"])
        curve.plot(*zip(*row["curve"], strict=True), label=f"{row['optimizer']}, {row['best']:g}")
    sweep.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss, nats per byte")
    sweep.set_title(f"after {results['sweep_steps']} steps", loc="left", fontsize=10)
    curve.set(xlabel="step", ylabel="training loss, nats per byte")
    curve.set_title("at the best rate", loc="left", fontsize=10)
    for axes in (sweep, curve):
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--steps", type=integer(), default=400)
    parser.add_argument("--sweep-steps", type=integer(), default=150)
    parser.add_argument(
        "--rates",
        type=number(0, 1e3, above=True),
        nargs="+",
        default=[1e-3, 3e-3, 1e-2, 3e-2],
        help="peak learning rates",
    )
    parser.add_argument(
        "--runs", type=output_directory, default="runs/optimizers", metavar="DIR", help="where the run directories are"
    )
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write optimizers.json and .png there")
    args = parser.parse_args()
    results = {"environment": environment(default_device()), "steps": args.steps, "sweep_steps": args.sweep_steps}
    results["rows"] = compare(args)
    finish("optimizers", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
