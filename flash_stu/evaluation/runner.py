"""Evaluate models on tasks and texts: check everything, load the tasks, then run model after model."""

import importlib.metadata
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flash_stu.devices import choose_device
from flash_stu.distributed import join, local_device, world_size
from flash_stu.errors import UserError
from flash_stu.evaluation import harness
from flash_stu.evaluation.compare import compare_all
from flash_stu.evaluation.definitions import resolve_tasks
from flash_stu.evaluation.language_model import EvaluatedLM
from flash_stu.evaluation.models import Candidate, Job, Session, check_model_dir, label_models
from flash_stu.evaluation.report import format_report, result_files, write_results
from flash_stu.evaluation.resume import Store, item_file
from flash_stu.evaluation.text import file_hash, score_text

_TIMEOUT = timedelta(days=1)  # a process waits for the slowest; torchrun ends all when one fails
_PACKAGES = ("flash_stu", "lm_eval", "torch", "transformers", "datasets", "tokenizers")


def evaluate(
    model_dirs: Sequence[str | Path],
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    output: str | Path | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    progress: bool = True,
    include_path: str | Path | None = None,
    texts: Sequence[str | Path] = (),
    text_length: int | None = None,
    text_column: str = "text",
) -> dict[str, Any]:
    """Run tasks of lm-eval-harness on models, and measure them on texts.

    Under torchrun the processes share the work, and each returns the same.

    Args:
        model_dirs: transformers model directories, training runs (their final/ is taken) or RUN/checkpoints/step-N.
        tasks: names of tasks, groups or suites; None for those that need no download, or for none if there are texts.
        limit: score only so many items of each task, and so many windows of each text.
        data_dir: a local mirror of data sets (see scripts/fetch_eval_data.py); None for the hub or its cache.
        output: folder for results.json, the tables and the pictures, rewritten after every task; what it holds already
            is not done again. None to write nothing.
        batch_size: sequences per forward pass; None for as many as fit.
        device: "cpu", "cuda" or "cuda:N"; None for the GPU if there is one.
        progress: print a line per finished task and show how long the current one will still take.
        include_path: a folder with task definitions of the user's own.
        texts: .jsonl or .parquet files, or any files of text.
        text_length: tokens in a window of a text; None for twice a model's trained length.
        text_column: parquet column or jsonl key of the text.

    Returns:
        the content of results.json.

    Raises:
        UserError: for bad input, before any model is loaded wherever that can be known.
    """
    specs, published = ([], {}) if tasks is None and texts else resolve_tasks(tasks)
    labels = label_models(model_dirs)
    files = [Path(path) for path in texts]
    counts = {"limit": limit, "batch_size": batch_size, "text_length": text_length}
    _check_settings(counts, {"data_dir": data_dir, "include_path": include_path}, files)
    choose_device(device)
    store = Store(None if output is None else Path(output))
    names = [spec.name for spec in specs] + [path.name for path in files]
    written = result_files(path.name for path in files)
    written += [item_file(label, name) for label in labels for name in names]
    store.check(written)
    directories = [check_model_dir(path) for path in model_dirs]

    with join(_own_device(device), "gloo", _TIMEOUT) as world:
        say = print if progress and world.is_main else lambda *_, **__: None
        if specs:
            say(f"loading {', '.join(spec.name for spec in specs)}", flush=True)
        with world.main_first():
            loaded = harness.load_tasks(specs, _path(data_dir), _path(include_path))
        results = {
            "versions": _versions(),
            "settings": {
                "tasks": [spec.model_dump() for spec in specs],
                "limit": limit,
                "data_dir": _text(data_dir),
                "include_path": _text(include_path),
                "texts": [str(path) for path in files],
                "text_length": text_length,
                "text_column": text_column,
                "batch_size": batch_size,
                "device": str(world.device),
                "processes": world.size,
            },
            "models": {},
            "published": published,
            "comparisons": [],
        }
        jobs = [_task_job(task, limit) for task in loaded]
        jobs += [_text_job(path, text_column, text_length, limit) for path in files]
        printing = progress and world.is_main
        session = Session(store, world, batch_size, printing, results["versions"])
        with store.holding(written) if world.is_main else nullcontext():
            models = [Candidate(label, path, jobs, session) for label, path in zip(labels, directories, strict=True)]
            items = {}
            for model in models:
                results["models"][model.label], items[model.label] = model.row, model.items
                for job in jobs:
                    new = model.measure(job)
                    results["comparisons"] = compare_all(results["models"], items)
                    if new and world.is_main:
                        store.add(partial(write_results, results=results))
                model.close()
            if world.is_main:
                store.add(partial(write_results, results=results))
        say(f"\n{format_report(results)}")
    return results


def _task_job(task: harness.LoadedTask, limit: int | None) -> Job:
    def run(lm: EvaluatedLM) -> tuple[dict[str, Any], list[dict]]:
        result = harness.run_task(lm, task, limit)
        return result, result.pop("samples")

    key = {"task": task.spec.model_dump(), "prompts and data": task.config_hash, "limit": limit}
    return Job("tasks", task.spec.name, key, run)


def _text_job(path: Path, column: str, length: int | None, limit: int | None) -> Job:
    key = {"text": file_hash(path), "text_column": column, "text_length": length, "limit": limit}
    return Job("texts", path.name, key, lambda lm: (score_text(lm, path, column, length, limit), []))


def _own_device(name: str | None) -> torch.device:
    """Returns the device of this process: of several each takes the GPU of its local rank."""
    chosen = choose_device(name)
    if world_size() == 1 or chosen.type != "cuda":
        return chosen
    if chosen.index is not None:
        raise UserError(f"device is {name!r} for {world_size()} processes; allowed: cpu, cuda")
    return local_device("cuda")


def _check_settings(counts: dict[str, int | None], folders: dict[str, str | Path | None], texts: list[Path]) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    for name, folder in folders.items():
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"{name} {folder} is not a directory")
    for path in texts:
        if not path.is_file():
            raise UserError(f"texts {path}: no such file")
        if [other.name for other in texts].count(path.name) > 1:
            raise UserError(f"texts {path}: another file has the same name; rename one")


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _text(value: str | Path | None) -> str | None:
    return None if value is None else str(value)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "not installed"
    return found
