"""Tasks that can be asked for: suites of them, their definitions, definitions that read local data, embedded tasks.

A suite is a YAML list of tasks. A definition is the harness's own or the user's, in the harness's YAML format. For a
task on local data a YAML file is written that includes its definition, keeps its name, and reads
`<data dir>/<data set>/<configuration or default>/<split>.jsonl` instead of the hub.

Four tasks need no download: their definitions are the YAML files in tasks/, and their data are generated from the
embedded corpus and laid out like any local mirror of data sets. Two of these exist at every length (passkey_4096).
"""

import atexit
import difflib
import functools
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs
import yaml
from lm_eval.tasks import TaskManager
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flash_stu.data import embedded_corpus
from flash_stu.errors import UserError, WriteError
from flash_stu.evaluation.embedded import bpb_documents, cloze_items
from flash_stu.evaluation.long_context import CountTokens, LongTask, make_items, parse_name
from flash_stu.evaluation.patches import quiet
from flash_stu.files import write_text
from flash_stu.reading import DamagedError, read_regular, read_text
from flash_stu.settings import expand, first_problem

TASK_FOLDER = Path(__file__).parent / "tasks"
SUITE_FOLDER = Path(__file__).parent / "suites"
DEFAULT_TASKS = ("embedded_bpb", "embedded_cloze")
_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")

Dataset = tuple[str, str | None]  # id on the hub, configuration


class TaskSpec(BaseModel):
    """One column of the table: a task or group of the harness and how to run it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(min_length=1, description="as lm-eval-harness knows it")
    shots: int | None = Field(default=None, ge=0, description="examples in a prompt; null: the task's own number")
    metric: str | None = Field(default=None, description="shown in the table; null: acc, else the task's first")

    def shots_of(self, definition: dict[str, Any]) -> int:
        """Returns the examples in a prompt of one of its tasks, given that task's definition."""
        return definition.get("num_fewshot") or 0 if self.shots is None else self.shots


class Suite(BaseModel):
    """A YAML file that lists tasks, and what others have published for them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tasks: list[TaskSpec] = Field(min_length=1)
    published: dict[str, list[float]] = Field(default={}, description="row: a value per task, percent")

    @model_validator(mode="after")
    def _check(self) -> "Suite":
        for row, values in self.published.items():
            if len(values) != len(self.tasks):
                raise ValueError(f"published {row!r} has {len(values)} values for {len(self.tasks)} tasks")
        return self


def resolve_tasks(names: str | Sequence[str] | None) -> tuple[list[TaskSpec], dict[str, dict[str, float]]]:
    """Turn what the user asked for into tasks, each suite replaced by its members.

    Args:
        names: task names, names of suites (flash_stu/evaluation/suites) and paths of suite files, as a
            list or separated by commas; None for the tasks that need no download.

    Returns:
        the tasks, and the published rows of the suites among them, {row: {task: value in percent}}.

    Raises:
        UserError: for no task at all, a task asked for twice, or a suite file that cannot be read.
    """
    if names is None:
        names = DEFAULT_TASKS
    if isinstance(names, str):
        names = names.split(",")
    suites = [_expand(name.strip()) for name in names if name.strip()]
    specs = [spec for suite in suites for spec in suite.tasks]
    if not specs:
        raise UserError(f"tasks names no task; give task names or suites ({', '.join(suite_names())})")
    asked = [spec.name for spec in specs]
    if twice := [name for name in asked if asked.count(name) > 1]:
        raise UserError(f"task {twice[0]!r} is asked for twice; name it once")
    published: dict[str, dict[str, float]] = {}
    for suite in suites:
        for row, values in suite.published.items():
            own = zip((task.name for task in suite.tasks), values, strict=True)
            published.setdefault(row, {}).update(own)
    return specs, published


def suite_names() -> list[str]:
    """Returns the names of the suites that come with the project, sorted."""
    return sorted(path.stem for path in SUITE_FOLDER.glob("*.yaml"))


@functools.cache
def official_index() -> dict:
    """Returns every task, group and tag of the harness by name; parsing its 14,000 files takes some ten seconds."""
    with quiet(logging.ERROR):
        return TaskManager().task_index


def is_generated(name: str) -> bool:
    """Returns whether a task's data are generated here.

    Raises:
        UserError: for the name of a long-context task with a wrong length, or with none.
    """
    return name in DEFAULT_TASKS or parse_name(name) is not None


class Definitions:
    """Tasks, groups and tags by name: the user's own, from a folder, and below them the harness's.

    Raises:
        UserError: for a definition that is not YAML, which the harness would pass over.
    """

    def __init__(self, include_path: Path | None = None) -> None:
        self.own = {}
        if include_path is not None:
            _check_syntax(include_path)
            with quiet(logging.ERROR):
                self.own = TaskManager(include_path=str(include_path), include_defaults=False).task_index

    def require(self, name: str) -> None:
        """Refuse an unknown name by a UserError with names that are close."""
        if is_generated(name) or name in self.own or name in official_index():
            return
        ours = [*suite_names(), *DEFAULT_TASKS, "passkey_4096", "copy_4096"]
        known = [*ours, *self.own, *official_index()]
        close = difflib.get_close_matches(name, map(str, known), n=5, cutoff=0.6) or ours
        raise UserError(f"unknown task {name!r}; close matches: {', '.join(close)}")

    def leaves(self, name: str) -> dict[str, tuple[dict[str, Any], Path]]:
        """Returns the single tasks that a task, group or tag consists of: by name the definition and its file.

        Raises:
            UserError: for a task that has no YAML file of its own, such as one that is defined inside a group.
        """
        entry = self.own.get(name) or official_index().get(name)
        if entry is None:
            raise UserError(f"task {name!r} is defined inside a group, so a mirror cannot serve it")
        definition = entry.cfg or {}
        if entry.kind.name == "TAG":
            members = entry.tags
        elif entry.kind.name == "GROUP":
            members = [m if isinstance(m, str) else m.get("task", m.get("group")) for m in definition["task"]]
        elif entry.yaml_path is None:
            raise UserError(f"task {name!r} has no YAML definition, so a mirror cannot serve it")
        else:
            return {name: (definition, entry.yaml_path)}
        found = {}
        for member in members:
            found |= self.leaves(member)
        return dict(sorted(found.items()))

    def manager(self, folder: Path, name: str) -> TaskManager:
        """Returns a task manager that knows the definitions in a folder, and below them all that a task may need."""
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        own = self.own.get(name)
        single = is_generated(name) or (own is not None and own.kind.name not in ("TAG", "GROUP"))
        for known, entry in (self.own if single else official_index() | self.own).items():
            # A tag lists its members: the folder's copy knows only those that are in the folder.
            if known not in manager.task_index or entry.kind.name == "TAG":
                manager.task_index[known] = entry
        return manager


def write_local_task(
    name: str, definition: dict[str, Any], definition_path: Path, data_dir: Path, shots: int, folder: Path
) -> Path:
    """Write the YAML file that reads one task's data from a mirror.

    Splits that only examples in prompts need may be missing where there are no shots.

    Args:
        name: the task's name.
        definition: its resolved definition (the harness's YAML, inclusions merged).
        definition_path: where that YAML is.
        data_dir: the mirror.
        shots: examples in a prompt.
        folder: where to write.

    Raises:
        UserError: naming the file that the mirror lacks, or the task if it does not read a hub data set.
    """
    dataset, splits, needed = data_of(name, definition, shots)
    files = {split: file_of(data_dir, dataset, split) for split in splits.values() if split is not None}
    for path in (files[split] for split in needed):
        if not path.is_file() or not path.stat().st_size:
            raise UserError(f"task {name!r} needs {path}, which {'is empty' if path.is_file() else 'does not exist'}")
    present = {split: str(path.resolve()) for split, path in files.items() if path.is_file()}
    absent = {key: None for key, split in splits.items() if split is not None and split not in present}

    override = {
        "include": str(definition_path.resolve()),  # a relative one would be looked for beside this file
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": present},
        **absent,
    }
    path = folder / f"{name}.yaml"
    write_text(path, yaml.safe_dump(override, sort_keys=False))
    return path


def data_of(name: str, definition: dict[str, Any], shots: int) -> tuple[Dataset, dict[str, str | None], list[str]]:
    """Returns the data that a task reads, given its resolved definition and the examples in a prompt.

    Returns:
        the data set; the split that each of the definition's entries names; and the splits that are needed: what is
        scored, and if there are shots what they are drawn from.

    Raises:
        UserError: if the task does not read a hub data set, or has nothing to score.
    """
    dataset = definition.get("dataset_path")
    if not dataset or "class" in definition or "custom_dataset" in definition:
        raise UserError(f"task {name!r} does not read a hub data set, so a mirror cannot serve it")
    splits = {key: definition.get(key) for key in _SPLIT_KEYS}
    scored = splits["test_split"] or splits["validation_split"]
    if scored is None:
        raise UserError(f"task {name!r} has neither a test nor a validation split")
    examples = splits["fewshot_split"] or splits["training_split"] or splits["validation_split"] or scored
    needed = [scored] if not shots or examples == scored else [scored, examples]
    return (dataset, definition.get("dataset_name")), splits, needed


def file_of(data_dir: Path, dataset: Dataset, split: str) -> Path:
    """Returns where a mirror keeps a split."""
    name, configuration = dataset
    return data_dir / name / (configuration or "default") / f"{split}.jsonl"


def _expand(name: str) -> Suite:
    if name.endswith((".yaml", ".yml")):
        return _read_suite(Path(expand(name)))
    if name in suite_names():
        return _read_suite(SUITE_FOLDER / f"{name}.yaml")
    return Suite(tasks=[TaskSpec(name=name)])


def _read_suite(path: Path) -> Suite:
    try:
        return Suite.model_validate(yaml.safe_load(read_text(path, "task suite")))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"task suite {path} is not a YAML file: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problem = first_problem(error, "the file")
        raise UserError(f"task suite {path}: {problem}; it has `tasks`, each a name, shots, metric") from error


def _check_syntax(folder: Path) -> None:
    for path in sorted(folder.rglob("*.yaml")):
        text = read_text(path, "include_path")
        try:
            yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"include_path {path}: not valid YAML: {reason}") from error


def write_generated_task(name: str, folder: Path, count_tokens: CountTokens | None = None) -> Path:
    """Write the YAML file with which any harness runs a generated task (`lm_eval --include_path folder`).

    Args:
        name: embedded_bpb, embedded_cloze, passkey_N or copy_N.
        folder: where to write.
        count_tokens: what N counts in a text; None for bytes.

    Raises:
        UserError: for a length that is too short.
    """
    long_task = parse_name(name)
    template = name if long_task is None else long_task.kind
    entry = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False).task_index[template]
    data = _embedded_data() if long_task is None else _long_context_data(long_task, count_tokens or _bytes)
    return write_local_task(name, entry.cfg or {}, TASK_FOLDER / f"{template}.yaml", data, 0, folder)


def _bytes(text: str) -> int:
    return len(text.encode())


@functools.cache
def _embedded_data() -> Path:
    return write_embedded_data(embedded_corpus()["validation"])


def write_embedded_data(documents: Sequence[str], cache_dir: Path | None = None) -> Path:
    """Write the data of embedded_bpb and embedded_cloze; see `_keep`.

    Args:
        documents: the corpus' validation documents.
        cache_dir: default the user's.
    """
    return _keep({"bpb": bpb_documents(documents), "cloze": cloze_items(documents)}, cache_dir)


def _long_context_data(task: LongTask, count_tokens: CountTokens) -> Path:
    corpus = embedded_corpus()
    return _keep({task.kind: make_items(task, count_tokens, [*corpus["train"], *corpus["validation"]])})


def _keep(data: dict[str, list[dict]], cache_dir: Path | None = None) -> Path:
    """Write data where they are not there already, byte for byte.

    Args:
        data: by name of the configuration, rows.
        cache_dir: default the user's cache directory. The harness keeps its own converted copy per path, so a
            lasting path keeps that from growing with every run. One that cannot be written is replaced by a temporary
            directory.

    Returns:
        a folder in the layout of a local mirror: flash_stu/embedded/<configuration>/validation.jsonl.
    """
    files = {
        f"flash_stu/embedded/{name}/validation.jsonl": "".join(json.dumps(row) + "\n" for row in rows)
        for name, rows in data.items()
    }
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    folder = (cache_dir or Path(platformdirs.user_cache_dir("flash_stu")) / "evaluation") / digest
    try:
        _complete(folder, files)
    except WriteError:  # a read-only home
        folder = Path(_scratch(), digest)
        _complete(folder, files)
    return folder


def _complete(folder: Path, files: dict[str, str]) -> None:
    """Write those of the files that are not there as they should be."""
    for name, text in files.items():
        with suppress(OSError, DamagedError):
            if read_regular(folder / name) == text.encode():
                continue
        write_text(folder / name, text)


@functools.cache
def _scratch() -> str:
    """A directory that is removed when this process ends."""
    path = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
