"""A corpus on its way into the cache: divided into parts, tokenised by one process or several, put in place.

Beside the cache entry that it will become lies, hidden, a staging directory:

    job.json               how the corpus is divided, and the commit of a hub dataset
    part-0000.json ...     how far each part has come, see flash_stu.data.tokenise
    train/ validation/     the shards, without their manifests

Whoever finishes the last part writes the manifests and gives the directory the name of the entry, or moves into the
entry the split that somebody has deleted there. Files are deleted by their names, and only such as are written here.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError

from flash_stu.data.config import DataConfig
from flash_stu.data.corpus import Source
from flash_stu.data.progress import Progress
from flash_stu.data.shards import MANIFEST, Shard, TokenDataset, write_manifest
from flash_stu.data.tokenise import SPLITS, Part, State
from flash_stu.data.tokenizer import Tokenizer
from flash_stu.data.unit import Unit, divide
from flash_stu.errors import UserError, writing
from flash_stu.files import DamagedError, read_object, sweep, write_object
from flash_stu.locks import lock, unlock


class Job(BaseModel):
    """The (first unit, unit after the last) of each part, and the commit of a hub dataset."""

    parts: list[tuple[int, int]]
    commit: str | None


class Staging:
    """The directory in which a cache entry is made.

    Args:
        directory: the entry, an absolute path.
        config: of the corpus.
        source: of the corpus.
        tokenizer: makes the tokens.
        progress: report on stderr.
    """

    def __init__(self, directory: Path, config: DataConfig, source: Source, tokenizer: Tokenizer, progress: bool):
        self._directory = directory
        self._config = config
        self._source = source
        self._tokenizer = tokenizer
        self._progress = progress
        self._path = directory.with_name(f".{directory.name}.unfinished")

    def tokenise(self, index: int, parts: int) -> list[int]:
        """Do what is left of a part, and complete the entry if no part remains.

        Waits if another process is at the same part.

        Returns:
            the parts that remain.

        Raises:
            UserError: if another number of parts has been begun, the corpus cannot be read or divided into so
                many, a split comes out empty, or tokens cannot be written.
        """
        missing = [parent for parent in self._directory.parents if not parent.exists()]
        try:
            with writing(f"token shards in {self._directory}"), self._lock(f"part-{index:04d}"):
                self._refuse_remains()
                remaining = [] if is_complete(self._directory) else self._tokenise(index, parts)
        except UserError:
            if not is_complete(self._directory):  # as a process that our lock does not reach may have made it
                with suppress(OSError):  # the first that is not empty ends it
                    for parent in missing:
                        parent.rmdir()
                raise
            remaining = []
        if not remaining:
            self._discard()
        return remaining

    def _tokenise(self, index: int, parts: int) -> list[int]:
        with self._lock("job"):
            job = self._join(parts)
        try:
            state = self._do(Part(self._path, index, job.parts[index]), job)
        except BaseException:
            if parts == 1 and not list(self._path.glob("part-*")):  # there is nothing to go on from
                self._discard()
            raise
        with self._lock("job"):
            if is_complete(self._directory):
                return []
            states = self._states(job)
            states[index] = state  # which a process that our lock does not reach may have replaced by an older one
            unfinished = [number for number, each in enumerate(states) if not each.finished]
            if not unfinished:
                self._finish(states)
            return unfinished

    def _join(self, parts: int) -> Job:
        """Begin the job, or read how it was begun."""
        path = self._path / "job.json"
        if path.exists():
            try:
                job = Job.model_validate(read_object(path))
            except (DamagedError, ValidationError) as error:
                raise UserError(f"{path} is damaged; delete {self._path} to start again") from error
            if len(job.parts) != parts:
                raise UserError(self._other_parts(job, parts))
            return job
        commit = self._source.commit()
        units = self._source.units(commit)
        if parts > max(len(units), 1):
            cut_off = "; with data.max_documents each split is one" if self._config.max_documents else ""
            raise UserError(
                f"data.dataset {self._config.dataset!r} cannot be divided into {parts} parts: it has "
                f"{len(units)} file(s) or parquet row group(s){cut_off}"
            )
        job = Job(parts=divide(units, parts), commit=commit)
        write_object(path, job.model_dump())
        return job

    def _other_parts(self, job: Job, parts: int) -> str:
        done = [number for number, state in enumerate(self._states(job), start=1) if state.finished]
        shard = f" --shard i/{len(job.parts)}" if len(job.parts) > 1 else ""
        return (
            f"data.dataset {self._config.dataset!r} is being prepared in {len(job.parts)} part(s), not {parts} "
            f"(finished: {', '.join(map(str, done)) or 'none'}); go on with scripts/prepare_data.py{shard}, "
            f"or delete {self._path} to start again"
        )

    def _do(self, part: Part, job: Job) -> State:
        state = part.state()
        if state.finished:
            return state
        units = self._source.units(job.commit)
        if len(units) != job.parts[-1][1]:
            raise UserError(
                f"data.dataset {self._config.dataset!r} has {len(units)} file(s) or row group(s) and had "
                f"{job.parts[-1][1]} when {self._path} was begun; delete that to start again"
            )
        name = f", part {part.number + 1} of {len(job.parts)}" if len(job.parts) > 1 else ""
        title = f"tokenising {self._config.dataset} with {self._tokenizer.spec}{name}"
        expected = _num_bytes(units[part.first : part.last])
        with Progress(title, expected, self._progress, state.num_bytes, self._source.summary) as meter:
            return part.tokenise(units, self._tokenizer, self._config.validation_fraction, meter)

    def _finish(self, states: list[State]) -> None:
        """Give the tokens of all parts their manifests and their place."""
        shards = {split: [shard for state in states for shard in state.shards[split]] for split in SPLITS}
        try:
            self._refuse_empty(shards)
        except UserError:
            self._discard()
            raise
        for split in SPLITS:
            write_manifest(self._path / split, self._tokenizer, shards[split])
        try:
            os.rename(self._path, self._directory)
        except OSError:  # the entry is there, or a process that our lock does not reach was faster
            for split in SPLITS:
                if not (self._directory / split / MANIFEST).is_file():
                    os.rename(self._path / split, self._directory / split)
        _delete([*_parts(self._directory), self._directory / "job.json"])
        for split in SPLITS:
            TokenDataset(self._directory / split)  # compute checksums once, before the others open it
        if self._progress:
            print(f"tokens are in {self._directory}", file=sys.stderr)

    def _states(self, job: Job) -> list[State]:
        return [Part(self._path, number, units).state() for number, units in enumerate(job.parts)]

    def _refuse_empty(self, shards: dict[str, list[Shard]]) -> None:
        counts = {split: sum(shard.num_documents for shard in shards[split]) for split in SPLITS}
        dataset = self._config.dataset
        if not sum(counts.values()):
            raise UserError(f"data.dataset {dataset!r} is empty: it has no document with text in it")
        for split, count in counts.items():
            if not count:
                raise UserError(
                    f"data.dataset {dataset!r}: its {sum(counts.values())} document(s) leave the {split} split "
                    f"empty; give it a file named {split}*, or change data.validation_fraction "
                    f"({self._config.validation_fraction}) or data.max_documents"
                )

    def _refuse_remains(self) -> None:
        """Refuse an entry of which somebody has deleted a part; a split that is gone altogether is made again."""
        for path in (self._directory / split for split in SPLITS):
            if path.is_dir() and not (path / MANIFEST).is_file() and any(path.iterdir()):
                raise UserError(f"{path} has no {MANIFEST} and is not empty; delete it to tokenise again")

    def _discard(self) -> None:
        """Delete what has been written here, and the directory unless something else is in it."""
        directories = [self._path / split for split in SPLITS]
        tokens = [path for directory in directories for path in directory.glob("shard-*.bin")]
        manifests = [directory / MANIFEST for directory in directories]
        _delete([*_parts(self._path), *tokens, *manifests, self._path / "job.json"])  # in which the others have meaning
        for directory in [*directories, self._path]:
            with suppress(OSError):
                directory.rmdir()

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Hold a lock beside the entry; the one of a part gives the right to work on it."""
        path = self._directory.with_name(f".{self._directory.name}.{name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = lock(path)
        if descriptor is None:
            if self._progress:
                print(f"waiting for another process to write {self._directory}", file=sys.stderr)
            descriptor = lock(path, wait=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            unlock(descriptor)


def is_complete(directory: Path) -> bool:
    """Say whether a directory holds the tokens of both splits."""
    return all((directory / split / MANIFEST).is_file() for split in SPLITS)


def _parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("part-????.json"))


def _delete(paths: list[Path]) -> None:
    """Delete files in this order, and what writers of them that were killed have left."""
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            sweep(path)


def _num_bytes(units: list[Unit]) -> int | None:
    sizes = [unit.num_bytes for unit in units]
    return None if None in sizes else sum(sizes)
