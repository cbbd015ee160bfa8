"""Corpora: where the documents of a dataset come from, one after the other."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from flash_stu.data.config import DataConfig
from flash_stu.data.embedded import embedded_corpus, library_files
from flash_stu.data.files import estimate_text_bytes, find_files, looks_local, read_texts
from flash_stu.data.split import in_validation
from flash_stu.errors import UserError

_HUB_TIMEOUT = 10  # seconds to wait for the hub before saying that it cannot be reached
_EMBEDDED_REVISION = 1  # part of the identity: raise it when the embedded corpus is collected differently


@dataclass(frozen=True)
class Source:
    """The documents of a dataset.

    Attributes:
        identity: everything that determines the documents, short of reading them; plain JSON values.
        read: starts reading; gives (split, document) pairs, split "train" or "validation".
        num_bytes: estimated bytes of text, None if unknown.
    """

    identity: dict[str, object]
    read: Callable[[], Iterator[tuple[str, str]]]
    num_bytes: int | None


def iter_documents(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Read a dataset.

    Returns:
        (split, document) pairs, split being "train" or "validation"; no document is empty, each can be
        encoded as UTF-8, and the order is the same every time.

    Raises:
        UserError: if the dataset does not exist, cannot be read or has no such text column.
    """
    yield from open_source(config).read()


def open_source(config: DataConfig) -> Source:
    """Find a dataset without reading its documents; see `iter_documents`."""
    if config.dataset == "embedded":
        return _embedded(config)
    if looks_local(config.dataset):
        return _local(config)
    return _hub(config)


def _embedded(config: DataConfig) -> Source:
    def read() -> Iterator[tuple[str, str]]:
        for split, documents in embedded_corpus().items():
            yield from ((split, text) for text in islice(documents, config.max_documents))

    identity = {
        "embedded": _EMBEDDED_REVISION,
        "python": sys.version,
        "files": _stat(library_files()),
        "max_documents": config.max_documents,
    }
    return Source(identity, read, None)


def _local(config: DataConfig) -> Source:
    files = find_files(config.dataset)

    def texts(paths: list[tuple[str, Path]]) -> Iterator[str]:
        return chain.from_iterable(read_texts(path, config.text_column) for _, path in paths)

    identity = {
        "train": _stat(files.train),
        "validation": _stat(files.validation),
        "text_column": config.text_column,
        "max_documents": config.max_documents,
        "validation_fraction": None if files.validation else config.validation_fraction,
    }

    def read() -> Iterator[tuple[str, str]]:
        return _split_documents(config, texts(files.train), texts(files.validation) if files.validation else None)

    num_bytes = None
    if config.max_documents is None:
        num_bytes = estimate_text_bytes(files.train + files.validation, config.text_column)
    return Source(identity, read, num_bytes)


def _hub(config: DataConfig) -> Source:
    identity = config.model_dump(exclude={"tokenizer", "cache_dir"})

    def read() -> Iterator[tuple[str, str]]:
        splits = _load_from_hub(config)
        if "train" not in splits:
            raise UserError(f"data.dataset {config.dataset!r} has no train split; there are: {', '.join(splits)}")
        validation = _column(config, splits["validation"]) if "validation" in splits else None
        return _split_documents(config, _column(config, splits["train"]), validation)

    return Source(identity, read, None)


def _load_from_hub(config: DataConfig) -> dict[str, Iterable[dict]]:
    """Open every split of a hub dataset for streaming."""
    name = config.dataset
    try:
        HfApi().dataset_info(name, revision=config.revision, timeout=_HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"data.dataset {name!r}: no such file or directory, nor dataset on the Hugging Face hub"
        ) from error
    except Exception as error:  # the HTTP library's own errors differ between versions
        raise UserError(
            f"data.dataset {name!r}: no such file or directory, and the Hugging Face hub cannot be asked "
            f"({type(error).__name__})"
        ) from error

    import datasets  # slow to import, and only needed here

    try:
        return datasets.load_dataset(name, config.subset, revision=config.revision, streaming=True)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"data.dataset {name!r}, subset {config.subset!r}, cannot be opened: {reason}") from error


def _column(config: DataConfig, rows: Iterable[dict]) -> Iterator[str]:
    for row in rows:
        text = row.get(config.text_column)
        if isinstance(text, str):
            yield text
        elif config.text_column not in row:
            raise UserError(
                f"data.dataset {config.dataset!r} has no column {config.text_column!r}; there are: "
                f"{', '.join(row)} (set data.text_column)"
            )
        elif text is not None:
            raise UserError(f"data.dataset {config.dataset!r}: column {config.text_column!r} is not text")


def _split_documents(
    config: DataConfig, train: Iterator[str], validation: Iterator[str] | None
) -> Iterator[tuple[str, str]]:
    """Clean documents, limit their number, and hold some out by hash if there is no validation split."""
    for text in _clean(islice(train, config.max_documents)):
        held_out = validation is None and in_validation(text, config.validation_fraction)
        yield "validation" if held_out else "train", text
    for text in _clean(islice(validation or (), config.max_documents)):
        yield "validation", text


def _clean(texts: Iterable[str]) -> Iterator[str]:
    """Leave out empty documents and replace lone surrogates, which JSON can carry and UTF-8 cannot."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text and not text.isspace():
            yield text


def _stat(files: list[tuple[str, Path]]) -> list[tuple[str, int, int]]:
    """Describe files by name, size and time of the last change."""
    return [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files]
