"""Corpora: where the documents of a dataset come from, one after the other."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from flash_stu.data.config import DataConfig
from flash_stu.data.embedded import embedded_corpus, library_files
from flash_stu.data.files import find_files, looks_local
from flash_stu.data.formats import list_pieces, read_texts
from flash_stu.data.hub import hub_commit, hub_units
from flash_stu.data.split import in_validation
from flash_stu.data.unit import Unit, first_documents

_LEAST_HELD_OUT = 100  # characters of a single document; on fewer a loss says nothing
_EMBEDDED_REVISION = 1  # part of the identity: raise it when the embedded corpus is collected differently


@dataclass(frozen=True)
class Source:
    """A dataset, found but not opened.

    Attributes:
        identity: everything that determines the documents, short of reading them; plain JSON values.
        commit: asks for the commit that a hub dataset is at now; None for any other dataset.
        units: opens the dataset as it was at a commit; gives its units in order, training documents first.
        summary: one line on the files that are read and those that are left out; None if there is no choice.
    """

    identity: dict[str, object]
    commit: Callable[[], str | None]
    units: Callable[[str | None], list[Unit]]
    summary: str | None = None


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
    """Give the split of each document that is not blank.

    Args:
        texts: the documents as they are stored.
        split: of all of them; None if each document's hash decides.
        fraction: share of the documents held out where the hash decides.
    """
    for text in texts:
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
        corpus = embedded_corpus().items()
        return [Unit("the embedded corpus", split, lambda texts=texts: texts, None) for split, texts in corpus]

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
        def unit(group: int | None, num_bytes: int | None) -> Unit:
            name = f"data file {path}" + ("" if group is None else f", row group {group}")
            return Unit(name, split, lambda: read_texts(path, config.text_column, group), num_bytes)

        return [unit(piece.row_group, piece.num_bytes) for piece in list_pieces(path, config.text_column)]

    def units(commit: None) -> list[Unit]:
        train = (units_of(path, "train" if files.validation else None) for _, path in files.train)
        validation = (units_of(path, "validation") for _, path in files.validation)
        found = list(chain.from_iterable(chain(train, validation)))
        return found if files.validation else _cut_single_document(found, config.validation_fraction)

    return Source(identity, _no_commit, _limited(units, config), files.summary())


def _cut_single_document(units: list[Unit], fraction: float) -> list[Unit]:
    """Cut a dataset of one document in two, where a line ends if possible: the end of it is held out.

    The hash would hold out all of it or nothing.
    """
    texts = ((unit.name, text) for unit in units for _, text in assign_splits(unit.read(), None, fraction))
    first = list(islice(texts, 2))
    if len(first) != 1:
        return units
    name, text = first[0]
    cut = round(len(text) * (1 - fraction))
    if min(cut, len(text) - cut) < _LEAST_HELD_OUT:
        return units
    line = text.find("\n", cut - 1) + 1
    if 0 < line <= (cut + len(text)) // 2 and not text[line:].isspace():
        cut = line
    parts = {"train": text[:cut], "validation": text[cut:]}
    return [Unit(name, split, lambda part=part: [part], len(part.encode())) for split, part in parts.items()]


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
