"""Columns of numbers from a table on disk: .csv, .parquet, or arrays in an .npz."""

import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from flash_stu.errors import UserError, reason
from flash_stu.settings import shown

FORMATS = (".csv", ".npz", ".parquet")


def read_columns(path: str | Path, names: list[str]) -> np.ndarray:
    """Read columns of a table.

    Args:
        path: a .csv with a line of names, a .parquet, or an .npz of named arrays.
        names: the columns wanted. An array of an .npz may be (time,), (time, channels) or (batch, time, channels); the
            channels of several are put one beside another.

    Returns:
        (time, columns), or (batch, time, columns), of the file's own type for an .npz and else float64.

    Raises:
        UserError: for a file that cannot be read or is empty, a column that is missing or holds anything but numbers.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"data {path} must end in one of {', '.join(FORMATS)}")
    if not names or len(set(names)) != len(names):
        raise UserError(f"columns {shown(','.join(names))} of {path}: each must be named once")
    return _arrays(path, names) if path.suffix.lower() == ".npz" else _table(path, names)


def _table(path: Path, names: list[str]) -> np.ndarray:
    try:
        table = csv.read_csv(path) if path.suffix.lower() == ".csv" else parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"data {path} cannot be read: {reason(error)}") from None
    _require(path, names, table.column_names)
    if not table.num_rows:
        raise UserError(f"data {path} has no rows")
    return np.stack([_numbers(path, name, table.column(name)) for name in names], axis=1)


def _numbers(path: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    if column.null_count:
        row = column.to_pylist().index(None) + 1
        raise UserError(f"data {path}: column {shown(name)} has no value in row {row}")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        for row, text in enumerate(column.to_pylist(), start=1):
            try:
                float(text)
            except ValueError:
                raise UserError(f"data {path}: column {shown(name)} has {shown(text)} in row {row}") from None
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise UserError(f"data {path}: column {shown(name)} is of type {column.type}; allowed: numbers")
    values = np.asarray(column.to_numpy(), dtype=np.float64)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise UserError(f"data {path}: column {shown(name)} is {values[row]} in row {row + 1}; allowed: finite numbers")
    return values


def _arrays(path: Path, names: list[str]) -> np.ndarray:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is not an archive of arrays")
        with archive:
            _require(path, names, archive.files)
            arrays = [archive[name] for name in names]
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError) as error:
        raise UserError(f"data {path} cannot be read: {reason(error)}") from None
    arrays = [array[:, None] if array.ndim == 1 else array for array in arrays]
    for name, array in zip(names, arrays, strict=True):
        if array.ndim not in (2, 3) or array.shape[:-1] != arrays[0].shape[:-1] or array.dtype.kind not in "iuf":
            raise UserError(
                f"data {path}: array {shown(name)} has shape {array.shape} and type {array.dtype}; allowed: numbers,"
                f" (time,), (time, channels) or (batch, time, channels), and the same times for all"
            )
    return np.concatenate(arrays, axis=-1)


def _require(path: Path, names: list[str], there: list[str]) -> None:
    for name in names:
        if there.count(name) != 1:
            found = ", ".join(shown(other) for other in there[:20]) or "none"
            problem = "is not there" if name not in there else "is there more than once"
            raise UserError(f"data {path}: column {shown(name)} {problem}; columns: {found}")
