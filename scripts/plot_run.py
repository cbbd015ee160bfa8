"""Draw the loss curves of one or several runs: python scripts/plot_run.py RUN [RUN ...] --output loss.png"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from flash_stu.arguments import input_directory, output_file
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.figures import check_figure_path, save_figure
from flash_stu.training.metrics import read_metrics
from flash_stu.training.run_config import load_config

_LARGEST = 1e300  # of a number that can be drawn


def plot_runs(runs: list[str | Path], output: str | Path) -> Path:
    """Draw training and validation loss over the tokens seen.

    Args:
        runs: run directories.
        output: the image to write; its ending chooses the format.

    Returns:
        output, as a path.

    Raises:
        UserError: for a directory without metrics, an ending that names no image format, or an image that cannot be
            written.
    """
    output = Path(output)
    check_figure_path(output, "--output")
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, (run, name) in enumerate(zip(runs, _labels([Path(run) for run in runs]), strict=True)):
        training, validation = read_losses(Path(run))
        color = f"C{index}"
        axes.plot(*zip(*training, strict=True), color=color, alpha=0.25, linewidth=0.7)
        axes.plot(*zip(*smooth(training), strict=True), color=color, linewidth=1.6, label=f"{name}: training")
        if validation:
            axes.plot(
                *zip(*validation, strict=True),
                color=color,
                linestyle="none",
                marker="o",
                markersize=5,
                markerfacecolor="white",
                markeredgewidth=1.5,
                label=f"{name}: validation ({validation[-1][1]:.3f} at the end)",
            )
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, output)
    return output


def read_losses(run: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Returns (tokens seen, loss) of every step, and of every validation, of a run.

    Raises:
        UserError: if the directory holds no run that has begun.
    """
    records = read_metrics(run / "metrics.jsonl")
    training, validation = (
        [(record["step"], record[key]) for record in records if _are_numbers(record, "step", key)]
        for key in ("loss", "validation_loss")
    )
    if not training:
        raise UserError(f"{run} is not a run directory with metrics; expected {run / 'metrics.jsonl'}")
    per_step = load_config(run / "config.yaml").train.global_batch_size
    return scaled(training, per_step), scaled(validation, per_step)


def scaled(points: list[tuple[int, float]], factor: int) -> list[tuple[int, float]]:
    """Returns the points with the first coordinate multiplied."""
    return [(x * factor, y) for x, y in points]


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Returns the points averaged over the 2 % of all that lie around each, so that the curve does not lag behind."""
    reach = len(points) // 100
    smoothed: list[tuple[int, float]] = []
    for index, (x, _) in enumerate(points):
        values = [y for _, y in points[max(0, index - reach) : index + reach + 1]]
        smoothed.append((x, sum(values) / len(values)))
    return smoothed


def _are_numbers(record: dict, *keys: str) -> bool:
    return all(isinstance(record.get(key), int | float) and abs(record[key]) < _LARGEST for key in keys)


def _labels(runs: list[Path]) -> list[str]:
    """Returns the runs' names, or their paths where names repeat."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def main() -> None:
    """Parse the command line and draw."""
    parser = ArgumentParser(description="Draw the loss curves of one or several runs.")
    parser.add_argument("runs", type=input_directory, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--output", type=output_file, default="loss.png", help="image to write (default: %(default)s)")
    arguments = parser.parse_args()
    print(plot_runs(arguments.runs, arguments.output))


if __name__ == "__main__":
    matplotlib.use("Agg")
    raise SystemExit(run_cli(main))
