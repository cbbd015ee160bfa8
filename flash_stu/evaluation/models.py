"""The models of an evaluation: their directories, checked before anything is loaded, and measurements on them."""

import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_stu.devices import default_dtype
from flash_stu.distributed import World
from flash_stu.errors import UserError
from flash_stu.evaluation.language_model import EvaluatedLM
from flash_stu.evaluation.patches import quiet
from flash_stu.evaluation.report import summary, warning
from flash_stu.evaluation.resume import Store
from flash_stu.model.loading import check_tensors, load_model, load_model_tokenizer, read_model_config
from flash_stu.model.weights import weight_files
from flash_stu.progress import Progress
from flash_stu.training.checkpoint_export import load_checkpoint
from flash_stu.training.model_source import find_source, is_checkpoint


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
    """A task or text to measure a model on.

    Attributes:
        kind: "tasks" or "texts", the entry of results.json.
        name: its name there.
        key: all that decides the result, besides model and versions.
        run: returns the result for a model, and what the model answered to each item.
    """

    kind: str
    name: str
    key: dict[str, Any]
    run: Callable[[EvaluatedLM], tuple[dict[str, Any], list[dict]]]


@dataclass(frozen=True)
class Session:
    """Settings that the models of an evaluation share.

    Attributes:
        store: what an earlier evaluation found, and where this one keeps its own.
        world: the processes that share the work.
        batch_size: sequences per forward pass; None for as many as fit.
        progress: whether this process prints.
        versions: of the packages.
    """

    store: Store
    world: World
    batch_size: int | None
    progress: bool
    versions: dict[str, str]


class Candidate:
    """One model, loaded when something is left to measure on it.

    Attributes:
        label: its name in the results.
        row: what results.json has of it.
        items: by job, what it answered.
    """

    def __init__(self, label: str, directory: Path, jobs: Sequence[Job], session: Session) -> None:
        """Read what an earlier evaluation has found.

        Raises:
            UserError: if that was another model, or found with other settings.
        """
        self.label, self.directory, self.session = label, directory, session
        content, dtype = _content_hash(directory), str(default_dtype(session.world.device)).removeprefix("torch.")
        self.row: dict[str, Any] = {
            "path": str(directory),
            "config_hash": _hash(_config_file(directory))[:16],
            "content_hash": content,
            "dtype": dtype,
            "seconds": 0.0,
            "tasks": {},
            "texts": {},
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
        lm = self._load()
        lm.progress = Progress(f"{self.label} {job.name}", "tok", enabled=self.session.progress)
        store, key = self.session.store, self._keys[job.name]
        if job.kind == "tasks":  # a text needs every token's score, which a journal does not keep
            lm.journal = store.journal(self.label, job.name, key, self.session.world)
        try:
            result, items = job.run(lm)
        except UserError as error:
            raise UserError(f"{self.label}: {error}") from error
        if lm.journal is not None:
            lm.journal.close()
            lm.journal = None
        about = {"parameters": lm.model.num_parameters(), "trained_length": lm.trained_length}
        found = {"key": key, "model": about, "result": result, "items": items}
        if self.session.world.is_main:
            store.write(self.label, job.name, found)
        return found

    def _load(self) -> EvaluatedLM:
        if self._lm is None:
            session = self.session
            with quiet(logging.ERROR):  # the harness warns about models that it did not load itself
                self._lm = EvaluatedLM.load(self.directory, session.world.device, session.batch_size, session.world)
        return self._lm


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
