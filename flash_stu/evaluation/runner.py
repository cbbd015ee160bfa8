"""Evaluate models on tasks and texts: check everything, load the tasks, then run model after model."""

import hashlib
import importlib.metadata
import logging
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flash_stu.devices import choose_device, default_dtype
from flash_stu.distributed import World, join, local_device, world_size
from flash_stu.errors import UserError
from flash_stu.evaluation import harness
from flash_stu.evaluation.compare import compare_all
from flash_stu.evaluation.definitions import TaskSpec, resolve_tasks
from flash_stu.evaluation.language_model import EvaluatedLM
from flash_stu.evaluation.long_context import parse_name
from flash_stu.evaluation.patches import quiet
from flash_stu.evaluation.report import format_report, result_files, summary, too_long, warning, write_results
from flash_stu.evaluation.resume import Store, item_file
from flash_stu.evaluation.text import score_text
from flash_stu.model.loading import check_tensors, load_model, load_model_tokenizer, read_model_config
from flash_stu.model.weights import weight_files
from flash_stu.progress import Progress
from flash_stu.training.model_source import find_source, is_checkpoint, load_checkpoint, load_source_tokenizer

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
    folders = {"data_dir": data_dir, "include_path": include_path}
    _check_settings({"limit": limit, "batch_size": batch_size, "text_length": text_length}, folders, files)
    choose_device(device)
    store = Store(None if output is None else Path(output))
    names = [spec.name for spec in specs] + [path.name for path in files]
    written = result_files([spec.name for spec in specs], [path.name for path in files])
    written += [item_file(label, name) for label in labels for name in names]
    store.check(written)
    directories = [check_model_dir(path) for path in model_dirs]

    with join(_own_device(device), "gloo", _TIMEOUT) as world:
        say = print if progress and world.is_main else lambda *_, **__: None
        if specs:
            say(f"loading {', '.join(spec.name for spec in specs)}", flush=True)
        with world.main_first():
            paths = [None if path is None else Path(path) for path in folders.values()]
            loaded = _load_tasks(specs, directories, *paths)
        results = {
            "versions": _versions(),
            "settings": {
                "tasks": [spec.model_dump() for spec in specs],
                "limit": limit,
                **{name: None if path is None else str(path) for name, path in folders.items()},
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
        text_jobs = [_text_job(path, text_column, text_length, limit) for path in files]
        jobs = [[*(_task_job(task, limit) for task in own), *text_jobs] for own in loaded]
        printing = progress and world.is_main
        session = Session(store, world, batch_size, printing, results["versions"])
        with store.holding(written) if world.is_main else nullcontext():
            each = zip(labels, directories, jobs, strict=True)
            models = [Candidate(*one, session) for one in each]
            items = {}
            for model in models:
                results["models"][model.label], items[model.label] = model.row, model.items
                for job in model.jobs:
                    new = model.measure(job)
                    results["comparisons"] = compare_all(results["models"], items)
                    if new and world.is_main:
                        store.add(partial(write_results, results=results))
                model.close()
            if world.is_main:
                store.add(partial(write_results, results=results))
        say(f"\n{format_report(results)}")
    return results


def check_model_dir(path: str | Path) -> Path:
    """Find the directory of weights that a path means, and check that its parts are there, whole and fit each other.

    Args:
        path: see `flash_stu.training.model_source.find_source`.

    Raises:
        UserError: if it is missing, not a model, without tokenizer, or its weights are missing, truncated or others
            than its config.json describes.
    """
    directory = find_source(path, "evaluated")
    if is_checkpoint(directory):
        load_checkpoint(directory)  # which compares checksums
        return directory
    load_model_tokenizer(directory)
    if not check_tensors(directory, read_model_config(directory)):
        load_model(directory)  # which decides
    return directory


def label_models(paths: Sequence[str | Path]) -> list[str]:
    """Returns names for the rows of the table: of the directory; of the run for its final/, with the step for another.

    Raises:
        UserError: if there is no directory, or one is given twice.
    """
    if not paths:
        raise UserError("model_dirs is empty; give at least one model directory")
    resolved = [Path(path).resolve() for path in paths]
    for path, given in zip(resolved, paths, strict=True):
        if resolved.count(path) > 1:
            raise UserError(f"model_dirs {given} is given twice; give it once")
    names = [_name(path) for path in resolved]
    return [str(path) if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]


@dataclass(frozen=True)
class Job:
    """A task or text to measure a model on."""

    kind: str  # "tasks" or "texts", the entry of results.json
    name: str  # there
    key: dict[str, Any]  # all that decides the result, besides model and versions
    length: int | None  # tokens that a model must be able to take; None for any
    run: Callable[[EvaluatedLM], tuple[dict[str, Any], list[dict]]]  # returns the result, and the answer to each item


@dataclass(frozen=True)
class Session:
    """Settings that the models of an evaluation share."""

    store: Store  # of what an earlier evaluation found and this one does
    world: World  # the processes that share the work
    batch_size: int | None  # sequences per forward pass; None for as many as fit
    progress: bool  # whether this process prints
    versions: dict[str, str]  # of the packages


class Candidate:
    """One model, loaded when something is left to measure on it.

    Attributes:
        label: its name in the results.
        jobs: what is measured on it.
        row: what results.json has of it.
        items: by job, what it answered.
    """

    def __init__(self, label: str, directory: Path, jobs: Sequence[Job], session: Session) -> None:
        """Read what an earlier evaluation has found.

        Raises:
            UserError: if that was another model, or found with other settings.
        """
        self.label, self.directory, self.jobs, self.session = label, directory, jobs, session
        content, dtype = _content_hash(directory), str(default_dtype(session.world.device)).removeprefix("torch.")
        self.row: dict[str, Any] = {
            "path": str(directory),
            "config_hash": _hash(_config_file(directory))[:16],
            "content_hash": content,
            "dtype": dtype,
            "seconds": 0.0,
            "tasks": {},
            "texts": {},
            "too_long": [],
        }
        self.items: dict[str, list[dict]] = {}
        self._lm: EvaluatedLM | None = None
        self._known: dict[str, dict[str, Any]] = {}
        self._keys: dict[str, dict[str, Any]] = {}
        store, world = session.store, session.world
        for job in jobs:
            key = {"model": content, "dtype": dtype} | job.key | {"versions": session.versions}
            self._keys[job.name] = key
            found = world.gather(store.read(label, job.name, key) if world.is_main else None)[0]
            if found is not None:
                self._known[job.name] = found

    def measure(self, job: Job) -> bool:
        """Do a job, unless its result is known; returns whether it was done now."""
        known = job.name in self._known
        found = self._known[job.name] if known else self._measure(job)
        result, row = found["result"], self.row
        row |= found["model"]
        if result is None:
            row["too_long"].append(job.name)
            if self.session.progress:
                print(too_long(self.label, row, [job.name]), flush=True)
            return not known
        row[job.kind][job.name] = result
        self.items[job.name] = found["items"]
        row["seconds"] = sum(task["seconds"] for task in row["tasks"].values())
        if self.session.progress:
            print(summary(self.label, job.name, result, known), flush=True)
            line = warning(self.label, row, {job.name: result}) if job.kind == "tasks" else None
            if line:
                print(f"warning: {job.name}: {line}", file=sys.stderr, flush=True)
        return not known

    def close(self) -> None:
        """Free the model's memory."""
        self._lm = None

    def _measure(self, job: Job) -> dict[str, Any]:
        session, store, key = self.session, self.session.store, self._keys[job.name]
        if self._lm is None:
            with quiet(logging.ERROR):  # the harness warns about models that it did not load itself
                self._lm = EvaluatedLM.load(self.directory, session.world.device, session.batch_size, session.world)
        lm = self._lm
        about = {
            "parameters": lm.model.num_parameters(),
            "trained_length": lm.trained_length,
            "longest_input": lm.longest,
        }
        if job.length is not None and lm.longest is not None and job.length > lm.longest:
            return self._keep(job, {"key": key, "model": about, "result": None, "items": []})
        lm.progress = Progress(f"{self.label} {job.name}", "tok", enabled=session.progress)
        if job.kind == "tasks":  # a text needs every token's score, which a journal does not keep
            lm.journal = store.journal(self.label, job.name, key, session.world)
        try:
            result, items = job.run(lm)
        except UserError as error:
            raise UserError(f"{self.label}: {error}") from error
        if lm.journal is not None:
            lm.journal.close()
            lm.journal = None
        return self._keep(job, {"key": key, "model": about, "result": result, "items": items})

    def _keep(self, job: Job, found: dict[str, Any]) -> dict[str, Any]:
        if self.session.world.is_main:
            self.session.store.write(self.label, job.name, found)
        return found


def _load_tasks(
    specs: Sequence[TaskSpec], directories: Sequence[Path], data_dir: Path | None, include_path: Path | None
) -> list[list[harness.LoadedTask]]:
    """Returns the tasks of each model: those with lengths in tokens once per tokenizer, the others once for all."""
    shared = harness.load_tasks([spec for spec in specs if parse_name(spec.name) is None], data_dir, include_path)
    own = [spec for spec in specs if parse_name(spec.name) is not None]
    by_tokenizer: dict[str, list[harness.LoadedTask]] = {}
    found = []
    for directory in directories:
        tasks = list(shared)
        if own:
            tokenizer = load_source_tokenizer(directory)
            fast = isinstance(tokenizer, PreTrainedTokenizerFast)
            name = tokenizer.backend_tokenizer.to_str() if fast else str(directory)
            if name not in by_tokenizer:
                by_tokenizer[name] = harness.load_tasks(own, count_tokens=partial(_count_tokens, tokenizer))
            tasks += by_tokenizer[name]
        found.append(sorted(tasks, key=lambda task: specs.index(task.spec)))
    return found


def _count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, verbose=False).input_ids)


def _task_job(task: harness.LoadedTask, limit: int | None) -> Job:
    def run(lm: EvaluatedLM) -> tuple[dict[str, Any], list[dict]]:
        result = harness.run_task(lm, task, limit)
        return result, result.pop("samples")

    key = {"task": task.spec.model_dump(), "prompts and data": task.config_hash, "limit": limit}
    return Job("tasks", task.spec.name, key, task.length, run)


def _text_job(path: Path, column: str, length: int | None, limit: int | None) -> Job:
    key = {"text": _hash(path)[:16], "text_column": column, "text_length": length, "limit": limit}
    return Job("texts", path.name, key, None, lambda lm: (score_text(lm, path, column, length, limit), []))


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


def _content_hash(directory: Path) -> str:
    """Returns a short hash of all that a model is: config, weights and tokenizer."""
    if is_checkpoint(directory):
        files = [_config_file(directory), *sorted(directory.glob("*.safetensors"))]
    else:
        names = ("config.json", "tokenizer.json", "tokenizer_config.json")
        files = [directory / name for name in names] + weight_files(directory)
    lines = "".join(f"{path.name} {_hash(path)}\n" for path in files if path.is_file())
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config_file(directory: Path) -> Path:
    if is_checkpoint(directory):
        return directory.resolve().parent.parent / "config.yaml"
    return directory / "config.json"


def _name(path: Path) -> str:
    if is_checkpoint(path):
        return f"{path.parent.parent.name}-{path.name}"
    return path.parent.name if path.name == "final" else path.name


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "not installed"
    return found
