"""Paths as users write them: `~` and `~user` stand for a home directory, wherever a path can be given."""

import os
from typing import Annotated

from pydantic import AfterValidator

from flash_stu.errors import UserError


def expand(path: str) -> str:
    """Returns a path with a leading `~` or `~user` replaced by that home directory.

    Raises:
        UserError: if there is no such home directory.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{path}: there is no home directory {path.split('/')[0]}; write ./{path} for a name with ~")
    return expanded


ExpandedPath = Annotated[str, AfterValidator(expand)]
"""`expand` as the type of a setting."""
