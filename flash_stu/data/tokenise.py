"""One part of a corpus, tokenised so that it can be stopped at any moment and continued.

What a part has done is on disk as its shards and its state: the next document to read, and how many tokens of
each shard belong to the documents before it. The state is replaced, at once, every few seconds, after the tokens
it counts are on the disk. A killed process loses what it did since, and the next one does the same again.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from flash_stu.data.corpus import assign_splits
from flash_stu.data.progress import Progress
from flash_stu.data.shards import SHARD_TOKENS, Shard, ShardWriter
from flash_stu.data.tokenizer import Tokenizer, naming_documents
from flash_stu.data.unit import Unit
from flash_stu.errors import UserError
from flash_stu.files import DamagedError, read_object, write_object

SPLITS = ("train", "validation")
_CHUNK = 2**18  # characters of text that one thread tokenises at a time
_AHEAD = 4  # chunks in work for each thread
_COMMIT_EVERY = 5.0  # seconds


class Position(NamedTuple):
    """A place between two documents: the unit, and how many documents of it come before."""

    unit: int
    document: int


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of one unit as they are stored, and the position after them.

    Attributes:
        name: the unit's.
        first: number of the first document in the unit, from 1.
        split: the unit's.
        texts: the documents.
        end: the position after them.
    """

    name: str
    first: int
    split: str | None
    texts: list[str]
    end: Position


@dataclass(frozen=True)
class Encoded:
    """Consecutive documents of one split as one array of ids, each document with its end-of-text token."""

    split: str
    ids: np.ndarray
    num_documents: int
    num_bytes: int


class State(BaseModel):
    """What a part has safely on disk: all documents before a position, in the shards of each split."""

    model_config = ConfigDict(strict=True)

    unit: int
    document: int = 0
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    finished: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of text done."""
        return sum(shard.num_bytes for shards in self.shards.values() for shard in shards)


class Part:
    """A range of a corpus's units on its way to token shards.

    Args:
        staging: the directory that all parts of the corpus share.
        index: number of this part, from 0.
        units: (first, after the last) of the part.
    """

    def __init__(self, staging: Path, index: int, units: tuple[int, int]):
        self.number = index
        self.first, self.last = units
        self._staging = staging
        self._prefix = f"shard-{index:04d}"
        self._path = staging / f"part-{index:04d}.json"

    def state(self) -> State:
        """Read what has been done.

        Raises:
            UserError: naming the file, if it is damaged.
        """
        try:
            return State.model_validate(read_object(self._path))
        except FileNotFoundError:
            return State(unit=self.first)
        except (DamagedError, ValidationError) as error:
            raise UserError(f"{self._path} is damaged; {self._remedy}") from error

    def tokenise(self, units: list[Unit], tokenizer: Tokenizer, fraction: float, meter: Progress) -> State:
        """Go on from the state to the end of the part.

        Args:
            units: all units of the corpus.
            tokenizer: makes the tokens.
            fraction: share of the documents held out where each document's hash decides.
            meter: told of every chunk.

        Returns:
            the state at the end.

        Raises:
            UserError: if a document cannot be read.
            OSError: if tokens cannot be written.
        """
        state = self.state()
        writers = self._writers(state, tokenizer)

        def encode(chunk: Chunk) -> tuple[list[Encoded], Position]:
            return encode_chunk(chunk, tokenizer, fraction), chunk.end

        chunks = cut_chunks(units[: self.last], Position(state.unit, state.document))
        last_commit = time.monotonic()
        with closing(in_order(encode, chunks, _num_threads())) as results:
            for encoded, position in results:
                for piece in encoded:
                    writers[piece.split].add(piece.ids, piece.num_documents, piece.num_bytes)
                    meter.update(piece.num_documents, piece.num_bytes, len(piece.ids))
                if time.monotonic() - last_commit >= _COMMIT_EVERY:
                    self._commit(position, {split: writer.commit() for split, writer in writers.items()})
                    last_commit = time.monotonic()
        shards = {split: writer.finish() for split, writer in writers.items()}
        return self._commit(Position(self.last, 0), shards, finished=True)

    def _writers(self, state: State, tokenizer: Tokenizer) -> dict[str, ShardWriter]:
        writers = {}
        for split in SPLITS:
            directory = self._staging / split
            directory.mkdir(exist_ok=True)
            try:
                writers[split] = ShardWriter(directory, tokenizer, self._prefix, SHARD_TOKENS, state.shards[split])
            except UserError as error:
                raise UserError(f"{error}; {self._remedy}") from error
        return writers

    @property
    def _remedy(self) -> str:
        return f"delete {self._path} to do this part again"

    def _commit(self, position: Position, shards: dict[str, list[Shard]], finished: bool = False) -> State:
        state = State(unit=position.unit, document=position.document, shards=shards, finished=finished)
        write_object(self._path, state.model_dump())
        return state


def cut_chunks(units: list[Unit], start: Position) -> Iterator[Chunk]:
    """Cut the documents from a position on into enough work for a thread; where depends on the text alone."""
    for number in range(start.unit, len(units)):
        unit = units[number]
        skipped = start.document if number == start.unit else 0
        texts, size = [], 0
        for document, text in enumerate(islice(unit.read(), skipped, None), start=skipped + 1):
            texts.append(text)
            size += len(text)
            if size >= _CHUNK:
                yield Chunk(unit.name, skipped + 1, unit.split, texts, Position(number, document))
                texts, size, skipped = [], 0, document
        if texts:
            yield Chunk(unit.name, skipped + 1, unit.split, texts, Position(number + 1, 0))


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer, fraction: float) -> list[Encoded]:
    """Split and tokenise a chunk; see `assign_splits`.

    Raises:
        UserError: naming the document, if the tokenizer fails on one.
    """
    texts = {split: [] for split in SPLITS}
    for split, text in assign_splits(chunk.texts, chunk.split, fraction):
        texts[split].append(text)
    with naming_documents(tokenizer, chunk.texts, chunk.name, chunk.first):
        return [
            Encoded(split, tokenizer.encode_documents(some), len(some), sum(len(text.encode()) for text in some))
            for split, some in texts.items()
            if some
        ]


def in_order(function: Callable, items: Iterable, threads: int) -> Iterator:
    """Apply a function in several threads while the caller reads items and uses results, in the items' order."""
    pool = ThreadPoolExecutor(threads)
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= _AHEAD * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _num_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
