"""Text files from outside: UTF-8, with or without a byte order mark."""

import codecs
import sys
from pathlib import Path

from flash_stu.errors import UserError

_OTHER_MARKS = {  # the longer ones first: they begin alike
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def check_utf8(beginning: bytes, where: str) -> None:
    """Refuse the encodings that other systems write, by a file's first bytes.

    Args:
        beginning: four bytes, or as many as there are.
        where: what the message calls the file.

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


def read_text(path: str | Path, label: str) -> str:
    """Returns the text of a file, without a byte order mark, its line ends as they are.

    Args:
        path: the file; "-" is standard input.
        label: what a message calls it.

    Raises:
        UserError: if it cannot be read or is not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{label}: {error.strerror or error}") from None
    except ValueError as error:  # a path with a NUL in it
        raise UserError(f"{label}: {error}") from None
    check_utf8(data[:4], label)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{label}, line {line}: not UTF-8 text ({error.reason})") from None
