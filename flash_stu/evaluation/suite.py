"""Which tasks to run: task names and suites (YAML lists of them) become a list of `TaskSpec`."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flash_stu.errors import UserError

SUITE_FOLDER = Path(__file__).parents[2] / "configs" / "eval"
DEFAULT_TASKS = ("embedded_bpb", "embedded_cloze")  # need no download


class TaskSpec(BaseModel):
    """One column of the table: a task or group of the harness and how to run it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(min_length=1, description="as lm-eval-harness knows it")
    shots: int | None = Field(default=None, ge=0, description="examples in a prompt; null: the task's own number")
    metric: str | None = Field(default=None, description="shown in the table; null: acc, else the task's first")


class Suite(BaseModel):
    """A YAML file that lists tasks."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tasks: list[TaskSpec] = Field(min_length=1)


def resolve_tasks(names: str | Sequence[str] | None) -> list[TaskSpec]:
    """Turn what the user asked for into tasks, each suite replaced by its members.

    Args:
        names: task names, suite names (files in configs/eval, without .yaml) and paths of suite files, as a
            list or separated by commas; None for the tasks that need no download.

    Raises:
        UserError: for no task at all, a task asked for twice, or a suite file that cannot be read.
    """
    if names is None:
        names = DEFAULT_TASKS
    if isinstance(names, str):
        names = names.split(",")
    specs = [spec for name in names if name.strip() for spec in _expand(name.strip())]
    if not specs:
        raise UserError(f"--tasks names no task; give task names or suites ({', '.join(suite_names())})")
    seen = set()
    for spec in specs:
        if spec.name in seen:
            raise UserError(f"task {spec.name!r} is asked for twice; name it once")
        seen.add(spec.name)
    return specs


def suite_names() -> list[str]:
    """The suites that come with the project, sorted."""
    return sorted(path.stem for path in SUITE_FOLDER.glob("*.yaml"))


def _expand(name: str) -> list[TaskSpec]:
    if name.endswith((".yaml", ".yml")):
        return _read_suite(Path(name)).tasks
    if name in suite_names():
        return _read_suite(SUITE_FOLDER / f"{name}.yaml").tasks
    return [TaskSpec(name=name)]


def _read_suite(path: Path) -> Suite:
    try:
        return Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"task suite {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"task suite {path} is not a YAML file: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"task suite {path}: {where}: {first['msg']}; it is a list `tasks` of name, shots, metric"
        ) from error
