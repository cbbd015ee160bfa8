"""Errors that a user can cause or mend, and how the command lines report them."""

import argparse
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import NoReturn

_BROKEN_PIPE = 141  # what a shell reports of a program ended by SIGPIPE


class UserError(ValueError):
    """Bad input. The message is one line that names the thing, its value and what is allowed."""


_LONGEST_NAME, _LONGEST_PATH = 255, 4096  # bytes, of a file system


def why_not_text(value: str) -> str | None:
    """Returns why a string can be neither a name nor a path, or None if it can."""
    try:
        encoded = value.encode()
    except UnicodeEncodeError:
        return "it is not UTF-8 text"
    if not value:
        return "it must not be empty"
    if any(unicodedata.category(character) == "Cc" for character in value):
        return "it must not have control characters"
    if len(encoded) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in re.split(b"[/,]", encoded)):
        return f"it must not be longer than {_LONGEST_NAME} bytes between slashes or commas, {_LONGEST_PATH} in all"
    return None


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with a wrong command line reported like any other bad input and no abbreviated options."""

    def __init__(self, **options) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run_cli(main: Callable[[], int | None]) -> int:
    """Run an entry point and turn bad input into one line on stderr.

    Args:
        main: the entry point; its return value is the exit status (None counts as 0).

    Returns:
        the exit status: main's own; 2 for a UserError or a failure of the operating system, such as a full disk; 130
        when interrupted from the keyboard; 141 when whoever read the output has gone.
    """
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes once more, and complains
        return _BROKEN_PIPE
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        named = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{named}{error.strerror or error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    line = " ".join(message.splitlines())
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)  # no escape sequences for a terminal
    print(f"error: {printable}", file=sys.stderr)
    return 2
