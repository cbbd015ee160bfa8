"""Results of the scripts in scripts/bench and scripts/experiments: their environment, tables, JSON and panels.

Such a script has three things: `main` measures and has an option --output DIR, `render` makes Markdown of the results,
`plot` a picture. Results are a dictionary with an "environment" and whatever else JSON keeps as it is, so that
scripts/bench/tables.py renders the file as the script rendered what it had measured.
"""

import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from flash_stu.arguments import output_directory
from flash_stu.errors import ArgumentParser
from flash_stu.files import write_text
from flash_stu.ops.backends import why_not


def environment(device: torch.device) -> dict:
    """Where figures come from: versions, device, threads."""
    cuda = device.type == "cuda"
    packages = [name for name in ("triton", "flashfftconv", "flash_attn", "liger") if why_not(name) is None]
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "packages": packages,
    }


def describe(environment: dict) -> str:
    """One line of it."""
    threads = f"{environment['threads']} threads" if environment["threads"] > 1 else "1 thread"
    versions = [f"torch {environment['torch']}", f"Python {environment['python']}", *environment["packages"]]
    return ", ".join([*versions, environment["device"], threads])


def _processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU ({capability})"


def spread(samples: list[float], scale: float = 1000) -> str:
    """Median (least-greatest) of the samples times `scale`: milliseconds, if those are seconds."""
    low, middle, high = (scale * value for value in (min(samples), statistics.median(samples), max(samples)))
    digits = 2 if middle < 1 else 1 if middle < 100 else 0
    if len(samples) == 1:
        return f"{middle:,.{digits}f}"
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right; empty columns are left out."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    cells = [[row[i] for i in kept] for row in (header, *rows)]
    align = ["left", *["right"] * (len(kept) - 1)]
    return tabulate(cells[1:], cells[0], "pipe", disable_numparse=True, colalign=align)


def experiment_parser(description: str | None, name: str) -> ArgumentParser:
    """Returns a parser of what every experiment takes: --quick or --full, and --output.

    Args:
        description: the script's docstring.
        name: of the files in the output folder.

    Its `size` is "default", "quick" (seconds in all) or "full" (the papers' sizes).
    """
    parser = ArgumentParser(description)
    sizes = parser.add_mutually_exclusive_group()
    for size, what in {"quick": "seconds in all, to try it", "full": "the papers' sizes"}.items():
        sizes.add_argument(f"--{size}", dest="size", action="store_const", const=size, default="default", help=what)
    parser.add_argument("--output", type=output_directory, metavar="DIR", help=f"write {name}.json and .png there")
    return parser


def page(results: dict, *parts: str) -> str:
    """Returns a page as every `render` does: where the figures come from, then its parts."""
    return "\n\n".join([describe(results["environment"]), *filter(None, parts)])


def finish(name: str, results: dict, render: Callable, plot: Callable, output: str | None) -> None:
    """The end of every such script: print its tables; with an output folder, leave NAME.json and NAME.png there."""
    print("\n" + render(results), flush=True)
    if output is None:
        return
    save(name, results, output)
    path = Path(output) / f"{name}.json"
    plot(results, path.with_suffix(".png"))
    print(f"\nwritten to {path} and {path.with_suffix('.png').name}")


def save(name: str, results: dict, output: str | None) -> None:
    """Leave what was measured so far in the output folder, if there is one, as NAME.json."""
    if output is not None:
        write_text(Path(output) / f"{name}.json", as_json(results))


def failure_cells(row: dict, columns: int) -> list[str]:
    """Cells of a row whose measurement failed: the reason under "failed", and nothing in the other columns."""
    return [row["failed"], *[""] * (columns - 1)]


def as_json(results: dict) -> str:
    """Results as JSON, of lists a line per item."""
    entries = []
    for key, value in results.items():
        shown = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            shown = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        entries.append(f" {json.dumps(key)}: {shown}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def panels(count: int = 1, width: float = 6.4, height: float = 4.6, rows: int = 1) -> tuple[Figure, list]:
    """A figure with `count` axes beside each other, in as many rows, of so many inches each; axes row by row."""
    figure = Figure(figsize=(width * count, height * rows), dpi=120, layout="constrained")
    grid = list(figure.subplots(rows, count, squeeze=False).flat)
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, linewidth=0.6)
    return figure, grid
