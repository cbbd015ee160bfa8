"""lm-eval-harness: tasks are loaded before any model, and run one at a time with the harness's own seeds.

`lm_eval.simple_evaluate` would set the seeds too, but loads the tasks anew for every model, collects a description of
the machine for every task, and returns results in one process only.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.tasks import TaskManager

from flash_stu.errors import UserError
from flash_stu.evaluation.definitions import (
    Definitions,
    TaskSpec,
    is_generated,
    write_generated_task,
    write_local_task,
)
from flash_stu.evaluation.language_model import EvaluatedLM
from flash_stu.evaluation.long_context import CountTokens, by_depth, parse_name
from flash_stu.evaluation.patches import compiled_templates, quiet
from flash_stu.evaluation.scoring import Counters
from flash_stu.network import spare_the_hub

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in what Python says of a function
_BOOTSTRAP_SAMPLES = 1000  # for standard errors without a formula; accuracies have one


@dataclass
class LoadedTask:
    """A task ready to run on any model: its spec, and the harness's tasks and groups it consists of."""

    spec: TaskSpec
    harness: dict[str, Any]

    @property
    def length(self) -> int | None:
        """Tokens that a model must be able to take; None if it may be given less."""
        long_task = parse_name(self.spec.name)
        return None if long_task is None else long_task.length

    @functools.cached_property
    def config_hash(self) -> str:
        """Hash of all that decides what is asked: prompts, metrics, shots and the data; not paths."""
        digest = hashlib.sha256()
        for name, member in sorted(self.harness["tasks"].items()):
            definition = {k: v for k, v in member.dump_config().items() if not k.startswith("dataset_")}
            definition["metadata"] = {"version": member.VERSION}  # without the path of its YAML
            examples = member.fewshot_docs() if member.get_config("num_fewshot") else []
            for part in (name, definition, *member.eval_docs, "examples", *examples):
                text = json.dumps(part, sort_keys=True, default=str)
                digest.update(_ADDRESS.sub("", text).encode())
        return digest.hexdigest()[:16]


@contextlib.contextmanager
def _naming(task: str, failure: str, hint: str = "") -> Iterator[None]:
    """Turn whatever goes wrong with a task, in the harness or in its data, into one line that names it."""
    try:
        yield
    except UserError as error:
        raise error if repr(task) in str(error) else UserError(f"task {task!r}: {error}") from error
    except Exception as error:  # tasks are data and code from anywhere, and fail in as many ways
        reason = " ".join(str(error).split())
        advice = hint if isinstance(error, OSError) else ""  # what failed may be the network
        raise UserError(f"task {task!r} {failure}: {type(error).__name__}: {reason}{advice}") from error


def load_tasks(
    specs: Sequence[TaskSpec],
    data_dir: Path | None = None,
    include_path: Path | None = None,
    count_tokens: CountTokens | None = None,
) -> list[LoadedTask]:
    """Load the definitions and data of tasks.

    Args:
        specs: what to load; names may be tasks, groups or tags of the harness, the user's, or our generated tasks.
        data_dir: a mirror of data sets to read instead of the hub (the generated tasks never need one).
        include_path: a folder with the user's own task definitions, which go before the harness's.
        count_tokens: number of tokens of a text, for the lengths of passkey_N and copy_N; None: its bytes.

    Raises:
        UserError: for an unknown task or metric, a file that the mirror lacks, or data that cannot be had.
    """
    definitions = Definitions(include_path)
    for spec in specs:
        definitions.require(spec.name)
    if data_dir is None and any(not is_generated(spec.name) for spec in specs):
        spare_the_hub()
    with tempfile.TemporaryDirectory() as scratch, quiet(logging.CRITICAL):
        # A folder each: a group and one of its members may be asked for with different shots.
        managers = [
            _manager_for(spec, definitions, data_dir, Path(scratch, str(i)), count_tokens)
            for i, spec in enumerate(specs)
        ]
        hint = "" if data_dir else "; a machine without internet needs a mirror, see scripts/fetch_eval_data.py"
        loaded = []
        for spec, manager in zip(specs, managers, strict=True):
            with _naming(spec.name, "cannot be loaded", hint):
                loaded.append(_load(spec, manager))
        return loaded


def _manager_for(
    spec: TaskSpec, definitions: Definitions, data_dir: Path | None, folder: Path, count_tokens: CountTokens | None
) -> TaskManager:
    folder.mkdir()
    with _naming(spec.name, "cannot be loaded"):
        if is_generated(spec.name):
            write_generated_task(spec.name, folder, count_tokens)
        elif data_dir is not None:
            for name, (definition, path) in definitions.leaves(spec.name).items():
                write_local_task(name, definition, path, data_dir, spec.shots_of(definition), folder)
        return definitions.manager(folder, spec.name)


def _load(spec: TaskSpec, manager: TaskManager) -> LoadedTask:
    loaded: dict[str, Any] = dict(manager.load([spec.name]))
    for task in loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if fixed is None or (spec.shots is not None and fixed != 0):  # 0 in a definition means: never any
            task.set_config(key="num_fewshot", value=spec.shots or 0)
    metrics = {metric for task in loaded["tasks"].values() for metric in task.aggregation()}
    if spec.metric is not None and spec.metric not in metrics:
        raise UserError(f"task {spec.name!r} has no metric {spec.metric!r}; allowed: {', '.join(sorted(metrics))}")
    for name, task in loaded["tasks"].items():
        _check_definition(name, task)
    found = LoadedTask(spec, loaded)
    _ = found.config_hash  # reads every document
    return found


def _check_definition(name: str, task: ConfigurableTask) -> None:
    """Refuse what the harness would pass over or fail at late: metrics that it lacks, fields that the data lack."""
    unusable = [metric for metric, aggregate in task.aggregation().items() if not callable(aggregate)]
    if unusable:
        raise UserError(f"task {name!r}: the harness has no metric {unusable[0]!r}, or no aggregation of it")
    for entry in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        field = task.get_config(entry)
        choices = task.get_config("doc_to_choice")
        constants = choices if isinstance(choices, list) else ()
        # the harness takes a name that is no field of the data for a text, the same for every document
        if isinstance(field, str) and field.isidentifier() and field not in (*task.features, *constants):
            there = ", ".join(task.features)
            raise UserError(f"task {name!r}: {entry} is {field!r}, a field that the data lack; there are: {there}")


def run_task(lm: LM, task: LoadedTask, limit: int | None = None) -> dict[str, Any]:
    """Run one task on one model.

    Args:
        lm: any language model of the harness.
        task: what to run.
        limit: score only so many items of each single task.

    Returns:
        what results.json says about a task: its main metric, all metrics, those of a group's members,
        how many items, what the model had to do (if it counts), seconds; of passkey_N and copy_N the metrics by depth
        ("depths"); and under "samples" every item: its task, number and hash, its value of each metric, and what the
        model answered to each of its requests.

    Raises:
        UserError: if the task fails, or reports no number.
    """
    with _naming(task.spec.name, "failed"):
        started = time.perf_counter()
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        members = task.harness["tasks"]
        for member in members.values():
            member.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        counters = Counters()
        if isinstance(lm, EvaluatedLM):
            lm.counters = counters
        with quiet(), compiled_templates():
            outcome: Any = run_harness(lm, task.harness, limit=limit, bootstrap_iters=_BOOTSTRAP_SAMPLES)

        metrics = {name: _metrics(row) for name, row in outcome["results"].items()}
        own = _mean([metrics[name] for name in members]) | metrics.pop(task.spec.name, {})
        if not own:
            raise UserError(f"task {task.spec.name!r} reports no number")
        main = _main_metric(list(own), task.spec.metric)
        directions = {name: up for member in members.values() for name, up in member.higher_is_better().items()}
        counts = outcome["n-samples"].values()
        samples = [sample for name in members for sample in _samples(name, outcome["samples"][name])]
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
            **dataclasses.asdict(counters),
            "metrics": own,
            "members": {name: values for name, values in metrics.items() if values},
            **({} if task.length is None else {"depths": by_depth(samples, list(own))}),
            "samples": samples,
        }


def _samples(task: str, logged: Sequence[dict]) -> list[dict]:
    """Returns what is kept of the harness's log of a task; an item is there once per filter."""
    found: dict[int, dict] = {}
    for entry in logged:
        answers = [answer[0] for answer in entry["resps"]]
        fresh = {"task": task, "doc": entry["doc_id"], "hash": entry["doc_hash"][:16], "answers": answers}
        sample = found.setdefault(entry["doc_id"], fresh)
        for metric in entry["metrics"]:
            name = metric if entry["filter"] == "none" else f"{metric},{entry['filter']}"
            sample[name] = entry[metric]
    return list(found.values())


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
    """Returns the plain mean over members, for tags and for groups that define no aggregate."""
    shared = [key for key in rows[0] if all(key in row for row in rows)]
    return {key: {"value": sum(row[key]["value"] for row in rows) / len(rows), "stderr": None} for key in shared}


def _main_metric(names: Sequence[str], wanted: str | None) -> str:
    """Returns the metric the table shows: the one asked for (under any filter), else acc, else the task's first."""
    matching = [name for name in names if name.partition(",")[0] == (wanted or "acc")]
    return (matching or names)[0]
