"""Documents in local files: finding the files of a dataset and reading text out of them."""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flash_stu.data.tokenizer import END_OF_TEXT
from flash_stu.errors import UserError

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".txt": "txt"}
_SPLIT_NAME = re.compile(r"(train|validation|valid|val|test)(?![a-z])")
_ROWS = 256  # parquet rows in memory at a time


@dataclass(frozen=True)
class DataFiles:
    """The files of each split as sorted (name within the dataset, path) pairs; validation may be empty."""

    train: list[tuple[str, Path]]
    validation: list[tuple[str, Path]]


def looks_local(dataset: str) -> bool:
    """Say whether a dataset name can only mean a path: it exists, is a glob, or is written like one."""
    written_like_path = dataset.startswith(("/", "./", "../", "~")) or file_format(dataset) is not None
    return written_like_path or glob.has_magic(dataset) or Path(dataset).exists()


def file_format(name: str | Path) -> str | None:
    """Name the format of a file by its ending: "parquet", "jsonl", "txt", or None if it is none of ours."""
    return next((kind for ending, kind in FORMATS.items() if str(name).lower().endswith(ending)), None)


def find_files(dataset: str) -> DataFiles:
    """Find the files of a local dataset and the split of each.

    A file belongs to a split when its name, or the name of a directory inside the dataset that holds it,
    starts with train, validation (valid, val) or test. Files without such a name are training files, unless
    others are named train; test files are left out, unless there is nothing else.

    Args:
        dataset: file, directory (searched through, hidden names left out) or glob ("**" crosses directories).

    Raises:
        UserError: if there is no such file, none in a known format, or more than one format.
    """
    root, paths = _candidates(dataset)
    known = {path: kind for path in paths if (kind := file_format(path))}
    if not known:
        what = "no file in a known format" if paths or Path(dataset).is_dir() else "no such file or directory"
        raise UserError(f"data.dataset {dataset!r}: {what}; allowed: {', '.join(FORMATS)} files")
    if len(set(known.values())) > 1:
        kinds = " and ".join(sorted(set(known.values())))
        raise UserError(f"data.dataset {dataset!r} mixes {kinds} files; choose with a glob: '{root}/*.jsonl'")

    splits: dict[str, list[tuple[str, Path]]] = {"train": [], "validation": [], "test": [], "": []}
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in known):
        splits[_split_name(name)].append((name, path))
    train = splits["train"] or splits[""]
    if not train:  # a single split was asked for: it is the dataset
        return DataFiles(splits["validation"] or splits["test"], [])
    return DataFiles(train, splits["validation"])


@dataclass(frozen=True)
class Piece:
    """What can be read of a file without reading the rest of it.

    Attributes:
        row_group: of a parquet file; None: the whole of a file of another format.
        num_bytes: estimated bytes of text; None where there is no telling.
    """

    row_group: int | None
    num_bytes: int | None


def list_pieces(path: Path, column: str) -> list[Piece]:
    """List the pieces of a file in order, without reading their text.

    Raises:
        UserError: naming the file, if it is damaged.
    """
    with _naming(path):
        if file_format(path) == "parquet":
            metadata = pq.read_metadata(path)
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            return [Piece(index, _column_bytes(group, column)) for index, group in enumerate(groups)]
        return [Piece(None, None if path.suffix.lower() == ".gz" else path.stat().st_size)]


def read_texts(path: Path, column: str, row_group: int | None = None) -> Iterator[str]:
    """Read the documents of one file, or of one piece of it.

    A parquet row or a jsonl line is a document; null ones are left out. A .txt file is one document, or
    several with a line <|endoftext|> between them.

    Args:
        path: the file.
        column: parquet column or jsonl key of the text.
        row_group: the only row group to read of a parquet file.

    Raises:
        UserError: naming the file, if it is damaged or has no such column of text.
    """
    with _naming(path):
        match file_format(path):
            case "parquet":
                yield from _read_parquet(path, column, row_group)
            case "jsonl":
                yield from _read_jsonl(path, column)
            case "txt":
                yield from _read_txt(path)


def text_column(schema: pa.Schema, column: str, where: str) -> int:
    """Find the column that holds the text.

    Args:
        schema: of a table.
        column: its name.
        where: what the table belongs to, for the message.

    Raises:
        UserError: if there is no such column, or it does not hold text.
    """
    if column not in schema.names:
        raise UserError(_no_column(where, column, schema.names))
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{where}: column {column!r} holds {kind}, not text")
    return schema.get_field_index(column)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn a failure to read a file into one line with its name."""
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data file {path} cannot be read: {reason}") from error


def _candidates(dataset: str) -> tuple[Path, list[Path]]:
    """List the files a dataset name stands for, and the directory that their split names are relative to."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.is_file())
        return path, [file for file in files if not _hidden(file.relative_to(path))]
    if path.is_file():
        return path.parent, [path]
    if not glob.has_magic(str(path)):
        return path, []
    fixed = takewhile(lambda part: not glob.has_magic(part), path.parts[:-1])
    return Path(*fixed), [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _split_name(name: str) -> str:
    for part in name.lower().split("/"):
        if match := _SPLIT_NAME.match(part):
            return "validation" if match[1].startswith("val") else match[1]
    return ""


def _read_parquet(path: Path, column: str, row_group: int | None) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        text_column(file.schema_arrow, column, f"data file {path}")
        groups = range(file.num_row_groups) if row_group is None else [row_group]
        for batch in file.iter_batches(_ROWS, row_groups=groups, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _column_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    chunks = (group.column(index) for index in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"data file {path}, line {number}: not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise UserError(f"data file {path}, line {number}: not a JSON object")
            if column not in row:
                raise UserError(_no_column(f"data file {path}, line {number}", column, row))
            if not isinstance(row[column], str | None):
                raise UserError(f"data file {path}, line {number}: {column!r} is not text")
            if row[column] is not None:
                yield row[column]


def _read_txt(path: Path) -> Iterator[str]:
    lines: list[str] = []
    with open(path, encoding="utf-8", newline="") as file:
        for line in file:
            if line.strip() == END_OF_TEXT:
                yield "".join(lines)
                lines.clear()
            else:
                lines.append(line)
    yield "".join(lines)


def _no_column(where: str, column: str, columns: Iterable[str]) -> str:
    return f"{where}: no column {column!r}; there are: {', '.join(columns)} (set data.text_column)"
