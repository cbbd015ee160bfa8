"""Which tasks to run: task names and suites (YAML lists of them) become one `Suite`."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flash_stu.errors import UserError
from flash_stu.files import read_text
from flash_stu.paths import expand

SUITE_FOLDER = Path(__file__).parent / "suites"
DEFAULT_TASKS = ("embedded_bpb", "embedded_cloze")  # need no download


class TaskSpec(BaseModel):
    """One column of the table: a task or group of the harness and how to run it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(min_length=1, description="as lm-eval-harness knows it")
    shots: int | None = Field(default=None, ge=0, description="examples in a prompt; null: the task's own number")
    metric: str | None = Field(default=None, description="shown in the table; null: acc, else the task's first")


class Suite(BaseModel):
    """A YAML file that lists tasks, and what others have published for them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tasks: list[TaskSpec] = Field(min_length=1)
    published: dict[str, list[float]] = Field(default={}, description="row: a value per task, percent")

    @model_validator(mode="after")
    def _check(self):
        for row, values in self.published.items():
            if len(values) != len(self.tasks):
                raise ValueError(f"published {row!r} has {len(values)} values for {len(self.tasks)} tasks")
        return self

    def published_rows(self) -> dict[str, dict[str, float]]:
        """Row: task: value in percent."""
        names = [task.name for task in self.tasks]
        return {row: dict(zip(names, values, strict=True)) for row, values in self.published.items()}


def resolve_tasks(names: str | Sequence[str] | None) -> tuple[list[TaskSpec], dict[str, dict[str, float]]]:
    """Turn what the user asked for into tasks, each suite replaced by its members.

    Args:
        names: task names, names of suites (flash_stu/evaluation/suites) and paths of suite files, as a
            list or separated by commas; None for the tasks that need no download.

    Returns:
        the tasks, and the published rows of the suites among them: row: task: value in percent.

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
        raise UserError(f"--tasks names no task; give task names or suites ({', '.join(suite_names())})")
    seen = set()
    for spec in specs:
        if spec.name in seen:
            raise UserError(f"task {spec.name!r} is asked for twice; name it once")
        seen.add(spec.name)
    published: dict[str, dict[str, float]] = {}
    for suite in suites:
        for row, values in suite.published_rows().items():
            published.setdefault(row, {}).update(values)
    return specs, published


def suite_names() -> list[str]:
    """The suites that come with the project, sorted."""
    return sorted(path.stem for path in SUITE_FOLDER.glob("*.yaml"))


def _expand(name: str) -> Suite:
    if name.endswith((".yaml", ".yml")):
        return _read_suite(Path(expand(name)))
    if name in suite_names():
        return _read_suite(SUITE_FOLDER / f"{name}.yaml")
    return Suite(tasks=[TaskSpec(name=name)])


def _read_suite(path: Path) -> Suite:
    try:
        return Suite.model_validate(yaml.safe_load(read_text(path, "--tasks: task suite")))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"task suite {path} is not a YAML file: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"task suite {path}: {where}: {first['msg']}; it has `tasks`, each a name, shots, metric"
        ) from error
