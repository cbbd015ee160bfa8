"""Long Range Arena: STU, AR-STU, distilled, attention, Mamba-2 and S5 on long sequences that are not text.

    python scripts/experiments/lra.py [--task TASK] [--model MODEL] [--config FILE] [--quick | --full]
        [--data-dir DIR] [--runs DIR] [--output results/experiments] [section.key=value ...]

Every task has its settings in configs/experiments/lra/TASK.yaml: the papers' sizes, for --full, and in `reduced` what
two CPU cores do. ListOps and Pathfinder are generated; text and image come from the hub, or like retrieval from
--data-dir. "lds" is the STU distilled, without further training. Trainings have a process of their own, with one
thread on a CPU; one that was stopped goes on, one that is finished is not trained again.

Source: Tay et al. 2021 (arXiv 2011.04006) for the tasks; Agarwal et al. 2023 (2312.06837), Table 2, for STU and AR-STU.
"""

import os
import statistics
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flash_stu.arguments import input_directory, input_file, integer, output_directory
from flash_stu.devices import default_device
from flash_stu.errors import UserError, run_cli
from flash_stu.figures import save_figure
from flash_stu.results import environment, experiment_parser, finish, page, panels, spread, table

CONFIGS = Path(__file__).parents[2] / "configs" / "experiments" / "lra"
TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
GENERATED = ("listops", "pathfinder")
NAMES = {
    "stu": "STU",
    "ar_stu": "AR-STU",
    "lds": "STU distilled",
    "attention": "Transformer",
    "mamba2": "Mamba-2, one way",
    "s5": "S5",
}
PUBLISHED = {  # percent; medians of 5, Spectral State Space Models (arXiv 2312.06837), Table 2
    "S4": (59.60, 86.82, 90.90, 88.65, 94.20, 96.35),
    "LRU": (60.2, 89.4, 89.9, 89, 95.1, 94.2),
    "STU": (61.04, 90.48, 90.40, 83.73, 91.70, 89.71),
    "AR-STU, k_y = 2": (61.14, 90.47, 90.52, 86.56, 93.85, 90.49),
    "AR-STU, k_y = 32": (57.66, 88.51, 87.39, 91.34, 95.45, 93.24),
}
CHANCE = {"listops": 10.0, "text": 50.0, "retrieval": 50.0, "image": 10.0, "pathfinder": 50.0, "pathx": 50.0}
SIZES = {"quick": (1, 1), "default": (1, 2), "full": (5, 1)}  # seeds and processes


def main() -> None:
    args = parse()
    seeds, processes = SIZES[args.size]
    seeds, processes = args.seeds or seeds, args.processes or processes
    results = {"environment": environment(default_device()) | {"threads": 1}, "size": args.size, "seeds": seeds}
    results |= {"settings": args.settings}
    with TemporaryDirectory() as folder:
        runs = Path(folder if args.size == "quick" else args.runs)
        results["rows"] = measure(args, runs, seeds, processes)
    finish("lra", results, render, plot, args.output)


def parse() -> Namespace:
    """Returns the command line."""
    parser = experiment_parser(__doc__, "lra")
    add = parser.add_argument
    add("--task", action="append", choices=TASKS, help="may be repeated (default: listops and pathfinder)")
    add("--model", action="append", choices=NAMES, help="may be repeated (default: all)")
    add("--config", type=input_file, metavar="FILE", help="settings of the one task, instead of its own file")
    add("--data-dir", type=input_directory, metavar="DIR", help="where text, retrieval or image lies")
    add("--runs", type=output_directory, metavar="DIR", default="runs/lra", help="(default: %(default)s)")
    add("--seeds", type=integer(1, 1000), metavar="N", help="trainings of each model, in place of the size's")
    add("--processes", type=integer(1, 256), metavar="N", help="trainings beside each other, in place of the size's")
    add("settings", nargs="*", metavar="section.key=value", help="settings that replace the config's")
    args = parser.parse_intermixed_args()
    args.task, args.model = args.task or list(GENERATED), args.model or _installed()
    if args.config and len(args.task) > 1:
        raise UserError(f"--config {args.config} has the settings of one task: name it by --task")
    return args


def _installed() -> list[str]:
    if find_spec("s5"):
        return list(NAMES)
    print("s5 is left out: it needs the package s5-pytorch, pip install 'flash-stu[experiments]'", flush=True)
    return [name for name in NAMES if name != "s5"]


def measure(args: Namespace, runs: Path, seeds: int, processes: int) -> list[dict]:
    """Returns a row of every task, model and seed; those distilled come last, since they need the others."""
    from lra_data import load
    from lra_settings import read

    settings: dict[str, Any] = {
        task: read(args.config or CONFIGS / f"{task}.yaml", args.size, args.settings) for task in args.task
    }
    for task, found in settings.items():
        if found.task != task:
            raise UserError(f"--config {args.config} is of task {found.task}; --task says {task}")
    models = [name for name in NAMES if name in args.model or (name == "stu" and "lds" in args.model)]
    models.sort(key=lambda name: name == "lds")
    work: list[Any] = []
    for name, task, seed in [(n, t, s) for n in models for t in args.task for s in range(seeds)]:
        place = runs / f"{task}-{args.size}" / f"{'stu' if name == 'lds' else name}-{seed}"
        work.append((settings[task], task, name, seed, place, args.data_dir))
    for task in args.task:
        load(settings[task], args.data_dir, runs / f"{task}-{args.size}")  # once, and before anything is trained
    rows = []
    if args.size == "quick":
        return [one(*item) for item in work]
    if not torch.cuda.is_available():
        os.environ["OMP_NUM_THREADS"] = "1"
    # a process for each training, so that the memory of each can be told
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        for stage in (False, True):
            for future in [pool.submit(one, *item) for item in work if (item[2] == "lds") == stage]:
                rows.append(future.result())
                print(f"{rows[-1]['task']}, {rows[-1]['model']}: {rows[-1]['accuracy']:.2f} %", flush=True)
    return rows


def one(settings: Any, task: str, name: Any, seed: int, run: Path, data_dir: str | None) -> dict:
    """Train and test one model in the process that this runs in; see lra_training."""
    from lra_training import test_distilled, train
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = test_distilled(settings, run, data_dir) if name == "lds" else train(settings, name, seed, run, data_dir)
    return {"task": task, "model": name, "seed": seed, **found}


def render(results: dict) -> str:
    """A table of accuracies for all tasks, published rows last, and one of costs for each task."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in results["rows"])]
    cells = []
    for model, name in NAMES.items():
        found = [_rows(results, task, model) for task in tasks]
        if any(found):
            cells.append([name, *(_accuracies(rows) for rows in found)])
    cells.append(["chance", *(f"{CHANCE[task]:.2f}" for task in tasks)])
    for name, values in PUBLISHED.items():
        by_task: dict[str, float] = dict(zip(TASKS, values, strict=True))
        cells.append([f"published, full size: {name}", *(f"{by_task[task]:.2f}" for task in tasks)])
    parts = [
        f"Accuracy on the test split in percent; size: {results['size']}, seeds: {results['seeds']}.",
        table(["model", *tasks], cells),
    ]
    for task in tasks:
        parts += [f"{task}: parameters, training, and the most memory that its process held:", _costs(results, task)]
        if rows := _rows(results, task, "lds"):
            differ, logits = max(row["differ"] for row in rows), max(row["logits"] for row in rows)
            parts.append(
                f"Distilled to {rows[0]['states']} states in {max(row['seconds'] for row in rows):.1f} s: {differ} "
                f"answers of the test split differ from the STU's, scores by {logits:.1e} of the largest."
            )
    return page(results, *parts)


def _rows(results: dict, task: str, model: str) -> list[dict]:
    return [row for row in results["rows"] if (row["task"], row["model"]) == (task, model)]


def _accuracies(rows: list[dict]) -> str:
    return spread([row["accuracy"] for row in rows], 1) if rows else ""


def _costs(results: dict, task: str) -> str:
    cells = []
    for model, name in NAMES.items():
        if (rows := _rows(results, task, model)) and model != "lds":
            median = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key not in _TEXT}
            cells.append(
                [
                    name,
                    f"{rows[0]['parameters']:,}",
                    f"{median['epochs']:g}",
                    f"{median['seconds']:,.0f}",
                    f"{median['tokens_per_second']:,.0f}",
                    f"{median['memory'] / 2**30:.2f}",
                ]
            )
    return table(["model", "parameters", "epochs", "seconds", "tokens/s", "GiB"], cells)


_TEXT = ("task", "model", "validation")


def plot(results: dict, path: Path) -> None:
    tasks = [task for task in TASKS if any(row["task"] == task for row in results["rows"])]
    figure, axes = panels(len(tasks), 6)
    for place, task in zip(axes, tasks, strict=True):
        for number, (model, name) in enumerate(NAMES.items()):
            for row in _rows(results, task, model):
                label = name if row["seed"] == 0 else None
                if model == "lds":
                    place.axhline(row["accuracy"], color="black", linestyle=":", linewidth=1.2, label=label)
                else:
                    seconds = [row["seconds"] * epoch / row["epochs"] for epoch, _ in row["validation"]]
                    values = [value for _, value in row["validation"]]
                    place.plot(seconds, values, ".-", color=f"C{number}", linewidth=1.4, label=label)
        place.axhline(CHANCE[task], color="gray", linewidth=0.8)
        place.set(xlabel="seconds of training", ylabel="accuracy on the validation split, %")
        place.set_title(f"{task}; gray: chance; dotted: test split", loc="left", fontsize=10)
        place.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
