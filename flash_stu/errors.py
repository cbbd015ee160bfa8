"""What a user can do wrong, and how the command lines say so."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


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
        the exit status: main's own, 2 for a UserError, 130 when interrupted from the keyboard.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
