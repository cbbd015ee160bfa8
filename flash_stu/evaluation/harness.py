"""lm-eval-harness: find tasks, load them before any model is, run them quietly."""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import logging
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.utils
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.tasks import TaskManager

from flash_stu.data import embedded_corpus
from flash_stu.errors import UserError
from flash_stu.evaluation.embedded import TASK_FOLDER, TASK_NAMES, write_embedded_data
from flash_stu.evaluation.local_data import write_local_task
from flash_stu.evaluation.scoring import Counters
from flash_stu.evaluation.suite import TaskSpec, suite_names

_SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # the harness's own
_BOOTSTRAP_SAMPLES = 1000  # for standard errors without a formula; accuracies have one


@dataclass
class LoadedTask:
    """A task ready to run on any model: its spec, and the harness's tasks and groups it consists of."""

    spec: TaskSpec
    harness: dict[str, Any]

    @functools.cached_property
    def config_hash(self) -> str:
        """Hash of all that decides what is asked: prompts, metrics, shots and the data; not paths."""
        digest = hashlib.sha256()
        for name, member in sorted(self.harness["tasks"].items()):
            definition = {k: v for k, v in member.dump_config().items() if not k.startswith("dataset_")}
            definition["metadata"] = {"version": member.VERSION}  # without the path of its YAML
            for part in (name, definition, *member.eval_docs):
                digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]


@contextlib.contextmanager
def quiet(level: int = logging.WARNING):
    """Keep the harness's prints, log lines below a level, and progress bars but ours off the terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = lm_eval.api.task.tqdm, datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(level)
    lm_eval.api.task.tqdm = functools.partial(bars[0], disable=True)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
        lm_eval.api.task.tqdm = bars[0]
        if not bars[1]:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _compiled_templates():
    """Compile each prompt template once; the harness does it for every row, which is most of its own time."""
    env = lm_eval.utils.env
    env.from_string = functools.cache(env.from_string)  # on the instance, over the method
    try:
        yield
    finally:
        del env.from_string


def load_tasks(specs: Sequence[TaskSpec], data_dir: Path | None = None) -> list[LoadedTask]:
    """Load the definitions and data of tasks.

    Args:
        specs: what to load; names may be tasks, groups or tags of the harness, or our own embedded tasks.
        data_dir: a mirror of data sets to read instead of the hub (the embedded tasks never need one).

    Raises:
        UserError: for an unknown task or metric, a file that the mirror lacks, or data that cannot be had.
    """
    for spec in specs:
        _require_known(spec.name)
    with tempfile.TemporaryDirectory() as scratch, quiet(logging.ERROR):
        # A folder each: a group and one of its members may be asked for with different shots.
        managers = [_manager_for(spec, data_dir, Path(scratch, str(i))) for i, spec in enumerate(specs)]
        hint = "" if data_dir else "; a machine without internet needs --data-dir"
        return [_load(spec, manager, hint) for spec, manager in zip(specs, managers, strict=True)]


def write_embedded_task(name: str, folder: Path) -> Path:
    """Write the YAML file with which any harness runs an embedded task (`lm_eval --include_path folder`)."""
    definition = _manager(TASK_FOLDER).task_index[name].cfg
    return write_local_task(name, definition, TASK_FOLDER / f"{name}.yaml", _embedded_data(), 0, folder)


@functools.cache
def _embedded_data() -> Path:
    return write_embedded_data(embedded_corpus()["validation"])


@functools.cache
def official_index() -> dict:
    """Every task, group and tag of the harness by name; parsing its 14,000 files takes some ten seconds."""
    with quiet(logging.ERROR):
        return TaskManager().task_index


def _manager(folder: Path, official: dict | None = None) -> TaskManager:
    """A task manager that knows the definitions in a folder and, under them, the official ones."""
    manager = TaskManager(include_path=folder, include_defaults=False)
    for name, entry in (official or {}).items():
        # A tag lists its members: the folder's copy knows only those that are in the folder.
        if name not in manager.task_index or entry.kind.name == "TAG":
            manager.task_index[name] = entry
    return manager


def _manager_for(spec: TaskSpec, data_dir: Path | None, folder: Path) -> TaskManager:
    folder.mkdir()
    if spec.name in TASK_NAMES:
        write_embedded_task(spec.name, folder)
        return _manager(folder)
    if data_dir is not None:
        for name in sorted(_leaves(spec.name)):
            entry = official_index()[name]
            shots = entry.cfg.get("num_fewshot") or 0 if spec.shots is None else spec.shots
            write_local_task(name, entry.cfg, entry.yaml_path, data_dir, shots, folder)
    return _manager(folder, official_index())


def _require_known(name: str) -> None:
    if name not in TASK_NAMES and name not in official_index():
        known = [*TASK_NAMES, *suite_names(), *official_index()]
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.6) or [*suite_names(), *TASK_NAMES]
        raise UserError(f"unknown task {name!r}; close matches: {', '.join(close)}")


def _leaves(name: str) -> set[str]:
    """The single tasks that a task, group or tag consists of."""
    entry = official_index().get(name)
    if entry is None:
        raise UserError(f"task {name!r} is defined inside a group, so --data-dir cannot serve it")
    if entry.kind.name == "TAG":
        members = entry.tags
    elif entry.kind.name == "GROUP":
        members = [m if isinstance(m, str) else m.get("task", m.get("group")) for m in entry.cfg["task"]]
    else:
        return {name}
    return set().union(*(_leaves(member) for member in members))


def _load(spec: TaskSpec, manager: TaskManager, hint: str) -> LoadedTask:
    try:
        loaded = manager.load([spec.name])
    except Exception as error:  # data sets come from disk, cache or network, and fail in as many ways
        reason = " ".join(str(error).split())
        raise UserError(f"task {spec.name!r} cannot be loaded: {type(error).__name__}: {reason}{hint}") from error
    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if fixed is None or (spec.shots is not None and fixed != 0):  # 0 in a definition means: never any
            task.set_config(key="num_fewshot", value=spec.shots or 0)
    metrics = {metric for task in loaded["tasks"].values() for metric in task.aggregation()}
    if spec.metric is not None and spec.metric not in metrics:
        raise UserError(f"task {spec.name!r} has no metric {spec.metric!r}; allowed: {', '.join(sorted(metrics))}")
    return LoadedTask(spec, loaded)


def run_task(lm: LM, task: LoadedTask, limit: int | None = None) -> dict[str, Any]:
    """Run one task on one model.

    Args:
        lm: any language model of the harness.
        task: what to run.
        limit: score only so many items of each single task.

    Returns:
        what results.json says about a task: its main metric, all metrics, those of a group's members,
        how many items, what the model had to do (if it counts), seconds.

    Raises:
        UserError: if the task reports no number.
    """
    started = time.perf_counter()
    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["numpy"])
    torch.manual_seed(_SEEDS["torch"])
    members = task.harness["tasks"]
    for member in members.values():
        member.set_fewshot_seed(seed=_SEEDS["fewshot"])
    lm.counters = Counters()
    with quiet(), _compiled_templates():
        outcome = run_harness(lm, task.harness, limit=limit, bootstrap_iters=_BOOTSTRAP_SAMPLES, log_samples=False)

    metrics = {name: _metrics(row) for name, row in outcome["results"].items()}
    own = _mean([metrics[name] for name in members]) | metrics.pop(task.spec.name, {})
    if not own:
        raise UserError(f"task {task.spec.name!r} reports no number")
    main = _main_metric(list(own), task.spec.metric)
    directions = {name: up for member in members.values() for name, up in member.higher_is_better().items()}
    counts = outcome["n-samples"].values()
    return {
        "metric": main,
        **own[main],
        "higher_is_better": directions.get(main.partition(",")[0]),
        "shots": max(member.get_config("num_fewshot") for member in members.values()),
        "items": sum(count["effective"] for count in counts),
        "items_available": sum(count["original"] for count in counts),
        "version": outcome["versions"].get(task.spec.name),
        "config_hash": task.config_hash,
        "seconds": time.perf_counter() - started,
        **dataclasses.asdict(lm.counters),
        "metrics": own,
        "members": {name: values for name, values in metrics.items() if values},
    }


def _metrics(row: dict) -> dict[str, dict[str, float | None]]:
    """Turn {"acc,none": 0.5, "acc_stderr,none": 0.1} into {"acc": {"value": 0.5, "stderr": 0.1}}.

    A filter other than "none" stays part of the name. A standard error the harness does not know is None.
    """
    found = {}
    for key, value in row.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = row.get(f"{metric}_stderr,{filter_name}")
            found[metric if filter_name == "none" else key] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            }
    return found


def _mean(rows: Sequence[dict]) -> dict[str, dict[str, float | None]]:
    """The plain mean over members: what tags get, and groups where they define no aggregate."""
    shared = [key for key in rows[0] if all(key in row for row in rows)]
    return {key: {"value": sum(row[key]["value"] for row in rows) / len(rows), "stderr": None} for key in shared}


def _main_metric(names: Sequence[str], wanted: str | None) -> str:
    """The metric the table shows: the one asked for (under any filter), else acc, else the task's first."""
    matching = [name for name in names if name.partition(",")[0] == (wanted or "acc")]
    return (matching or names)[0]
