"""Files on disk, read with suspicion: sizes, encodings, checksums and damage of every kind."""

import codecs
import json
import os
import stat
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flash_stu.errors import UserError, reason

LARGEST_TEXT = 1 << 24  # bytes of a file of settings
_READ_BYTES = 1 << 24
_OTHER_MARKS = {  # the longer ones first: they begin alike
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class DamagedError(ValueError):
    """Something on disk is not what was written there; the message is one line that names the file."""


def read_text(path: str | Path, label: str = "", largest: int = LARGEST_TEXT) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        path: a regular file: a pipe or device could be endless.
        label: what a message calls it; the path follows.
        largest: bytes it may have.

    Raises:
        UserError: if there is no such file, or it cannot be read, is too large or is not UTF-8.
    """
    named = f"{label} {path}".strip()
    try:
        if not os.path.exists(path):
            raise UserError(f"{named}: no such file")
        if not os.path.isfile(path):
            raise UserError(f"{named}: not a regular file")
        if os.path.getsize(path) > largest:
            raise UserError(f"{named}: larger than {largest:,} bytes")
        return decode(Path(path).read_bytes(), named)
    except OSError as error:
        raise UserError(f"{named}: {reason(error)}") from None


def read_json(path: str | Path, label: str = "", largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """Read a file with one JSON object; see `read_text`.

    Raises:
        UserError: as `read_text`, or if it holds anything else.
    """
    named = f"{label} {path}".strip()
    text = read_text(path, label, largest)
    try:
        content = json.loads(text)
    except RecursionError:
        raise UserError(f"{named}: not valid JSON: nested too deep") from None
    except ValueError as error:
        raise UserError(f"{named}: not valid JSON: {reason(error).partition(';')[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{named}: not a JSON object but {type(content).__name__}")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """Read what `write_object` wrote.

    Raises:
        OSError: if there is none.
        DamagedError: if it is not what was written.
    """
    text = read_regular(path)
    with suppress(ValueError, RecursionError):
        if (content := without_checksum(json.loads(text))) is not None:
            return content
    raise DamagedError(f"{path} is damaged")


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Returns an object of JSON values with its checksum as entry "crc32"."""
    return {**content, "crc32": _digest(content)}


def without_checksum(record: Any) -> dict[str, Any] | None:
    """Returns the content of an object that `with_checksum` made; None if this is not what it made."""
    if not isinstance(record, dict):
        return None
    content = {key: value for key, value in record.items() if key != "crc32"}
    try:
        return content if record.get("crc32") == _digest(content) else None
    except RecursionError:
        return None


def read_regular(path: Path) -> bytes:
    """Read a file that must be a regular one: reading a pipe or device could have no end.

    Raises:
        OSError: if it cannot be read.
        DamagedError: if it is something else.
    """
    _require_regular(path)
    return path.read_bytes()


def describe(path: Path) -> dict[str, int]:
    """Returns a file's size and checksum, {"bytes", "crc32"}."""
    _require_regular(path)
    value = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            value = zlib.crc32(block, value)
        return {"bytes": file.tell(), "crc32": value}


def read_records(
    path: Path, is_valid: Callable[[dict[str, Any]], bool] = lambda _: True
) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a file with one JSON object per line, whatever has happened to it.

    Returns:
        the valid objects, and the numbers (from 1 on) of the lines that are none; both empty if there is no file.
    """
    records, unreadable = [], []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        record = None
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
        if isinstance(record, dict) and is_valid(record):
            records.append(record)
        elif line.strip():
            unreadable.append(number)
    return records, unreadable


def _require_regular(path: Path) -> None:
    """Refuse what would not be read to an end, such as a named pipe."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DamagedError(f"{path.name} is not a regular file")


def _digest(content: dict[str, Any]) -> int:
    """Returns the checksum of JSON values as they will be read: with strings as keys."""
    return zlib.crc32(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())


def check_utf8(beginning: bytes, where: str) -> None:
    """Refuse the encodings that other systems write, by a file's first four bytes.

    Raises:
        UserError: for UTF-16 and UTF-32, which are recognised by their mark or by the zeros beside ASCII characters.
    """
    found = next((name for mark, name in _OTHER_MARKS.items() if beginning.startswith(mark)), None)
    if found is None and 0 in beginning[:2] and any(beginning[:2]):
        found = "UTF-16"
    if found is None and beginning.startswith(b"\0\0\0"):
        found = "UTF-32"
    if found is not None:
        raise UserError(f"{where}: the text is {found}; allowed: UTF-8 (iconv -f {found} -t UTF-8 converts it)")


def decode(data: bytes, where: str) -> str:
    """Returns the text in the bytes of a file, without a byte order mark, its line ends as they are.

    Raises:
        UserError: if they are not UTF-8.
    """
    check_utf8(data[:4], where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: not UTF-8 text at byte {error.start}, in line {line}") from None
