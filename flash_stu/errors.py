"""Errors that a user can cause or mend, and how the command lines report them."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

_BROKEN_PIPE = 141  # what a shell reports of a program ended by SIGPIPE


class UserError(ValueError):
    """Bad input. The message is one line that names the thing, its value and what is allowed."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with a wrong command line reported like any other bad input."""

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
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2
