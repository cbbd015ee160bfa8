"""Corpora: where the documents of a dataset come from, one after the other."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from flash_stu.data.config import DataConfig
from flash_stu.data.embedded import embedded_corpus, library_files
from flash_stu.data.files import find_files, list_pieces, looks_local, read_texts
from flash_stu.data.hub import hub_commit, hub_units
from flash_stu.data.split import in_validation
from flash_stu.data.unit import Unit, first_documents

_EMBEDDED_REVISION = 1  # part of the identity: raise it when the embedded corpus is collected differently


@dataclass(frozen=True)
class Source:
    """A dataset, found but not opened.

    Attributes:
        identity: everything that determines the documents, short of reading them; plain JSON values.
        commit: asks for the commit that a hub dataset is at now; None for any other dataset.
        units: opens the dataset as it was at a commit; gives its units in order, training documents first.
    """

    identity: dict[str, object]
    commit: Callable[[], str | None]
    units: Callable[[str | None], list[Unit]]


def iter_documents(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Read a dataset.

    Returns:
        (split, document) pairs, split being "train" or "validation"; no document is empty, each can be
        encoded as UTF-8, and the order is the same every time.

    Raises:
        UserError: if the dataset does not exist, cannot be read or has no such text column.
    """
    source = open_source(config)
    for unit in source.units(source.commit()):
        yield from assign_splits(unit.read(), unit.split, config.validation_fraction)


def open_source(config: DataConfig) -> Source:
    """Find a dataset without reading its documents; see `iter_documents`."""
    if config.dataset == "embedded":
        return _embedded(config)
    if looks_local(config.dataset):
        return _local(config)
    return _hub(config)


def assign_splits(texts: Iterable[str], split: str | None, fraction: float) -> Iterator[tuple[str, str]]:
    """Clean documents and say which split each belongs to.

    Empty documents are left out, and lone surrogates, which JSON can carry and UTF-8 cannot, are replaced.

    Args:
        texts: the documents as they are stored.
        split: of all of them; None if each document's hash decides.
        fraction: share of the documents held out where the hash decides.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text and not text.isspace():
            yield split or ("validation" if in_validation(text, fraction) else "train"), text


def _embedded(config: DataConfig) -> Source:
    identity = {
        "embedded": _EMBEDDED_REVISION,
        "python": sys.version,
        "files": _stat(library_files()),
        "max_documents": config.max_documents,
    }

    def units(commit: None) -> list[Unit]:
        return [Unit(split, lambda texts=texts: texts, None) for split, texts in embedded_corpus().items()]

    return Source(identity, _no_commit, _limited(units, config))


def _local(config: DataConfig) -> Source:
    files = find_files(config.dataset)
    identity = {
        "train": _stat(files.train),
        "validation": _stat(files.validation),
        "text_column": config.text_column,
        "max_documents": config.max_documents,
        "validation_fraction": None if files.validation else config.validation_fraction,
    }

    def units_of(path: Path, split: str | None) -> list[Unit]:
        return [
            Unit(split, lambda group=piece.row_group: read_texts(path, config.text_column, group), piece.num_bytes)
            for piece in list_pieces(path, config.text_column)
        ]

    def units(commit: None) -> list[Unit]:
        train = (units_of(path, "train" if files.validation else None) for _, path in files.train)
        validation = (units_of(path, "validation") for _, path in files.validation)
        return list(chain.from_iterable(chain(train, validation)))

    return Source(identity, _no_commit, _limited(units, config))


def _hub(config: DataConfig) -> Source:
    identity = config.model_dump(exclude={"tokenizer", "cache_dir"})
    return Source(identity, lambda: hub_commit(config), _limited(lambda commit: hub_units(config, commit), config))


def _no_commit() -> None:
    return None


def _limited(units: Callable[[str | None], list[Unit]], config: DataConfig) -> Callable[[str | None], list[Unit]]:
    """Read at most max_documents of each split."""
    if config.max_documents is None:
        return units
    return lambda commit: first_documents(units(commit), config.max_documents)


def _stat(files: list[tuple[str, Path]]) -> list[tuple[str, int, int]]:
    """Describe files by name, size and time of the last change."""
    return [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files]
