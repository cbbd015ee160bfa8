"""Evaluate models on tasks: check everything, load the tasks, then run model after model."""

import importlib.metadata
import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flash_stu.errors import UserError
from flash_stu.evaluation.model_directory import check_model_dir, config_hash, label_models
from flash_stu.evaluation.report import format_table, write_results
from flash_stu.evaluation.suite import resolve_tasks
from flash_stu.loading import default_device

_PACKAGES = ("flash_stu", "lm_eval", "torch", "transformers", "datasets", "tokenizers")


def evaluate(
    model_dirs: Sequence[str | Path],
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    output: str | Path | None = None,
    batch_size: int = 8,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run tasks of lm-eval-harness on models.

    Args:
        model_dirs: transformers model directories, or training runs (their final/ is taken).
        tasks: names of tasks, groups or suites; None for those that need no download.
        limit: score only so many items of each task.
        data_dir: a local mirror of data sets (see local_data.py); None for the hub.
        output: folder for results.json and table.md, rewritten after every model; None to write nothing.
        batch_size: sequences per forward pass.
        device: "cpu", "cuda" or "cuda:N"; None for the GPU if there is one.
        progress: print a line per finished task and, on a terminal, show a progress bar.

    Returns:
        the content of results.json.

    Raises:
        UserError: for bad input, before any model is loaded wherever that can be known.
    """
    specs = resolve_tasks(tasks)
    directories = [check_model_dir(path) for path in model_dirs]
    labels = label_models(model_dirs)
    _check_settings(directories, limit, data_dir, output, batch_size)
    device = _choose_device(device)

    # The harness takes seconds to import, so this waits until the arguments are known to be good.
    from flash_stu.evaluation.harness import load_tasks

    if progress:
        print(f"loading {', '.join(spec.name for spec in specs)}", flush=True)
    loaded = load_tasks(specs, Path(data_dir) if data_dir is not None else None)
    settings = {
        "tasks": [spec.model_dump() for spec in specs],
        "limit": limit,
        "data_dir": str(data_dir) if data_dir is not None else None,
        "batch_size": batch_size,
        "device": device,
    }
    results = {"versions": _versions(), "settings": settings, "models": {}}
    for label, directory in zip(labels, directories, strict=True):
        results["models"][label] = _evaluate_model(label, directory, loaded, limit, batch_size, device, progress)
        if output is not None:
            write_results(Path(output), results)
    if progress:
        print(f"\n{format_table(results)}")
    return results


def _evaluate_model(label, directory, tasks, limit, batch_size, device, progress) -> dict[str, Any]:
    """Load one model, run every task on it, and return what results.json says about it."""
    from flash_stu.evaluation.harness import quiet, run_task
    from flash_stu.evaluation.language_model import DirectoryLM

    started = time.perf_counter()
    with quiet(logging.ERROR):  # the harness warns about models that it did not load itself
        lm = DirectoryLM.load(directory, device, batch_size, progress)
    scores = {}
    for task in tasks:
        name = task.spec.name
        lm.title = f"{label} {name}"
        scores[name] = run_task(lm, task, limit)
        if progress:
            print(_summary(label, name, scores[name]), flush=True)
    return {
        "path": str(directory),
        "config_hash": config_hash(directory),
        "parameters": lm.model.num_parameters(),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "max_length": lm.max_length,
        "seconds": time.perf_counter() - started,
        "tasks": scores,
    }


def _check_settings(directories, limit, data_dir, output, batch_size) -> None:
    if not directories:
        raise UserError("no model to evaluate; give --model DIR")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; it must be at least 1")
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UserError(f"--data-dir {data_dir} is not a directory")
    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"--output {output} is not a directory")


def _choose_device(name: str | None) -> str:
    if name is None:
        return str(default_device())
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    allowed = ["cpu", *["cuda"] * bool(gpus), *gpus]
    if name not in allowed:
        raise UserError(f"--device is {name!r}; allowed here: {', '.join(allowed)}")
    return name


def _summary(label: str, name: str, task: dict) -> str:
    stderr = "" if task["stderr"] is None else f" ± {task['stderr']:.4f}"
    return (
        f"{label}  {name}  {task['metric']} {task['value']:.4f}{stderr}  "
        f"({task['items']} of {task['items_available']} items, {task['seconds']:.1f} s)"
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "not installed"
    return found
