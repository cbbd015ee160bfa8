"""What an evaluation has found so far, on disk: a file per model and task, so that one that was stopped goes on.

    items/<model>/<task>.json           {"key", "model", "result", "items"}
    items/<model>/<task>.json.part.*    while the task runs: flash_stu.evaluation.journal

The key says what the result is of. A file with another key belongs to another evaluation, and is neither used nor
replaced; neither is one that somebody else wrote or changed.
"""

import json
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from flash_stu.distributed import World
from flash_stu.errors import UserError
from flash_stu.evaluation.journal import Journal
from flash_stu.files import adding_files, check_files, check_growing, growing_directory

_KIND, _LABEL = "evaluation", "--output"


class Store:
    """The findings in an output directory.

    Args:
        folder: the directory; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def check(self, names: Iterable[str] = ()) -> None:
        """Refuse a directory that is something else's.

        Args:
            names: files that will be written.

        Raises:
            UserError: if it is a file, holds things but no evaluation, or a file of the evaluation was changed.
        """
        if self.folder is not None:
            check_growing(self.folder, _KIND, _LABEL, names)

    def holding(self, names: Iterable[str] = ()) -> AbstractContextManager[None]:
        """Make the directory and hold it against other processes; see `growing_directory`."""
        return nullcontext() if self.folder is None else growing_directory(self.folder, _KIND, _LABEL, names)

    def adding(self) -> AbstractContextManager[Path]:
        """Add files to the directory; see `adding_files`."""
        return adding_files(self.folder, _LABEL)

    def read(self, label: str, name: str, key: dict[str, Any]) -> dict[str, Any] | None:
        """Returns what was found for a model on a task; None if nothing was.

        Raises:
            UserError: if the file there was changed, or belongs to another evaluation, naming what differs.
        """
        if self.folder is None:
            return None
        path = self.folder / item_file(label, name)
        if not path.is_file():
            return None
        check_files(self.folder, [item_file(label, name)], _LABEL)
        found = json.loads(path.read_bytes())
        differing = [entry for entry in key if found["key"].get(entry) != key[entry]]
        if differing:
            raise UserError(
                f"{_LABEL} {self.folder} holds {label} on {name} with other settings ({', '.join(differing)}); "
                "choose another, or remove it"
            )
        return found

    def write(self, label: str, name: str, found: dict[str, Any]) -> None:
        """Keep what was found, {"key", ...}, in a directory that is being held."""
        if self.folder is not None:
            with self.adding() as temporary:
                path = temporary / item_file(label, name)
                path.parent.mkdir(parents=True)
                path.write_text(json.dumps(found), encoding="utf-8")

    def journal(self, label: str, name: str, key: dict[str, Any], world: World) -> Journal | None:
        """Where the scores of a task are noted while it runs."""
        return None if self.folder is None else Journal(self.folder / f"{item_file(label, name)}.part", key, world)


def item_file(label: str, name: str) -> str:
    """Returns the name of the file that keeps what was found for a model on a task."""
    return f"items/{_safe(label)}/{_safe(name)}.json"


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name).strip("_")
