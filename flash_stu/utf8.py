"""Text from outside is UTF-8; the encodings of other systems are recognised and refused by name."""

import codecs

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
