"""Tokenizes one part of a dataset such that it can be stopped at any moment and resumed.

A part is a range of the dataset's fragments. What is done of it is on disk as its shards and its checkpoint: the next
document to read, and how many tokens of each shard belong to the documents before it. The checkpoint is replaced
atomically every few seconds, after the tokens that it counts have been flushed. A killed process loses what it did
since, and the next one does the same again.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flash_stu.data.shards import SHARD_TOKENS, Shard, ShardWriter
from flash_stu.data.sources import SPLITS, Fragment, assign_splits
from flash_stu.data.tokenizer import Tokenizer, naming_documents
from flash_stu.errors import UserError
from flash_stu.files import write_object
from flash_stu.progress import Progress
from flash_stu.reading import DamagedError, read_object

T = TypeVar("T")
R = TypeVar("R")

_BATCH = 2**18  # characters of text that one thread tokenizes at a time
_AHEAD = 4  # batches in work for each thread
_COMMIT_EVERY = 5.0  # seconds


class TextBatch(NamedTuple):
    """Consecutive documents of one fragment as they are stored, and where the next document is."""

    name: str  # of the fragment
    first: int  # number of the first document in the fragment, from 1
    split: str | None  # of the fragment
    texts: list[str]
    next_fragment: int
    next_document: int  # how many documents of that fragment come before it


class TokenBatch(NamedTuple):
    """Documents of one split as one array of ids, each followed by its end-of-text token."""

    ids: np.ndarray
    num_documents: int
    num_bytes: int


class PartCheckpoint(BaseModel):
    """The state of a part on disk: all documents before the next one, in the shards of each split."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    fragment: int = Field(validation_alias="unit", serialization_alias="unit")  # as in files
    document: int = 0
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    finished: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of text done."""
        return sum(shard.num_bytes for shards in self.shards.values() for shard in shards)


class TokenizeProgress(Progress):
    """Progress in bytes of text, with tokens and documents; a line on stderr when it is made and when all is done.

    Args:
        title: what is going on.
        num_bytes: bytes of text to expect; None if unknown.
        enabled: whether anything is reported.
        done: bytes of text that an earlier process has done.
        note: printed after the title at the beginning.
    """

    def __init__(self, title: str, num_bytes: int | None, enabled: bool, done: int, note: str | None) -> None:
        super().__init__(title, "B", enabled=enabled)
        self._documents = self._bytes = self._tokens = 0
        self._print("; ".join([f"{done / 1e6:.1f} MB are done"] * bool(done) + [note or ""] * bool(note)))
        self.start(num_bytes, done)

    def add(self, batch: TokenBatch) -> None:
        """Count documents that have just been tokenized."""
        self._documents += batch.num_documents
        self._bytes += batch.num_bytes
        self._tokens += len(batch.ids)
        self.update(batch.num_bytes, self._figures() if self.bar is None else self._rate())

    def finish(self) -> None:
        """Report the whole."""
        self.close()
        self._print(f"{self._documents:,} documents, {self._figures()}")

    def _rate(self) -> str:
        return f"{self._tokens / self.seconds / 1e6:.2f}M tokens/s"

    def _figures(self) -> str:
        speed = f"{self._bytes / self.seconds / 1e6:.1f} MB/s, {self._rate()}"
        return f"{self._bytes / 1e6:.1f} MB -> {self._tokens:,} tokens in {self.seconds:.1f} s ({speed})"

    def _print(self, text: str) -> None:
        if self.enabled:
            print(f"{self.title}{': ' * bool(text)}{text}", file=sys.stderr, flush=True)


class Part:
    """A range of a dataset's fragments, to be tokenized by one process.

    Args:
        directory: where all parts of the dataset are written.
        index: number of this part, from 0.
        fragments: (first, after the last) of the part.
    """

    def __init__(self, directory: Path, index: int, fragments: tuple[int, int]) -> None:
        self.index = index
        self.first, self.last = fragments
        self._directory = directory
        self._prefix = f"shard-{index:04d}"
        self._path = directory / f"part-{index:04d}.json"

    def checkpoint(self) -> PartCheckpoint:
        """Read what has been done.

        Raises:
            UserError: naming the file, if it is damaged.
        """
        try:
            return PartCheckpoint.model_validate(read_object(self._path))
        except FileNotFoundError:
            return PartCheckpoint(fragment=self.first)
        except (DamagedError, ValidationError) as error:
            raise UserError(f"{self._path} is damaged; {self._remedy}") from error

    def tokenize(
        self, fragments: list[Fragment], tokenizer: Tokenizer, fraction: float, progress: TokenizeProgress
    ) -> PartCheckpoint:
        """Tokenize what the checkpoint leaves of the part, given all fragments of the dataset.

        Returns:
            the checkpoint of the finished part.

        Raises:
            UserError: if a document cannot be read.
            OSError: if tokens cannot be written.
        """
        start = self.checkpoint()
        writers = {}
        for split in SPLITS:
            (self._directory / split).mkdir(exist_ok=True)
            known = start.shards[split]
            try:
                writers[split] = ShardWriter(self._directory / split, tokenizer, self._prefix, SHARD_TOKENS, known)
            except UserError as error:
                raise UserError(f"{error}; {self._remedy}") from error

        batches = text_batches(fragments[: self.last], start.fragment, start.document)
        last_commit = time.monotonic()
        work = partial(encode_batch, tokenizer=tokenizer, fraction=fraction)
        with closing(in_order(work, batches, _num_threads())) as results:
            for batch, encoded in results:
                for split, tokens in encoded.items():
                    writers[split].add(*tokens)
                    progress.add(tokens)
                if time.monotonic() - last_commit >= _COMMIT_EVERY:
                    shards = {split: writer.commit() for split, writer in writers.items()}
                    self._commit(fragment=batch.next_fragment, document=batch.next_document, shards=shards)
                    last_commit = time.monotonic()
        shards = {split: writer.finish() for split, writer in writers.items()}
        checkpoint = self._commit(fragment=self.last, document=0, shards=shards, finished=True)
        progress.finish()
        return checkpoint

    @property
    def _remedy(self) -> str:
        return f"delete {self._path} to do this part again"

    def _commit(
        self, fragment: int, document: int, shards: dict[str, list[Shard]], finished: bool = False
    ) -> PartCheckpoint:
        checkpoint = PartCheckpoint(fragment=fragment, document=document, shards=shards, finished=finished)
        write_object(self._path, checkpoint.model_dump(by_alias=True))
        return checkpoint


def text_batches(fragments: list[Fragment], fragment: int, document: int) -> Iterator[TextBatch]:
    """Cut the documents from one on into batches, each enough work for a thread; where depends on the text alone.

    The first one is after `document` documents of the fragment with that number.
    """
    for number in range(fragment, len(fragments)):
        name, split = fragments[number].name, fragments[number].split
        skipped = document if number == fragment else 0
        texts, size = [], 0
        for index, text in enumerate(islice(fragments[number].read(), skipped, None), start=skipped + 1):
            texts.append(text)
            size += len(text)
            if size >= _BATCH:
                yield TextBatch(name, skipped + 1, split, texts, number, index)
                texts, size, skipped = [], 0, index
        if texts:
            yield TextBatch(name, skipped + 1, split, texts, number + 1, 0)


def encode_batch(batch: TextBatch, tokenizer: Tokenizer, fraction: float) -> dict[str, TokenBatch]:
    """Returns the tokens of each split that has documents in a batch; see `assign_splits`.

    Raises:
        UserError: naming the document, if the tokenizer fails on one.
    """
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, text in assign_splits(batch.texts, batch.split, fraction):
        texts[split].append(text)
    with naming_documents(tokenizer, batch.texts, batch.name, batch.first):
        return {
            split: TokenBatch(tokenizer.encode_documents(some), len(some), sum(len(text.encode()) for text in some))
            for split, some in texts.items()
            if some
        }


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[tuple[T, R], None, None]:
    """Apply a function in several threads while the caller reads items and uses (item, result), in the items' order."""
    pool = ThreadPoolExecutor(threads)
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) >= _AHEAD * threads:
                item, result = pending.popleft()
                yield item, result.result()
        for item, result in pending:
            yield item, result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _num_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
