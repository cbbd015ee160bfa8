"""Errors that a user can cause or mend, failures to write among them, and how the command lines report them."""

import argparse
import atexit
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries written in Rust end a message
_options: dict[str, str] = {}  # of the command line in use, by the names of arguments
_BROKEN_PIPE = 141  # what a shell reports of a program ended by SIGPIPE


class UserError(ValueError):
    """Bad input. The message is one line that names the thing, its value and what is allowed."""


class WriteError(UserError):
    """A file or directory, by the name that a message gives it, cannot be written; the cause is one line."""

    def __init__(self, path: str | Path, cause: str) -> None:
        super().__init__(path, cause)
        self.cause = cause

    def __str__(self) -> str:
        return "{} cannot be written: {}".format(*self.args)


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
    """argparse's parser, with a wrong command line reported like any other bad input and no abbreviated options.

    Functions name their arguments in messages; `run_cli` writes the options instead that are called like them.
    """

    def __init__(self, description: str | None = None, **settings: Any) -> None:
        super().__init__(description=(description or "").partition("\n")[0], allow_abbrev=False, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        if action.option_strings:
            _options[action.dest] = action.option_strings[0]
        return action

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
    _options.clear()
    _replace_closed_streams()
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


def end_process(status: int) -> NoReturn:
    """End this process with a status.

    One that torchrun started ends without the interpreter being taken apart: threads of communication libraries that
    live until then abort it now and then ("terminate called without an active exception"), after its work is done.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        atexit._run_exitfuncs()  # noqa: SLF001 - what is registered there still runs
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    raise SystemExit(status)


def _replace_closed_streams() -> None:
    """Give standard streams that were closed at the start a place; else the next file opened would get their number."""
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process


def reason(error: BaseException) -> str:
    """Returns the cause of a failed read or write in one line, without the path that it usually repeats."""
    if isinstance(error, WriteError):
        return error.cause
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if match := _OS_ERROR.search(str(error)):
        return os.strerror(int(match[1]))
    lines = str(error).split("\n")
    return " ".join(lines[0].split()) or type(error).__name__


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a failure to write into one line that names the target; of nested ones, the outermost.

    Raises:
        WriteError: for an OSError or an error of safetensors or tokenizers in the block.
    """
    if "\0" in str(path):
        raise WriteError(path, "a path holds no NUL characters")
    try:
        yield
    except Exception as error:
        of_tokenizers = type(error) is Exception and _OS_ERROR.search(str(error))
        if isinstance(error, OSError | SafetensorError | WriteError) or of_tokenizers:
            raise WriteError(path, reason(error)) from error
        raise


def _fail(message: str) -> int:
    first, *others = " ".join(message.splitlines()).split(" ")
    line = " ".join([_options.get(first, first), *others])
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)  # no escape sequences for a terminal
    print(f"error: {printable}", file=sys.stderr)
    return 2
