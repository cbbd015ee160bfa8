"""The formats of data files, and the documents in a file."""

import codecs
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flash_stu.data.tokenizer import END_OF_TEXT
from flash_stu.errors import UserError
from flash_stu.reading import check_utf8

_KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
ALLOWED = f"{', '.join(_KINDS)} files; all but .parquet also with {', '.join(_COMPRESSIONS)}"
_ROWS = 256  # parquet rows in memory at a time


def file_ending(path: str | Path) -> tuple[str, str]:
    """Returns the two parts of a file's ending, in lower case: what it holds and how that is compressed, or ""."""
    *_, before, last = ["", "", *Path(str(path).lower()).suffixes]
    return (before, last) if last in _COMPRESSIONS else (last, "")


def file_format(path: str | Path) -> str | None:
    """Returns the format that a file's ending stands for: "parquet", "jsonl" or "txt"; None for an unknown ending."""
    ending, compression = file_ending(path)
    return None if compression and ending == ".parquet" else _KINDS.get(ending)


def list_row_groups(path: Path, column: str) -> list[tuple[int | None, int | None]]:
    """List what can be read of a file without the rest of it, in order, without reading text.

    Returns:
        (row group, estimated bytes of text) pairs. A file without row groups is one pair, whose row group is None; the
        size is None where it cannot be estimated.

    Raises:
        UserError: naming the file, if it is damaged.
    """
    with _naming(path):
        if file_format(path) == "parquet":
            metadata = pq.read_metadata(path)
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            return [(index, _column_bytes(group, column)) for index, group in enumerate(groups)]
        return [(None, None if file_ending(path)[1] else path.stat().st_size)]


def read_texts(path: Path, column: str, row_group: int | None = None) -> Iterator[str]:
    """Read the documents of one file, or of one row group of a parquet file.

    A parquet row, a line of a .jsonl or .json file, or an entry of the array in a .json file is a document; null ones
    are left out. A .txt file is one document, or several with a line <|endoftext|> between them. A byte order mark is
    removed, and lone surrogates, which JSON can carry and UTF-8 cannot, are replaced by U+FFFD.
    The column is that of a parquet file, or the key in JSON, of the text.

    Raises:
        UserError: naming the file, and the line where there is one, if it is damaged, not UTF-8 or has no such column
            of text.
    """
    with _naming(path):
        kind = file_format(path)
        if kind == "parquet":
            yield from _read_parquet(path, column, row_group)
            return
        with _open(path) as stream:
            check_utf8(stream.peek(4)[:4], f"data file {path}")
            yield from _read_txt(stream) if kind == "txt" else _read_json(stream, column, path)


def text_column(schema: pa.Schema, column: str, where: str) -> int:
    """Returns the index of the column that holds the text.

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
def _open(path: Path) -> Iterator[io.BufferedReader]:
    compression = file_ending(path)[1]
    if not compression:
        with open(path, "rb") as stream:
            yield stream
    else:
        with pa.CompressedInputStream(str(path), _COMPRESSIONS[compression]) as stream:
            yield io.BufferedReader(stream)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn a failure to read a file into one line with its name."""
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data file {path} cannot be read: {reason}") from error


def _read_parquet(path: Path, column: str, row_group: int | None) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        text_column(file.schema_arrow, column, f"data file {path}")
        groups = range(file.num_row_groups) if row_group is None else [row_group]
        for batch in file.iter_batches(_ROWS, row_groups=groups, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _column_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    columns = (group.column(index) for index in range(group.num_columns))
    return sum(each.total_uncompressed_size for each in columns if each.path_in_schema == column)


def _read_json(stream: io.BufferedReader, column: str, path: Path) -> Iterator[str]:
    beginning = stream.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if file_ending(path)[0] == ".json" and beginning.startswith(b"["):
        rows = _parse(stream.read(), f"data file {path}")
        places = ((row, f"data file {path}, document {number}") for number, row in enumerate(rows, start=1))
    else:
        lines = ((line, f"data file {path}, line {number}") for number, line in enumerate(stream, start=1))
        places = ((_parse(line, where), where) for line, where in lines if line.removeprefix(codecs.BOM_UTF8).strip())
    for row, where in places:
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object")
        if column not in row:
            raise UserError(_no_column(where, column, row))
        text = row[column]
        if not isinstance(text, str | None):
            raise UserError(f"{where}: {column!r} is not text")
        if text is not None:
            yield text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
        raise UserError(f"{where}: not JSON that can be read ({error})") from error


def _read_txt(stream: io.BufferedReader) -> Iterator[str]:
    lines: list[str] = []
    for line in io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""):
        if line.strip() == END_OF_TEXT:
            yield "".join(lines)
            lines.clear()
        else:
            lines.append(line)
    yield "".join(lines)


def _no_column(where: str, column: str, columns: Iterable[str]) -> str:
    return f"{where}: no column {column!r}; there are: {', '.join(columns)} (set data.text_column)"
