"""An evaluation's findings so far, on disk, so that one that was stopped resumes: of whole tasks, and inside one.

    items/<model>/<task>.json               {"key", "model", "result", "items"}
    items/<model>/<task>.json.part.<rank>   while the task runs: the scores so far

The key says what the result is of. A file with another key belongs to another evaluation, and is neither used nor
replaced; neither is one that somebody else wrote or changed.

The harness has a cache of answers too (`lm_eval.api.model.CachingLM`, filled through an LM's `CacheHook`). It is not
used: each process opens an SQLite file of its own and reads no other, so another number of processes, or one that
divides the requests otherwise, starts again; its key is the text of the request alone, not the model, its dtype or the
versions; and a file that was cut short or altered is not noticed, or fails as a whole.
"""

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from flash_stu.distributed import World
from flash_stu.errors import UserError, writing
from flash_stu.files import write_text
from flash_stu.growing import adding_files, check_files, check_growing, growing_directory
from flash_stu.reading import read_records, with_checksum, without_checksum

_KIND, _LABEL = "directory of evaluation results", "output"


class Store:
    """The findings in an output directory; without one nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def check(self, names: Iterable[str] = ()) -> None:
        """Refuse a directory that was not created by an evaluation, given the files that will be written.

        Raises:
            UserError: if it is a file, holds things but no evaluation, or a file of the evaluation was changed.
        """
        if self.folder is not None:
            check_growing(self.folder, _KIND, _LABEL, names)

    def holding(self, names: Iterable[str] = ()) -> AbstractContextManager[None]:
        """Make the directory and hold it against other processes; see `growing_directory`."""
        return nullcontext() if self.folder is None else growing_directory(self.folder, _KIND, _LABEL, names)

    def add(self, write: Callable[[Path], object]) -> None:
        """Add the files that a function writes into a directory it is given; see `adding_files`."""
        if self.folder is not None:
            with adding_files(self.folder, _LABEL) as temporary:
                write(temporary)

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

        def write(folder: Path) -> None:
            path = folder / item_file(label, name)
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(found), encoding="utf-8")

        self.add(write)

    def journal(self, label: str, name: str, key: dict[str, Any], world: World) -> "Journal | None":
        """Returns where the scores of a task are noted while it runs; None if nothing is kept."""
        return None if self.folder is None else Journal(self.folder / f"{item_file(label, name)}.part", key, world)


class Journal:
    """Scores of one task as they are computed, so that a task that was stopped resumes in the middle.

    Every process appends to a file of its own, <path>.<rank>, a line per batch after a first line that names the
    scores' key, all that decides them; a file with another key is begun anew. Each line carries its checksum: the
    scores of one that was cut short or altered are computed again.
    """

    def __init__(self, path: Path, key: dict[str, Any], world: World) -> None:
        self.path, self.world = path, world
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.call = -1
        self._file: TextIO | None = None

    def known(self) -> dict[int, list[tuple[float, bool]]]:
        """Returns what is known of the task's next list of requests: by row, (log-likelihood, greedy) of each.

        Raises:
            UserError: for a file in a journal's place that is none.
        """
        self.call += 1
        found = {}
        for record in (each for path in self._files() for each in self._scores(path) or []):
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
        self.world.barrier()
        for path in self._files():
            _read(path)  # raises if it is not ours
            path.unlink()

    def _open(self) -> TextIO:
        path = self.path.with_name(f"{self.path.name}.{self.world.rank}")
        if path.is_file() and self._scores(path) is not None:
            file = path.open("a", encoding="utf-8")
            file.write("\n")  # ends a line that was cut short
            return file
        write_text(path, _line({"journal": self.key}))
        return path.open("a", encoding="utf-8")

    def _scores(self, path: Path) -> list[dict[str, Any]] | None:
        """Returns the intact records of a file; None if they are of another key."""
        key, records = _read(path)
        return records if key == self.key else None

    def _files(self) -> list[Path]:
        """Returns the files of all processes on the main one, none on the others."""
        paths = self.path.parent.glob(f"{glob.escape(self.path.name)}.*")
        return sorted(path for path in paths if self.world.is_main and path.suffix[1:].isdecimal())


def item_file(label: str, name: str) -> str:
    """Returns the name of the file that keeps what was found for a model on a task."""
    return f"items/{_safe(label)}/{_safe(name)}.json"


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name).strip("_")


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
