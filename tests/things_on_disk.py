"""A kind of directory to write, and failing system calls, for the tests of writing and locking."""

import errno
import os

from flash_stu.files import (
    replacing_directory,
)

KIND = "thing"


def names(directory) -> list[str]:
    """All that is in a directory, hidden things too."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def write_thing(path, text="1", kind=KIND):
    with replacing_directory(path, kind) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub/file").write_text(text)
    return path


def fail(monkeypatch, name, number=errno.ENOSPC, when=lambda *args: True):
    """Let those calls of a function of os fail for which `when` is true."""
    original = getattr(os, name)

    def function(*args, **kwargs):
        if when(*args):
            raise OSError(number, os.strerror(number), "somewhere")
        return original(*args, **kwargs)

    monkeypatch.setattr(os, name, function)
