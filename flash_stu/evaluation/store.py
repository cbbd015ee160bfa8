"""What an evaluation has found so far, on disk: a file per model and task, so that one that was stopped goes on.

    items/<model>/<task>.json           {"key", "model", "result", "items"}
    items/<model>/<task>.json.part.*    while the task runs: flash_stu.evaluation.journal

The key says what the result is of. A file with another key belongs to another evaluation, and is neither used nor
replaced.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from flash_stu.errors import UserError
from flash_stu.evaluation.journal import Journal
from flash_stu.evaluation.processes import Processes

RESULTS = "results.json"


class Store:
    """The findings in an output directory.

    Args:
        folder: the directory; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def check(self) -> None:
        """Refuse a directory that is something else's.

        Raises:
            UserError: if it is a file, or holds things but no evaluation.
        """
        folder = self.folder
        if folder is None or not folder.exists():
            return
        if not folder.is_dir():
            raise UserError(f"--output {folder} is not a directory")
        if any(folder.iterdir()) and not (folder / RESULTS).is_file():
            raise UserError(f"--output {folder} is not empty and holds no evaluation; choose another")

    def begin(self) -> None:
        """Make the directory an evaluation's, which `check` will know even if nothing is found before it stops."""
        if self.folder is not None and not (self.folder / RESULTS).is_file():
            write_text(self.folder / RESULTS, '{"models": {}}\n')

    def read(self, label: str, name: str, key: dict[str, Any]) -> dict[str, Any] | None:
        """What was found for a model on a task; None if nothing was.

        Raises:
            UserError: if the file there belongs to another evaluation, naming what differs.
        """
        path = self._path(label, name)
        if path is None or not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            before = found["key"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a result of this program; choose another --output") from None
        differing = [entry for entry in key if before.get(entry) != key[entry]]
        if differing:
            raise UserError(
                f"--output {self.folder} holds {label} on {name} with other settings ({', '.join(differing)}); "
                "choose another, or remove it"
            )
        return found

    def write(self, label: str, name: str, found: dict[str, Any]) -> None:
        """Keep what was found, {"key", ...}."""
        path = self._path(label, name)
        if path is not None:
            write_text(path, json.dumps(found))

    def journal(self, label: str, name: str, key: dict[str, Any], processes: Processes) -> Journal | None:
        """Where the scores of a task are noted while it runs."""
        path = self._path(label, name)
        return None if path is None else Journal(path.with_name(f"{path.name}.part"), key, processes)

    def _path(self, label: str, name: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / "items" / _safe(label) / f"{_safe(name)}.json"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, making its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name).strip("_")
