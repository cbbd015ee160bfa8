"""Types of command line arguments: numbers within bounds, and paths of files and directories to read or write.

Each is what argparse takes as `type`; argparse puts the argument's name before the message.
"""

import math
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from flash_stu.errors import UserError, why_not_text
from flash_stu.settings import LARGEST_COUNT, LARGEST_SEED, expand, shown


def integer(low: int = 1, high: int = LARGEST_COUNT) -> Callable[[str], int]:
    """Returns a type for whole numbers from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{shown(text)} is not an integer") from None
        if not low <= value <= high:
            raise ArgumentTypeError(f"{shown(value)} is out of range; allowed: {low} to {high}")
        return value

    return parse


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """Returns a type for finite numbers from low to high; `above`: low itself is not allowed."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ArgumentTypeError(f"{shown(text)} is not a number") from None
        if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
            raise ArgumentTypeError(f"{value:g} is out of range; allowed: {'above ' * above}{low:g} to {high:g}")
        return value

    return parse


SECONDS = number(0, 1e6)  # a benchmark's
SEED = integer(0, LARGEST_SEED)


def printable(value: str) -> str:
    """Returns a printable text, such as a name."""
    if problem := why_not_text(value):
        raise ArgumentTypeError(f"{shown(value)}: {problem}")
    return value


def any_path(value: str) -> str:
    """Returns the path of anything; `~` stands for the home directory."""
    try:
        return expand(printable(value))
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None


def input_file(value: str) -> str:
    """Returns the path of an existing, readable file."""
    return _readable(value, os.path.isfile, "a regular file")


def input_directory(value: str) -> str:
    """Returns the path of an existing, readable directory."""
    return _readable(value, os.path.isdir, "a directory")


def output_directory(value: str) -> str:
    """Returns the path of a directory that exists or can be created."""
    return _writable(value, os.path.isdir, "a directory")


def output_file(value: str) -> str:
    """Returns the path of a file that exists or can be created."""
    return _writable(value, os.path.isfile, "a regular file")


def why_not_writable(path: str | Path) -> str | None:
    """Returns why nothing can be written at a path or below it, or None if that seems possible; nothing is made."""
    place = Path(path).absolute()
    if place.is_symlink() and not place.exists():
        return "it is a symbolic link to nothing"
    for parent in (place, *place.parents):
        if os.path.lexists(parent) and (parent != place or parent.is_dir()):
            if not parent.is_dir():
                return f"{parent} is not a directory"
            return None if os.access(parent, os.W_OK | os.X_OK) else f"{parent} is not writable"
    return None


def _readable(value: str, is_kind: Callable[[str], bool], kind: str) -> str:
    path = any_path(value)
    if not is_kind(path):
        raise ArgumentTypeError(f"{path} {f'is not {kind}' if os.path.exists(path) else 'does not exist'}")
    if not os.access(path, os.R_OK):
        raise ArgumentTypeError(f"{path} cannot be read: permission denied")
    return path


def _writable(value: str, is_kind: Callable[[str], bool], kind: str) -> str:
    path = any_path(value)
    if os.path.lexists(path) and not is_kind(path):
        raise ArgumentTypeError(f"{path} exists and is not {kind}")
    if problem := why_not_writable(path):
        raise ArgumentTypeError(f"{path} cannot be written: {problem}")
    return path
