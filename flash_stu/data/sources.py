"""The data section of a run config, and the documents of the dataset it names, each with the split it belongs to.

A dataset is the embedded corpus, local files or a dataset on the Hugging Face hub, each a `DataSource`. It consists of
fragments, which can be read independently of each other, so that machines can share the work and a stopped
preparation can resume in the middle.
"""

import ast
import functools
import hashlib
import os
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, groupby, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, cast

from huggingface_hub import HfApi
from pydantic import Field

from flash_stu.data.formats import list_row_groups, read_texts, text_column
from flash_stu.data.local import find_files, looks_local
from flash_stu.errors import UserError
from flash_stu.network import HUB_TIMEOUT, ask_hub
from flash_stu.settings import Count, ExpandedPath, Section

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import IterableDataset

SPLITS = ("train", "validation")

_LEAST_HELD_OUT = 100  # characters of a single document; on fewer a loss says nothing
_EMBEDDED_REVISION = 1  # part of the identity: raise it when the embedded corpus is collected differently
_EMBEDDED_FRACTION = 0.05  # of the embedded corpus that is held out
# Tests carry no documentation; distributions ship the others as separate packages, or not at all.
_SKIPPED = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"),
    *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"),
}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_ROWS = 256  # rows of a hub dataset in memory at a time


class DataConfig(Section):
    """The text to train on, and how it becomes tokens."""

    dataset: ExpandedPath = Field(
        default="embedded",
        description="embedded (the corpus inside every Python installation), a local .parquet, .jsonl, .json or .txt "
        "file (the last three also compressed: .gz, .zst, .bz2), a directory or glob of such files, a directory of "
        "token shards made earlier, or the name of a dataset on the Hugging Face hub",
    )
    subset: str | None = Field(default=None, description="configuration of a hub dataset, such as sample-10BT")
    revision: str | None = Field(
        default=None, description="commit or tag of a hub dataset; null: what is current when it is tokenised"
    )
    text_column: str = Field(default="text", description="column (parquet, hub) or key (jsonl) that holds the text")
    tokenizer: ExpandedPath = Field(
        default="bytes",
        description="bytes, tiktoken:NAME such as tiktoken:o200k_base, or name or folder of a Hugging Face tokenizer",
    )
    separate_documents: bool = Field(
        default=False,
        description="keep the documents that share a sequence apart: no layer carries anything from one to the next; "
        "each begins at the end-of-text token before it. The published models are trained without",
    )
    cache_dir: ExpandedPath | None = Field(
        default=None, description="where token shards are kept; null: the user's cache directory"
    )
    validation_fraction: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="share of the documents held out where the dataset has no validation split; of a single document, "
        "the share of its text, at its end",
    )
    max_documents: Count | None = Field(
        default=None, description="read at most this many documents of the training and of the validation files"
    )


@dataclass(frozen=True)
class Fragment:
    """Consecutive documents of a dataset that can be read without the others: a file, or a row group of one."""

    name: str  # in messages
    split: str | None  # "train" or "validation"; None if each document's hash decides
    read: Callable[[], Iterable[str]]  # starts reading; returns the documents as stored, the same every time
    num_bytes: int | None = None  # of text, estimated; None if unknown


class DataSource(ABC):
    """A dataset that has been found and not been read."""

    summary: str | None = None
    """One line on the files that are read and those that are left out; None if there is no choice."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @cached_property
    def commit(self) -> str | None:
        """The commit at which a hub dataset is read: the current one unless assigned; None for other datasets."""
        return None

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """Returns everything that determines the documents, short of reading them, as plain JSON values."""

    def fragments(self) -> list[Fragment]:
        """Open the dataset; returns its fragments in order, training documents first."""
        found, limit = self._open(), self.config.max_documents
        return found if limit is None else first_documents(found, limit)

    @abstractmethod
    def _open(self) -> list[Fragment]:
        """Returns the fragments of the whole dataset."""


def iter_documents(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Read a dataset.

    Returns:
        (split, document) pairs, split being "train" or "validation"; no document is empty, each can be
        encoded as UTF-8, and the order is the same every time.

    Raises:
        UserError: if the dataset does not exist, cannot be read or has no such text column.
    """
    for fragment in open_source(config).fragments():
        yield from assign_splits(fragment.read(), fragment.split, config.validation_fraction)


def open_source(config: DataConfig) -> DataSource:
    """Find a dataset without reading its documents; see `iter_documents`."""
    if config.dataset == "embedded":
        return EmbeddedSource(config)
    return LocalSource(config) if looks_local(config.dataset) else HubSource(config)


def assign_splits(texts: Iterable[str], split: str | None, fraction: float) -> Iterator[tuple[str, str]]:
    """Returns the (split, document) pairs of the documents that are not blank.

    The split is that of all of them; None if each document's hash decides, which holds out a fraction of them.
    """
    for text in texts:
        if text and not text.isspace():
            yield split or ("validation" if in_validation(text, fraction) else "train"), text


def in_validation(document: str, fraction: float) -> bool:
    """Returns whether a document of a dataset without a validation split is held out.

    The answer depends on the document's text alone: equal documents fall on the same side, whatever the
    order, the number of files or the process that reads them, and a larger fraction keeps every document of a smaller
    one. The hash is not one in common use, because corpora are sorted, sampled and split by those.
    """
    text = document.encode(errors="surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8, person=b"flash-stu split").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def first_documents(fragments: Iterable[Fragment], number: int) -> list[Fragment]:
    """Keep a number of documents of each split; only reading tells where that ends, so a split is one fragment."""

    def joined(split: str | None, group: list[Fragment]) -> Fragment:
        def read() -> Iterator[str]:
            return islice(chain.from_iterable(fragment.read() for fragment in group), number)

        name = group[0].name if len(group) == 1 else f"{group[0].name} to {group[-1].name}"
        return Fragment(name, split, read)

    return [joined(split, list(group)) for split, group in groupby(fragments, lambda fragment: fragment.split)]


class EmbeddedSource(DataSource):
    """The embedded corpus; see `embedded_corpus`."""

    def identity(self) -> dict[str, object]:
        return {
            "embedded": _EMBEDDED_REVISION,
            "python": sys.version,
            "files": _describe(library_files()),
            "max_documents": self.config.max_documents,
        }

    def _open(self) -> list[Fragment]:
        corpus = embedded_corpus().items()
        return [Fragment("the embedded corpus", split, partial(iter, texts)) for split, texts in corpus]


@functools.cache
def embedded_corpus() -> dict[str, list[str]]:
    """Collect the documentation of the running Python: its language reference and its library's docstrings.

    A document is one pydoc topic, or all docstrings of one standard-library module in the order of its
    source. The modules are parsed, never imported. A docstring that appears again is dropped, so no text is
    in both splits. About 1.9 MB, the same for every run of one Python installation.

    Returns:
        documents of "train" (about 95 %) and "validation", split by the hash of each document.
    """
    corpus: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, document in assign_splits(_embedded_documents(), None, _EMBEDDED_FRACTION):
        corpus[split].append(document)
    return corpus


def library_files() -> list[tuple[str, Path]]:
    """List the standard library's documented modules as (name relative to the library, path), sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted((path.relative_to(root).as_posix(), path) for path in files)


def _embedded_documents() -> Iterator[str]:
    seen: set[str] = set()

    def new(text: str) -> bool:
        return bool(text) and not (text in seen or seen.add(text))

    for name in sorted(topics):
        if new(topics[name].strip()):
            yield topics[name].strip()
    for _, path in library_files():
        docstrings = [text for text in _docstrings(ast.parse(path.read_bytes())) if new(text)]
        if docstrings:
            yield "\n\n".join(docstrings)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Returns the docstrings of the definitions in a module, in source order."""
    if isinstance(node, _DOCUMENTED):
        yield (ast.get_docstring(node) or "").strip()
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            yield from _docstrings(child)


class LocalSource(DataSource):
    """A local file, or the files of a directory or glob; see `find_files` and `read_texts`."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self._files = find_files(config.dataset)
        self.summary = self._files.summary()

    def identity(self) -> dict[str, object]:
        return {
            "train": _describe(self._files.train),
            "validation": _describe(self._files.validation),
            "text_column": self.config.text_column,
            "max_documents": self.config.max_documents,
            "validation_fraction": None if self._files.validation else self.config.validation_fraction,
        }

    def _open(self) -> list[Fragment]:
        if not self._files.validation:
            return _cut_single_document(self._of_files(self._files.train, None), self.config.validation_fraction)
        return self._of_files(self._files.train, "train") + self._of_files(self._files.validation, "validation")

    def _of_files(self, files: list[tuple[str, Path]], split: str | None) -> list[Fragment]:
        found, column = [], self.config.text_column
        for _, path in files:
            for group, num_bytes in list_row_groups(path, column):
                name = f"data file {path}" + ("" if group is None else f", row group {group}")
                found.append(Fragment(name, split, partial(read_texts, path, column, group), num_bytes))
        return found


def _cut_single_document(fragments: list[Fragment], fraction: float) -> list[Fragment]:
    """Cut a dataset of one document in two, at the end of a line if possible: its end is held out.

    The hash would hold out all of it or nothing.
    """
    texts = ((each.name, text) for each in fragments for _, text in assign_splits(each.read(), None, fraction))
    first = list(islice(texts, 2))
    if len(first) != 1:
        return fragments
    name, text = first[0]
    cut = round(len(text) * (1 - fraction))
    if min(cut, len(text) - cut) < _LEAST_HELD_OUT:
        return fragments
    line = text.find("\n", cut - 1) + 1
    if 0 < line <= (cut + len(text)) // 2 and not text[line:].isspace():
        cut = line
    halves = zip(SPLITS, (text[:cut], text[cut:]), strict=True)
    return [Fragment(name, split, partial(iter, [half]), len(half.encode())) for split, half in halves]


def _describe(files: list[tuple[str, Path]]) -> list[tuple[str, int, int]]:
    """Returns name, size and time of the last change of each file."""
    return [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files]


class HubSource(DataSource):
    """A dataset on the Hugging Face hub, streamed: nothing of a file is downloaded before it is read."""

    @cached_property
    def commit(self) -> str | None:
        """The commit at which the dataset is read: the one that its revision is at now unless assigned.

        Raises:
            UserError: if there is no such dataset or the hub cannot be asked.
        """
        name, revision = self.config.dataset, self.config.revision
        found = f"data.dataset {name!r}: no such file or directory"
        return ask_hub(
            lambda: HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT).sha,
            f"{found}, nor dataset on the Hugging Face hub",
            f"{found}, and the Hugging Face hub cannot be asked",
        )

    def identity(self) -> dict[str, object]:
        return self.config.model_dump(exclude={"tokenizer", "cache_dir"})

    def _open(self) -> list[Fragment]:
        import datasets  # slow to import, and only needed here
        from datasets.exceptions import DatasetsError

        name, subset, commit = self.config.dataset, self.config.subset, self.commit
        try:
            splits = datasets.load_dataset(name, subset, revision=commit, streaming=True, trust_remote_code=False)
        except (ValueError, OSError, DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"data.dataset {name!r}, subset {subset!r}, cannot be opened: {reason}") from error
        if "train" not in splits:
            raise UserError(f"data.dataset {name!r} has no train split; there are: {', '.join(map(str, splits))}")
        if "validation" not in splits:
            return self._of_split(splits["train"], None)
        return [*self._of_split(splits["train"], "train"), *self._of_split(splits["validation"], "validation")]

    def _of_split(self, rows: "IterableDataset", split: str | None) -> list[Fragment]:
        count = rows.num_shards
        name = f"data.dataset {self.config.dataset!r}, file"
        names = [f"{name} {number} of {count}" for number in range(1, count + 1)]
        return [Fragment(each, split, partial(self._read, rows, index)) for index, each in enumerate(names)]

    def _read(self, rows: "IterableDataset", index: int) -> Iterator[str]:
        """Read the text column of one file as whole tables: row by row the library is several times slower."""
        name = f"data.dataset {self.config.dataset!r}"
        try:
            tables = rows.shard(rows.num_shards, index).with_format("arrow").iter(_ROWS)
            for table in cast("Iterator[pa.Table]", tables):  # which the library annotates as dict
                column = text_column(table.schema, self.config.text_column, name)
                yield from (text for text in table.column(column).to_pylist() if text is not None)
        except UserError:
            raise
        except Exception as error:  # of the network, after the library's own attempts
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{name} cannot be read on: {reason}") from error
