"""Scores of one task as they come, so that a task that was stopped goes on in its midst.

Every process appends to a file of its own, a line per batch after a first line that says what the scores are of. A
line that was cut short when the process died counts for nothing.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from flash_stu.evaluation.processes import Processes


class Journal:
    """The files <path>.<rank> of one model and task.

    Args:
        path: without the rank.
        key: all that decides the scores; files with another key are begun anew.
        processes: who scores.
    """

    def __init__(self, path: Path, key: dict[str, Any], processes: Processes) -> None:
        self.path, self.processes = path, processes
        self.header = {"key": hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}
        self.call = -1
        self._file = None

    def known(self) -> dict[int, list[tuple[float, bool]]]:
        """What was found earlier for the task's next list of requests: by row, (log-likelihood, greedy) of each."""
        self.call += 1
        found = {}
        if self.processes.is_main:
            for path in self._files():
                header, *lines = _records(path) or [None]
                if header == self.header:
                    for line in lines:
                        if line["call"] == self.call:
                            found |= {int(row): scores for row, scores in line["rows"].items()}
        return self.processes.gather(found)[0]

    def add(self, rows: dict[int, list[tuple[float, bool]]]) -> None:
        """Note the scores of some rows of the current list of requests."""
        if self._file is None:
            self._file = self._open()
        self._file.write(json.dumps({"call": self.call, "rows": rows}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """The task is done: remove what was noted."""
        if self._file is not None:
            self._file.close()
        self.processes.gather(None)
        if self.processes.is_main:
            for path in self._files():
                path.unlink()

    def _open(self):
        path = self.path.with_name(f"{self.path.name}.{self.processes.rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and (_records(path) or [None])[0] == self.header:
            file = path.open("a", encoding="utf-8")
            file.write("\n")  # ends a line that was cut short
        else:
            file = path.open("w", encoding="utf-8")
            file.write(json.dumps(self.header) + "\n")
        return file

    def _files(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.*"))


def _records(path: Path) -> list[Any]:
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
