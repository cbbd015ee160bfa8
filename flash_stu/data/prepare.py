"""From a data config to memory-mapped tokens, tokenised once."""

import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
from filelock import FileLock, Timeout

from flash_stu.data.config import DataConfig
from flash_stu.data.corpus import Source, open_source
from flash_stu.data.progress import Progress
from flash_stu.data.shards import FORMAT, MANIFEST, Shard, ShardWriter, TokenDataset, write_manifest
from flash_stu.data.tokenizer import Tokenizer, load_tokenizer
from flash_stu.errors import UserError

SPLITS = ("train", "validation")
_REVISION = 1  # part of the cache key: raise it when the same config and text give other tokens
_CHUNK = 2**18  # characters of text that one thread tokenises at a time


@dataclass(frozen=True)
class Encoded:
    """Consecutive documents of one split as one array of ids, each document with its end-of-text token."""

    split: str
    ids: np.ndarray
    num_documents: int
    num_bytes: int


@dataclass(frozen=True)
class PreparedData:
    """A tokenised corpus: its two splits, the tokenizer, and the directory that holds the shards."""

    train: TokenDataset
    validation: TokenDataset
    tokenizer: Tokenizer
    directory: Path


def prepare(config: DataConfig, progress: bool = True) -> PreparedData:
    """Tokenise a corpus, or open the tokens of an earlier time.

    Tokens are kept in cache_dir under a key of everything that determines them: the tokenizer, the files'
    names, sizes and times (for a hub dataset its name and revision), and how documents are chosen and split.
    Any number of processes may call this at once: one works, the others wait and open its result. Where locks
    do not reach (nodes on some network file systems) several may work, and the first to finish wins.

    Args:
        config: what to tokenise. A dataset directory that already holds shards (train/ and validation/, each
            with its manifest.json) is opened as it is.
        progress: report on stderr: a bar on a terminal, a line now and then elsewhere.

    Raises:
        UserError: see `load_tokenizer`, `iter_documents` and `TokenDataset`; also if a split comes out empty
            or the cache directory cannot be written.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    given = Path(config.dataset).expanduser()
    if _complete(given):
        return _open(given, tokenizer)

    source = open_source(config)
    directory = _cache_directory(config) / _entry_name(config, tokenizer, source)
    if not _complete(directory):
        with _lock(directory, progress):
            if not _complete(directory):
                _tokenise(config, source, tokenizer, directory, progress)
            return _open(directory, tokenizer)  # checksums are computed before the others open it
    return _open(directory, tokenizer)


def encode_in_parallel(documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, threads: int) -> Iterator[Encoded]:
    """Tokenise (split, document) pairs in several threads while the caller reads and writes.

    Documents of one split come out in the order in which they go in, whatever the number of threads.
    """

    def encode(split: str, texts: list[str]) -> Encoded:
        num_bytes = sum(len(text.encode()) for text in texts)
        return Encoded(split, tokenizer.encode_documents(texts), len(texts), num_bytes)

    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for split, texts in _chunks(documents):
            pending.append(pool.submit(encode, split, texts))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _tokenise(config: DataConfig, source: Source, tokenizer: Tokenizer, directory: Path, progress: bool) -> None:
    """Write both splits to a temporary directory, then give it its name; the caller holds the lock."""
    mine = f".{directory.name}.{socket.gethostname()}."
    for leftover in directory.parent.glob(f"{mine}*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a killed process on this host
    temporary = directory.with_name(f"{mine}{os.getpid()}")
    title = f"tokenising {config.dataset} with {tokenizer.spec}"
    try:
        with _writing(directory):
            for split in SPLITS:
                (temporary / split).mkdir(parents=True)
        writers = {split: ShardWriter(temporary / split, tokenizer) for split in SPLITS}
        with Progress(title, source.num_bytes, progress) as meter:
            for encoded in encode_in_parallel(source.read(), tokenizer, _num_threads()):
                with _writing(directory):
                    writers[encoded.split].add(encoded.ids, encoded.num_documents, encoded.num_bytes)
                meter.update(encoded.num_documents, encoded.num_bytes, len(encoded.ids))
        with _writing(directory):
            shards = {split: writer.finish() for split, writer in writers.items()}
            _refuse_empty(config, shards)
            for split in SPLITS:
                write_manifest(temporary / split, tokenizer, shards[split])
            _rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if progress:
        print(f"tokens are in {directory}", file=sys.stderr)


def _chunks(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Gather the documents of each split until they are enough work for a thread."""
    gathered: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for split, text in documents:
        gathered[split].append(text)
        sizes[split] += len(text)
        if sizes[split] >= _CHUNK:
            yield split, gathered[split]
            gathered[split] = []
            sizes[split] = 0
    yield from ((split, texts) for split, texts in gathered.items() if texts)


def _refuse_empty(config: DataConfig, shards: dict[str, list[Shard]]) -> None:
    counts = {split: sum(shard.num_documents for shard in shards[split]) for split in SPLITS}
    if not sum(counts.values()):
        raise UserError(f"data.dataset {config.dataset!r} is empty: it has no document with text in it")
    for split, count in counts.items():
        if not count:
            raise UserError(
                f"data.dataset {config.dataset!r}: its {sum(counts.values())} document(s) leave the {split} "
                f"split empty; give it a file named {split}*, or change data.validation_fraction "
                f"({config.validation_fraction}) or data.max_documents"
            )


def _rename(temporary: Path, directory: Path) -> None:
    """Put a finished entry in place, unless another host was first: what it wrote is the same."""
    if not _complete(directory):
        shutil.rmtree(directory, ignore_errors=True)  # someone deleted a split of it
    try:
        os.rename(temporary, directory)
    except OSError:
        if not _complete(directory):
            raise


def _complete(directory: Path) -> bool:
    return all((directory / split / MANIFEST).is_file() for split in SPLITS)


def _open(directory: Path, tokenizer: Tokenizer) -> PreparedData:
    train, validation = (TokenDataset(directory / split, tokenizer) for split in SPLITS)
    return PreparedData(train, validation, tokenizer, directory)


def _entry_name(config: DataConfig, tokenizer: Tokenizer, source: Source) -> str:
    """Name the cache entry: something to recognise it by, and a hash of all that determines its tokens."""
    key = json.dumps([FORMAT, _REVISION, tokenizer.fingerprint, source.identity], sort_keys=True)
    words = f"{Path(config.dataset).name}-{tokenizer.spec.split(':')[-1].split('/')[-1]}"
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", words).strip("._")[:60]
    return f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"


def _cache_directory(config: DataConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("flash_stu")) / "tokens"


def _num_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _lock(directory: Path, progress: bool) -> Iterator[None]:
    """Hold the right to write a cache entry."""
    with _writing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory.with_name(f".{directory.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                print(f"waiting for another process to write {directory}", file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Turn a failure to write into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"token shards cannot be written to {directory}: {error.strerror or error}") from error
