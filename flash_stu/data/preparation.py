"""From a data config to memory-mapped tokens, tokenized once, by one process or in parts on several machines.

Tokens are kept in a cache. Beside the cache entry that it will become lies a hidden directory of unfinished work:

    job.json               how the dataset is divided into parts, and the commit of a hub dataset
    part-0000.json ...     the checkpoint of each part, see flash_stu.data.tokenize
    train/ validation/     the shards, without their manifests

The process that finishes the last part writes the manifests and renames the directory to the entry, or moves into the
entry the split that somebody has deleted there. Files are deleted by their names, and only those written here.
"""

import hashlib
import json
import os
import re
import sys
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import platformdirs
from pydantic import BaseModel, ValidationError

from flash_stu.data.shards import FORMAT, MANIFEST, Shard, TokenDataset, write_manifest
from flash_stu.data.sources import SPLITS, DataConfig, DataSource, Fragment, open_source
from flash_stu.data.tokenize import Part, PartCheckpoint, TokenizeProgress
from flash_stu.data.tokenizer import Tokenizer, load_tokenizer
from flash_stu.errors import UserError, writing
from flash_stu.files import directories_above, sweep, write_object
from flash_stu.locks import lock, unlock
from flash_stu.reading import DamagedError, read_object

_REVISION = 1  # part of the cache key: raise it when the same config and text give other tokens


@dataclass(frozen=True)
class PreparedData:
    """The two splits of a tokenized dataset, and the directory that holds their shards."""

    train: TokenDataset
    validation: TokenDataset
    directory: Path


def prepare(config: DataConfig, progress: bool = True) -> PreparedData:
    """Tokenize a dataset, or open the tokens of an earlier time.

    Tokens are kept in cache_dir under a key of everything that determines them: the tokenizer, the files'
    names, sizes and times (for a hub dataset its name and revision), and how documents are chosen and split.
    What a stopped process has done is not done again. Any number of processes may call this at once: one
    works, the others wait and open its result. Where locks do not reach (nodes on some network file systems)
    several may work, on the same bytes of the same files, and the first to finish wins.

    Args:
        config: what to tokenize. A dataset directory that already holds shards (train/ and validation/, each
            with its manifest.json) is opened as it is.
        progress: report on stderr: which files are read and which are not, and a bar on a terminal or a line now and
            then elsewhere.

    Raises:
        UserError: see `load_tokenizer`, `iter_documents` and `TokenDataset`; also if a split comes out empty,
            the cache directory cannot be written, or the dataset is being tokenized in several parts.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    directory, _ = _tokenize(config, tokenizer, 0, 1, progress)
    train, validation = (TokenDataset(directory / split, tokenizer) for split in SPLITS)
    return PreparedData(train, validation, directory)


def prepare_part(config: DataConfig, index: int, parts: int, progress: bool = True) -> list[int]:
    """Tokenize one part of a dataset; the last part to be finished completes what `prepare` opens.

    The parts may be worked on at any time, in any order, by processes on any machines that share cache_dir.
    Joined in order they are the tokens that one process would write.

    Args:
        config: see `prepare`.
        index: which part, from 0.
        parts: how many parts there are; the same for all of them.
        progress: see `prepare`.

    Returns:
        the parts that are still to be finished; none if the dataset is complete.

    Raises:
        UserError: see `prepare`; also for more parts than the dataset can be divided into.
    """
    return _tokenize(config, load_tokenizer(config.tokenizer), index, parts, progress)[1]


def divide(fragments: list[Fragment], parts: int) -> list[tuple[int, int]]:
    """Divide fragments into consecutive parts of about equal size, none of them empty.

    Args:
        fragments: in order; counted as equally large unless the size of each is known.
        parts: at most as many as there are fragments.

    Returns:
        (first fragment, fragment after the last) of each part.
    """
    sizes = [1] * len(fragments) if not _num_bytes(fragments) else [each.num_bytes or 0 for each in fragments]
    before = list(accumulate(sizes, initial=0))  # bytes before each fragment, and in all
    borders = [0]
    for part in range(1, parts):
        fair = bisect_left(before, before[-1] * part // parts)
        borders.append(min(max(fair, borders[-1] + 1), len(fragments) - (parts - part)))
    borders.append(len(fragments))
    return list(pairwise(borders))


def _tokenize(
    config: DataConfig, tokenizer: Tokenizer, index: int, parts: int, progress: bool
) -> tuple[Path, list[int]]:
    """Do a part unless that is done; returns the directory of the tokens and the parts that remain."""
    given = Path(config.dataset)
    if _is_complete(given):
        return given, []
    source = open_source(config)
    directory = _entry(config, tokenizer, source)
    if _is_complete(directory):
        return directory, []
    return directory, Preparation(directory, source, tokenizer, progress).run(index, parts)


def _entry(config: DataConfig, tokenizer: Tokenizer, source: DataSource) -> Path:
    """Returns the cache entry: its name is a readable beginning and a hash of all that determines its tokens."""
    key = json.dumps([FORMAT, _REVISION, tokenizer.fingerprint, source.identity()], sort_keys=True)
    words = f"{Path(config.dataset).name}-{tokenizer.spec.split(':')[-1].split('/')[-1]}"
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", words).strip("._")[:60]
    cache = config.cache_dir or Path(platformdirs.user_cache_dir("flash_stu"), "tokens")
    return Path(cache).absolute() / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"


class Plan(BaseModel):
    """The (first fragment, fragment after the last) of each part, and the commit of a hub dataset."""

    parts: list[tuple[int, int]]
    commit: str | None


class Preparation:
    """Makes a cache entry; its directory is an absolute path."""

    def __init__(self, directory: Path, source: DataSource, tokenizer: Tokenizer, progress: bool) -> None:
        self._directory = directory
        self._config = source.config
        self._source = source
        self._tokenizer = tokenizer
        self._progress = progress
        self._path = directory.with_name(f".{directory.name}.unfinished")

    def run(self, index: int, parts: int) -> list[int]:
        """Do what is left of a part, and complete the entry if no part remains; returns the parts that remain.

        Waits if another process works on the same part.
        """
        try:
            with writing(f"token shards in {self._directory}"), self._lock(f"part-{index:04d}"):
                self._refuse_remains()
                remaining = [] if _is_complete(self._directory) else self._tokenize(index, parts)
        except UserError:
            if not _is_complete(self._directory):  # as a process that our lock does not reach may have made it
                raise
            remaining = []
        if not remaining:
            self._discard()
        return remaining

    def _tokenize(self, index: int, parts: int) -> list[int]:
        with self._lock("job"):
            plan = self._join(parts)
        try:
            done = self._do(Part(self._path, index, plan.parts[index]), plan)
        except BaseException:
            if parts == 1 and not list(self._path.glob("part-*")):  # there is nothing to resume from
                self._discard()
            raise
        with self._lock("job"):
            if _is_complete(self._directory):
                return []
            checkpoints = self._checkpoints(plan.parts)
            checkpoints[index] = done  # a process that our lock does not reach may have replaced it by an older one
            unfinished = [number for number, each in enumerate(checkpoints) if not each.finished]
            if not unfinished:
                self._finish(checkpoints)
            return unfinished

    def _join(self, parts: int) -> Plan:
        """Plan the preparation, or read the plan of one that was begun."""
        path = self._path / "job.json"
        if path.exists():
            try:
                plan = Plan.model_validate(read_object(path))
            except (DamagedError, ValidationError) as error:
                raise UserError(f"{path} is damaged; delete {self._path} to start again") from error
            if len(plan.parts) != parts:
                self._refuse_other_number(plan.parts, parts)
            self._source.commit = plan.commit
            return plan
        fragments = self._source.fragments()
        if parts > max(len(fragments), 1):
            cut_off = "; with data.max_documents each split is one" if self._config.max_documents else ""
            raise UserError(
                f"data.dataset {self._config.dataset!r} cannot be divided into {parts} parts: it has "
                f"{len(fragments)} file(s) or parquet row group(s){cut_off}"
            )
        plan = Plan(parts=divide(fragments, parts), commit=self._source.commit)
        write_object(path, plan.model_dump())
        return plan

    def _refuse_other_number(self, begun: list[tuple[int, int]], parts: int) -> None:
        done = [str(number) for number, each in enumerate(self._checkpoints(begun), start=1) if each.finished]
        option = f" --part i/{len(begun)}" if len(begun) > 1 else ""
        raise UserError(
            f"data.dataset {self._config.dataset!r} is being prepared in {len(begun)} part(s), not {parts} "
            f"(finished: {', '.join(done) or 'none'}); resume with scripts/prepare_data.py{option}, "
            f"or delete {self._path} to start again"
        )

    def _do(self, part: Part, plan: Plan) -> PartCheckpoint:
        checkpoint = part.checkpoint()
        if checkpoint.finished:
            return checkpoint
        fragments = self._source.fragments()
        if len(fragments) != plan.parts[-1][1]:
            raise UserError(
                f"data.dataset {self._config.dataset!r} has {len(fragments)} file(s) or row group(s) and had "
                f"{plan.parts[-1][1]} when {self._path} was begun; delete that to start again"
            )
        name = f", part {part.index + 1} of {len(plan.parts)}" if len(plan.parts) > 1 else ""
        title = f"tokenising {self._config.dataset} with {self._tokenizer.spec}{name}"
        expected = _num_bytes(fragments[part.first : part.last])
        with TokenizeProgress(title, expected, self._progress, checkpoint.num_bytes, self._source.summary) as progress:
            return part.tokenize(fragments, self._tokenizer, self._config.validation_fraction, progress)

    def _finish(self, checkpoints: list[PartCheckpoint]) -> None:
        """Write the manifests over the shards of all parts, and move the tokens to the entry."""
        shards = {split: [shard for each in checkpoints for shard in each.shards[split]] for split in SPLITS}
        if empty := self._find_empty(shards):
            self._discard()
            raise UserError(empty)
        for split in SPLITS:
            write_manifest(self._path / split, self._tokenizer, shards[split])
        try:
            os.rename(self._path, self._directory)
        except OSError:  # the entry is there, or a process that our lock does not reach was faster
            for split in SPLITS:
                if not (self._directory / split / MANIFEST).is_file():
                    os.rename(self._path / split, self._directory / split)
        _delete([*_checkpoint_files(self._directory), self._directory / "job.json"])
        for split in SPLITS:
            TokenDataset(self._directory / split)  # compute checksums once, before the others open it
        if self._progress:
            print(f"tokens are in {self._directory}", file=sys.stderr)

    def _checkpoints(self, parts: list[tuple[int, int]]) -> list[PartCheckpoint]:
        return [Part(self._path, index, fragments).checkpoint() for index, fragments in enumerate(parts)]

    def _find_empty(self, shards: dict[str, list[Shard]]) -> str | None:
        """Returns a message on the split without documents; None if there is none."""
        counts = {split: sum(shard.num_documents for shard in shards[split]) for split in SPLITS}
        name, total = f"data.dataset {self._config.dataset!r}", sum(counts.values())
        if not total:
            return f"{name} is empty: it has no document with text in it"
        empty = next((split for split, count in counts.items() if not count), None)
        return empty and (
            f"{name}: its {total} document(s) leave the {empty} split empty; give it a file named {empty}*, or change "
            f"data.validation_fraction ({self._config.validation_fraction}) or data.max_documents"
        )

    def _refuse_remains(self) -> None:
        """Refuse an entry of which somebody has deleted some files; a split that is deleted whole is made again."""
        for path in (self._directory / split for split in SPLITS):
            if path.is_dir() and not (path / MANIFEST).is_file() and any(path.iterdir()):
                raise UserError(f"{path} has no {MANIFEST} and is not empty; delete it to tokenise again")

    def _discard(self) -> None:
        """Delete what has been written in the unfinished directory, and that unless something else is in it."""
        directories = [self._path / split for split in SPLITS]
        tokens = [path for each in directories for path in (*each.glob("shard-*.bin"), each / MANIFEST)]
        # the plan last: the others have a meaning only with it
        _delete([*_checkpoint_files(self._path), *tokens, self._path / "job.json"])
        for directory in [*directories, self._path]:
            with suppress(OSError):
                directory.rmdir()

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Hold a lock beside the entry; the one of a part gives the right to work on it."""
        path = self._directory.with_name(f".{self._directory.name}.{name}.lock")
        with directories_above(path):
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


def _is_complete(directory: Path) -> bool:
    """Returns whether a directory holds the tokens of both splits."""
    return all((directory / split / MANIFEST).is_file() for split in SPLITS)


def _checkpoint_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("part-????.json"))


def _delete(paths: list[Path]) -> None:
    """Delete files in this order, and temporary files of killed writers of them."""
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            sweep(path)


def _num_bytes(fragments: list[Fragment]) -> int | None:
    """Returns the bytes of text in fragments; None unless the size of each is known."""
    sizes = [each.num_bytes for each in fragments if each.num_bytes is not None]
    return sum(sizes) if len(sizes) == len(fragments) else None
