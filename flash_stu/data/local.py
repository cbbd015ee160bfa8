"""The files of a local dataset: which exist, which split each belongs to, and which are left out."""

import errno
import fnmatch
import glob
import os
import re
import stat
from collections import defaultdict
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from flash_stu.data.formats import ALLOWED, file_ending, file_format
from flash_stu.errors import UserError

_SPLIT_NAME = re.compile(r"(train|validation|valid|val|test)(?![a-z])")
_HIDDEN, _BROKEN, _TWICE, _EMPTY = "hidden", "broken links", "reached twice", "empty"


@dataclass(frozen=True)
class DataFiles:
    """The files of each split as sorted (name within the dataset, path) pairs; validation may be empty."""

    train: list[tuple[str, Path]]
    validation: list[tuple[str, Path]]
    left_out: dict[str, list[str]]  # by reason, the names of the files and folders that were found and are not read

    def summary(self) -> str:
        """Returns one line: the number of files read, and of those left out for each reason, with the first name."""
        read = len(self.train) + len(self.validation)
        line = f"{read:,} file{'s' * (read != 1)} read"
        reasons = sorted(self.left_out.items(), key=lambda reason: (-len(reason[1]), reason[0]))
        kinds = [f"{len(names):,} {reason} ({min(names)})" for reason, names in reasons if names]
        if kinds:
            line += f", {sum(map(len, self.left_out.values())):,} left out: {', '.join(kinds)}"
        return line.encode(errors="backslashreplace").decode()  # file names need not be text


def looks_local(dataset: str) -> bool:
    """Returns whether a dataset name can only be a path: it exists, is a glob, or is written like one."""
    written_like_path = dataset.startswith(("/", "./", "../", "~")) or file_format(dataset) is not None
    return written_like_path or glob.has_magic(dataset) or os.path.lexists(dataset)


def find_files(dataset: str) -> DataFiles:
    """Find the files of a local dataset and the split of each.

    A directory is searched through, and so is one that a glob matches. Symbolic links are followed; a file that is
    reached more than once is read once, under a name without links if it has one. Left out are hidden files
    and folders, files of unknown ending, empty files and links to nothing.

    A file belongs to a split when its name, or the name of a directory inside the dataset that holds it,
    starts with train, validation (valid, val) or test. Files without such a name are training files, unless
    others are named train; test files are left out, unless there is nothing else.

    Args:
        dataset: file, directory or glob ("**" crosses directories).

    Raises:
        UserError: if there is no such file, none in a known format, more than one format, or a directory cannot be
            read.
    """
    left_out = defaultdict(list)
    try:
        root, found = _candidates(dataset, left_out)
        files = _readable(found, left_out)
    except OSError as error:
        raise UserError(f"data.dataset {dataset!r} cannot be read: {error.filename}: {error.strerror}") from error
    kinds = sorted({str(file_format(path)) for _, path in files})
    if not files:
        exists = any(left_out.values()) or Path(dataset).is_dir()
        nothing = "no file in a known format" if exists else "no such file or directory"
        found = f" ({DataFiles([], [], left_out).summary()})" if any(left_out.values()) else ""
        raise UserError(f"data.dataset {dataset!r}: {nothing}{found}; allowed: {ALLOWED}")
    if len(kinds) > 1:
        example = next(path for _, path in files if file_format(path) == kinds[0])
        choice = f"{root}/**/*{''.join(file_ending(example))}"
        raise UserError(f"data.dataset {dataset!r} mixes {' and '.join(kinds)} files; choose with a glob: {choice!r}")

    splits: dict[str, list[tuple[str, Path]]] = {"train": [], "validation": [], "test": [], "": []}
    for name, path in sorted(files):
        splits[_split_name(name)].append((name, path))
    train, validation = splits["train"] or splits[""], splits["validation"]
    if not train:  # a single split was asked for: it is the dataset
        train, validation = validation or splits["test"], []
    for reason, split in (("named test", "test"), ("not named train as others are", "")):
        if splits[split] != train:
            left_out[reason] += [name for name, _ in splits[split]]
    return DataFiles(train, validation, left_out)


def _candidates(dataset: str, left_out: dict[str, list[str]]) -> tuple[Path, list[tuple[str, Path]]]:
    """Returns the (name, path) of the files a dataset names, and the directory that the names are relative to."""
    path = Path(dataset)
    if path.is_dir():
        files, hidden = _walk(path)
        left_out[_HIDDEN] += hidden
        return path, files
    if path.exists():
        return path.parent, [(path.name, path)]
    if not glob.has_magic(dataset):
        return path, []
    root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts[:-1]))
    head = list(takewhile(lambda part: part != "**", path.parts))
    rest = path.parts[len(head) :]
    found = []
    matches = map(Path, glob.glob(str(Path(*head)), include_hidden=True))
    for match in sorted(matches, key=lambda match: (match.is_symlink(), match)):
        name = match.relative_to(root).as_posix()
        if any(p.startswith(".") and not q.startswith(".") for p, q in zip(match.parts, head, strict=True)):
            left_out[_HIDDEN].append(name)
        elif match.is_dir():
            files, hidden = _walk(match)
            left_out[_HIDDEN] += [Path(name, below).as_posix() for below in hidden]
            files = [(below, file) for below, file in files if _matches(Path(below).parts, rest)]
            found += [(Path(name, below).as_posix(), file) for below, file in files]
        elif not rest:
            found.append((name, match))
    return root, found


def _matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Returns whether the parts of a path, or of a folder that it is in, match those of a glob."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(names[skipped:], pattern[1:]) for skipped in range(len(names)))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _walk(root: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """List the (name, path) of the files below a directory and the names of what is hidden in it.

    Links to directories are followed after everything else, and no directory is listed twice.
    """
    found, hidden = [], []
    pending, seen = [root], set()
    while pending:
        start = pending.pop(0)
        if not _first_time(start, seen):
            continue
        for folder, folders, files in os.walk(start, onerror=_raise):
            inside = Path(folder)
            hidden += [(inside / name).relative_to(root).as_posix() for name in folders + files if name[0] == "."]
            entered = [inside / name for name in sorted(folders) if name[0] != "."]
            pending += [path for path in entered if path.is_symlink()]
            folders[:] = [path.name for path in entered if not path.is_symlink() and _first_time(path, seen)]
            paths = [inside / name for name in sorted(files) if name[0] != "."]
            found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return found, hidden


def _readable(found: list[tuple[str, Path]], left_out: dict[str, list[str]]) -> list[tuple[str, Path]]:
    """Returns those of the files that hold documents, each once."""
    kept, seen = [], set()
    for name, path in sorted(found, key=lambda file: file[1].is_symlink()):
        try:
            status = path.stat()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            left_out[_BROKEN].append(name)
            continue
        if not stat.S_ISREG(status.st_mode):
            left_out["not regular files"].append(name)
        elif file_format(path) is None:
            left_out["of unknown ending"].append(name)
        elif _identity(status) in seen:
            left_out[_TWICE].append(name)
        elif not status.st_size:
            left_out[_EMPTY].append(name)
        else:
            seen.add(_identity(status))
            kept.append((name, path))
    return kept


def _first_time(path: Path, seen: set[tuple[int, int]]) -> bool:
    before = len(seen)
    seen.add(_identity(path.stat()))
    return len(seen) > before


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> None:
    raise error


def _split_name(name: str) -> str:
    matches = [match for part in name.lower().split("/") if (match := _SPLIT_NAME.match(part))]
    found = matches[0][1] if matches else ""
    return "validation" if found.startswith("val") else found
