"""Evaluate models on tasks and texts: check everything, load the tasks, then run model after model."""

import importlib.metadata
import logging
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from flash_stu.devices import choose_device, default_dtype
from flash_stu.distributed import World, join, local_device, world_size
from flash_stu.errors import UserError
from flash_stu.evaluation.comparison import compare
from flash_stu.evaluation.model_directory import check_model_dir, config_hash, content_hash, label_models
from flash_stu.evaluation.progress import Progress
from flash_stu.evaluation.report import format_report, warning
from flash_stu.evaluation.results import result_files, write_results
from flash_stu.evaluation.store import Store, item_file
from flash_stu.evaluation.suite import resolve_tasks

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
        data_dir: a local mirror of data sets (see local_data.py); None for the hub or its cache.
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
    _check_settings(labels, limit, data_dir, include_path, batch_size, files, text_length)
    choose_device(device)
    store = Store(None if output is None else Path(output))
    names = [spec.name for spec in specs] + [path.name for path in files]
    written = result_files(path.name for path in files)
    written += [item_file(label, name) for label in labels for name in names]
    store.check(written)
    directories = [check_model_dir(path) for path in model_dirs]

    with join(_own_device(device), "gloo", _TIMEOUT) as world:
        # The harness takes seconds to import, so this waits until the arguments are known to be good.
        from flash_stu.evaluation.harness import load_tasks

        say = print if progress and world.is_main else lambda *_, **__: None
        if specs:
            say(f"loading {', '.join(spec.name for spec in specs)}", flush=True)
        with world.main_first():
            loaded = load_tasks(specs, _path(data_dir), _path(include_path))
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
        items: dict[str, dict[str, list]] = {}
        evaluation = _Evaluation(store, world, batch_size, progress, results["versions"])
        with store.holding(written) if world.is_main else nullcontext():
            for label, directory in zip(labels, directories, strict=True):
                evaluation.find_all(label, directory, jobs)
            for label in labels:
                model, items[label] = evaluation.models[label], {}
                results["models"][label] = model
                for job in jobs:
                    new = evaluation.do(label, job, items[label])
                    _compare_all(results, items)
                    if new:
                        evaluation.write(results)
                evaluation.close_model()
            evaluation.write(results)
        say(f"\n{format_report(results)}")
    return results


class _Job:
    """Something to measure on a model.

    Attributes:
        kind: "tasks" or "texts", where results.json has it.
        name: what it is called there.
        key: what decides its result, besides model and versions.
        run: language model to (result, items).
    """

    def __init__(self, kind: str, name: str, key: dict[str, Any], run: Callable) -> None:
        self.kind, self.name, self.key, self.run = kind, name, key, run


def _task_job(task, limit: int | None) -> _Job:
    from flash_stu.evaluation.harness import run_task

    def run(lm):
        result = run_task(lm, task, limit)
        return result, result.pop("samples")

    key = {"task": task.spec.model_dump(), "prompts and data": task.config_hash, "limit": limit}
    return _Job("tasks", task.spec.name, key, run)


def _text_job(path: Path, column: str, length: int | None, limit: int | None) -> _Job:
    from flash_stu.evaluation.text import file_hash, score_text

    key = {"text": file_hash(path), "text_column": column, "text_length": length, "limit": limit}
    return _Job("texts", path.name, key, lambda lm: (score_text(lm, path, column, length, limit), []))


def _own_device(name: str | None) -> torch.device:
    """Returns the device of this process: of several each takes the GPU of its local rank."""
    chosen = choose_device(name)
    if world_size() == 1 or chosen.type != "cuda":
        return chosen
    if chosen.index is not None:
        raise UserError(f"--device is {name!r} for {world_size()} processes; allowed: cpu, cuda")
    return local_device("cuda")


class _Evaluation:
    """Models one after the other, each loaded only if something is left to measure on it."""

    def __init__(self, store, world: World, batch_size, progress, versions) -> None:
        self.store, self.world, self.batch_size = store, world, batch_size
        self.progress, self.versions = progress and world.is_main, versions
        self.models: dict[str, dict[str, Any]] = {}
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        self.keys: dict[tuple[str, str], dict[str, Any]] = {}
        self.lm = None

    def find_all(self, label: str, directory: Path, jobs: Sequence[_Job]) -> None:
        """Read what an earlier evaluation has found for a model, and refuse what belongs to another one."""
        model = {
            "model": content_hash(directory),
            "dtype": str(default_dtype(self.world.device)).removeprefix("torch."),
        }
        self.models[label] = {
            "path": str(directory),
            "config_hash": config_hash(directory),
            "content_hash": model["model"],
            "dtype": model["dtype"],
            "seconds": 0.0,
            "tasks": {},
            "texts": {},
        }
        for job in jobs:
            self.keys[label, job.name] = key = model | job.key | {"versions": self.versions}
            found = self.world.gather(self.store.read(label, job.name, key) if self.world.is_main else None)[0]
            if found is not None:
                self.found[label, job.name] = found

    def do(self, label: str, job: _Job, items: dict[str, list]) -> bool:
        """Measure something on a model, unless that is known already; returns whether it was measured now."""
        model, place = self.models[label], (label, job.name)
        found = self.found.get(place)
        if found is None:
            lm = self._load(label)
            lm.progress = Progress(f"{label} {job.name}", self.progress)
            try:
                result, samples = self._run(lm, label, job)
            except UserError as error:
                raise UserError(f"{label}: {error}") from error
            about = {"parameters": lm.model.num_parameters(), "trained_length": lm.trained_length}
            found = {"key": self.keys[place], "model": about, "result": result, "items": samples}
            if self.world.is_main:
                self.store.write(label, job.name, found)
        model |= found["model"]
        model[job.kind][job.name] = found["result"]
        items[job.name] = found["items"]
        model["seconds"] = sum(task["seconds"] for task in model["tasks"].values())
        if self.progress:
            print(_summary(label, job, found["result"], place in self.found), flush=True)
            line = warning(label, model, {job.name: found["result"]}) if job.kind == "tasks" else None
            if line:
                print(f"warning: {job.name}: {line}", file=sys.stderr, flush=True)
        return place not in self.found

    def _run(self, lm, label: str, job: _Job) -> tuple[dict[str, Any], list]:
        if job.kind == "texts":  # they need every token's score, which a journal does not keep
            return job.run(lm)
        lm.journal = self.store.journal(label, job.name, self.keys[label, job.name], self.world)
        result = job.run(lm)
        journal, lm.journal = lm.journal, None
        if journal is not None:
            journal.close()
        return result

    def write(self, results: dict[str, Any]) -> None:
        """Write the tables and pictures of what is known so far."""
        if self.store.folder is not None and self.world.is_main:
            with self.store.adding() as folder:
                write_results(folder, results)

    def close_model(self) -> None:
        """Let go of the model in memory."""
        self.lm = None

    def _load(self, label: str):
        if self.lm is None:
            from flash_stu.evaluation.definitions import quiet
            from flash_stu.evaluation.language_model import EvaluatedLM

            with quiet(logging.ERROR):  # the harness warns about models that it did not load itself
                directory = Path(self.models[label]["path"])
                self.lm = EvaluatedLM.load(directory, self.world.device, self.batch_size, self.world)
        return self.lm


def _compare_all(results: dict[str, Any], items: dict[str, dict[str, list]]) -> None:
    """Compare the first model with every other on the tasks that both have."""
    first, *others = items
    results["comparisons"] = []
    for second in others:
        tasks, pooled = {}, ([], [])
        for name, own in items[second].items():
            task = results["models"][second]["tasks"].get(name)
            if task is None or not own or not isinstance(own[0].get(task["metric"]), int | float):
                continue
            tasks[name] = compare(items[first][name], own, task["metric"])
            if task["metric"] == "acc":
                for pool, some in zip(pooled, (items[first][name], own), strict=True):
                    pool += some
        if sum("p_value" in task for task in tasks.values()) > 1:
            tasks["all items"] = compare(*pooled, "acc")
        if tasks:
            results["comparisons"].append({"first": first, "second": second, "tasks": tasks})


def _check_settings(labels, limit, data_dir, include_path, batch_size, files, text_length) -> None:
    if not labels:
        raise UserError("no model to evaluate; give --model DIR")
    for option, value in (("--limit", limit), ("--batch-size", batch_size), ("--text-length", text_length)):
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}; it must be at least 1")
    for option, value in (("--data-dir", data_dir), ("--include-path", include_path)):
        if value is not None and not Path(value).is_dir():
            raise UserError(f"{option} {value} is not a directory")
    for path in files:
        if not path.is_file():
            raise UserError(f"--text {path}: no such file")
        if [other.name for other in files].count(path.name) > 1:
            raise UserError(f"--text {path}: another file has the same name; rename one")


def _summary(label: str, job: _Job, found: dict, known: bool) -> str:
    if job.kind == "texts":
        figures = f"{found['bits_per_byte']:.4f} bits per byte, perplexity {found['perplexity']:.3f}"
        return f"{label}  {job.name}  {figures}  ({found['windows']} windows of {found['window']} tokens)"
    stderr = "" if found["stderr"] is None else f" ± {found['stderr']:.4f}"
    when = "found earlier" if known else f"{found['seconds']:.1f} s"
    return (
        f"{label}  {job.name}  {found['metric']} {found['value']:.4f}{stderr}  "
        f"({found['items']} of {found['items_available']} items, {when})"
    )


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
