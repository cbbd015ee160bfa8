"""The definitions of tasks: the harness's own, the user's, and how to ask about them quietly."""

import contextlib
import difflib
import functools
import io
import logging
from pathlib import Path

import datasets
import lm_eval.api.task
import yaml
from lm_eval.tasks import TaskManager

from flash_stu.errors import UserError
from flash_stu.evaluation.embedded import TASK_NAMES
from flash_stu.evaluation.suite import TaskSpec, suite_names
from flash_stu.files import read_text


@contextlib.contextmanager
def quiet(level: int = logging.WARNING):
    """Keep the harness's prints, log lines below a level, and progress bars but ours off the terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
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


@functools.cache
def official_index() -> dict:
    """Every task, group and tag of the harness by name; parsing its 14,000 files takes some ten seconds."""
    with quiet(logging.ERROR):
        return TaskManager().task_index


class Definitions:
    """Tasks, groups and tags by name: the user's own, and below them the harness's.

    Args:
        include_path: the user's folder, or None.

    Raises:
        UserError: for a definition that is not YAML, which the harness would pass over.
    """

    def __init__(self, include_path: Path | None = None) -> None:
        self.own = {}
        if include_path is not None:
            _check_syntax(include_path)
            with quiet(logging.ERROR):
                self.own = TaskManager(include_path=str(include_path), include_defaults=False).task_index

    def __getitem__(self, name: str):
        return self.own[name] if name in self.own else official_index()[name]

    def require(self, name: str) -> None:
        """Refuse a name that means nothing.

        Raises:
            UserError: with names that are close.
        """
        if name in TASK_NAMES or name in self.own or name in official_index():
            return
        known = [*TASK_NAMES, *suite_names(), *self.own, *official_index()]
        close = difflib.get_close_matches(name, map(str, known), n=5, cutoff=0.6) or [*suite_names(), *TASK_NAMES]
        raise UserError(f"unknown task {name!r}; close matches: {', '.join(close)}")

    def leaves(self, name: str) -> set[str]:
        """The single tasks that a task, group or tag consists of.

        Raises:
            UserError: for a group that defines a task inside itself.
        """
        try:
            entry = self[name]
        except KeyError:
            raise UserError(f"task {name!r} is defined inside a group, so a mirror cannot serve it") from None
        if entry.kind.name == "TAG":
            members = entry.tags
        elif entry.kind.name == "GROUP":
            members = [m if isinstance(m, str) else m.get("task", m.get("group")) for m in entry.cfg["task"]]
        else:
            return {name}
        return set().union(*(self.leaves(member) for member in members))

    def manager(self, folder: Path, name: str) -> TaskManager:
        """A task manager that knows the definitions in a folder, and below them all that a task may need."""
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        own = self.own.get(name)
        single = name in TASK_NAMES or (own is not None and own.kind.name not in ("TAG", "GROUP"))
        for known, entry in (self.own if single else official_index() | self.own).items():
            # A tag lists its members: the folder's copy knows only those that are in the folder.
            if known not in manager.task_index or entry.kind.name == "TAG":
                manager.task_index[known] = entry
        return manager


def _check_syntax(folder: Path) -> None:
    for path in sorted(folder.rglob("*.yaml")):
        text = read_text(path, "--include-path")
        try:
            yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--include-path {path}: not valid YAML: {reason}") from error


def shots_of(spec: TaskSpec, definition: dict) -> int:
    """Examples in a prompt: what the spec says, else the task's definition."""
    return definition.get("num_fewshot") or 0 if spec.shots is None else spec.shots
