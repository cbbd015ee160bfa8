"""Scores of one task as they come, so that a task that was stopped resumes in the middle.

Every process appends to a file of its own, a line per batch after a first line that names the scores' key. Each line
carries its checksum: one that was cut short or altered counts for nothing, and its scores are computed again.
"""

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

from flash_stu.distributed import World
from flash_stu.errors import UserError, writing
from flash_stu.files import read_records, with_checksum, without_checksum, write_text


class Journal:
    """The files <path>.<rank> of one model and task.

    Args:
        path: without the rank.
        key: all that decides the scores; files with another key are begun anew.
        world: who scores.
    """

    def __init__(self, path: Path, key: dict[str, Any], world: World) -> None:
        self.path, self.world = path, world
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.call = -1
        self._file = None

    def known(self) -> dict[int, list[tuple[float, bool]]]:
        """Returns what is known of the task's next list of requests: by row, (log-likelihood, greedy) of each.

        Raises:
            UserError: for a file in a journal's place that is none.
        """
        self.call += 1
        found = {}
        if self.world.is_main:
            for path in self._files():
                for record in self._scores(path) or []:
                    if record["call"] == self.call:
                        found |= {int(row): scores for row, scores in record["rows"].items()}
        return self.world.gather(found)[0]

    def add(self, rows: dict[int, list[tuple[float, bool]]]) -> None:
        """Note the scores of some rows of the current list of requests."""
        with writing(self.path.parent):
            if self._file is None:
                self._file = self._open()
            self._file.write(_line({"call": self.call, "rows": rows}))
            self._file.flush()

    def close(self) -> None:
        """Remove what was noted: the task is done."""
        if self._file is not None:
            self._file.close()
        self.world.gather(None)
        if self.world.is_main:
            for path in self._files():
                _read(path)  # raises if it is not ours
                path.unlink()

    def _open(self):
        path = self.path.with_name(f"{self.path.name}.{self.world.rank}")
        if path.is_file() and self._scores(path) is not None:
            file = path.open("a", encoding="utf-8")
            file.write("\n")  # ends a line that was cut short
            return file
        write_text(path, _line({"journal": self.key}))
        return path.open("a", encoding="utf-8")

    def _scores(self, path: Path) -> list[dict[str, Any]] | None:
        """The intact records of a file; None if they are of another key."""
        key, records = _read(path)
        return records if key == self.key else None

    def _files(self) -> list[Path]:
        paths = self.path.parent.glob(f"{glob.escape(self.path.name)}.*")
        return sorted(path for path in paths if path.suffix[1:].isdecimal())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(with_checksum(record)) + "\n"


def _read(path: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """Returns a journal's key and its intact records; no key for an empty file.

    Raises:
        UserError: if this is no journal, or its first line is damaged.
    """
    lines, unreadable = read_records(path)
    if not lines and not unreadable:
        return None, []
    header = without_checksum(lines[0]) if lines and 1 not in unreadable else None
    if header is None or "journal" not in header:
        raise UserError(f"{path} is not a journal of this program, or damaged; move it away")
    return header["journal"], [record for record in map(without_checksum, lines[1:]) if record is not None]
