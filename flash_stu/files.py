"""Files and directories on disk: written whole or not at all, verified when read, deleted only if written by us.

A file or directory is written under a hidden temporary name beside its place, flushed to disk, and renamed. Every
directory written here holds a manifest, .flash_stu.json: what kind of directory it is and the size and checksum of
each of its files. The manifest decides two things: whether the directory is intact, and whether it holds anything that
this program did not write, in which case it is never replaced or deleted.

A directory is written at once (`replacing_directory`); flash_stu.growing has those that grow by files, and
flash_stu.locks holds them against other processes.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flash_stu.errors import UserError, reason, writing
from flash_stu.reading import DamagedError, describe, read_object, with_checksum

MANIFEST = ".flash_stu.json"
LOCK = ".lock"
FORMAT = 1
_NAME_BYTES = 200  # of the readable part of a temporary name; file systems refuse names of more than 255
_HIDDEN = re.compile(r"\.(.*)\.flash_stu-[0-9a-f]{8}\.(tmp|old|deleted)", re.DOTALL)
_NO_FLUSH = {errno.EINVAL, errno.ENOTSUP}  # from file systems that cannot flush a directory


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all; a file that is there stays until then. Directories on the way are made.

    Yields:
        a temporary path with the same name, to be written in the block.

    Raises:
        UserError: if it cannot be written; nothing is left behind.
    """
    path = Path(path)
    with writing(path):
        place = _place(path)  # a symbolic link stays one
        if place.exists() and not place.is_file():  # renaming would replace a device
            raise OSError(errno.EINVAL, "it exists and is not a regular file")
        with temporary_beside(place) as directory:
            temporary = directory / place.name
            yield temporary
            flush(temporary)
            os.replace(temporary, place)
            flush(place.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all, in UTF-8; see `replacing_file`."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_object(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON object with its checksum; see `read_object`."""
    write_text(path, json.dumps(with_checksum(content), indent=1) + "\n")


@contextmanager
def replacing_directory(path: str | Path, kind: str, label: str = "output") -> Iterator[Path]:
    """Write a directory whole or not at all.

    It is sealed at the end, unless the block did so with descriptions of the files that it has at hand.

    Args:
        path: its place. An earlier directory of the same kind stays until the new one is complete.
        kind: what the manifest calls it.
        label: what a message calls the path.

    Yields:
        an empty temporary directory, to be filled in the block.

    Raises:
        UserError: if it cannot be written, or `check_output` refuses the path; nothing is left behind.
    """
    path = Path(path)
    check_output(path, kind, label)
    with writing(f"{label} {path}"):
        place = _place(path)
        with temporary_beside(place) as temporary:
            yield temporary
            if not (temporary / MANIFEST).exists():
                seal(temporary, kind)
            check_output(path, kind, label)
            _replace_directory(temporary, place)


def _replace_directory(temporary: Path, place: Path) -> None:
    """Give a complete directory its final name; what has that name is moved aside first and then deleted."""
    aside = _hidden_name(place, ".old")
    exists = place.exists() and any(place.iterdir())  # an empty one is replaced by the renaming
    if exists:
        os.rename(place, aside)
    try:
        os.rename(temporary, place)
    except BaseException:
        if exists:
            os.rename(aside, place)
        raise
    flush(place.parent)
    if exists:
        _delete(aside)


def check_output(path: str | Path, kind: str, label: str = "output") -> None:
    """Refuse to replace anything but a directory of the same kind that this program wrote and nobody changed.

    Raises:
        UserError: naming the path and what stands in the way.
    """
    path = Path(path)
    if manifest_of_output(path, kind, label) and (foreign := foreign_files(path)):
        raise UserError(changed_message(label, path, foreign[0]))


def delete_directory(path: Path, kind: str, contents: bool = True) -> bool:
    """Delete a directory of a kind that this program wrote, with everything in it; one with other files in it stays.

    Args:
        path: the directory.
        kind: what its manifest must call it.
        contents: compare checksums, not only sizes: they may be of many gigabytes.

    Returns:
        whether it was deleted.
    """
    ours = False
    with suppress(OSError, DamagedError):
        ours = not path.is_symlink() and read_manifest(path)["kind"] == kind and not foreign_files(path, contents)
    if ours:
        aside = _hidden_name(path, ".deleted")  # a half deleted directory must not look complete
        os.rename(path, aside)
        _delete(aside)
    return ours


def foreign_files(directory: Path, contents: bool = True) -> list[str]:
    """Returns the files of a directory that are not as its manifest says, in checksum or only in size; sorted.

    Raises:
        OSError, DamagedError: if it has no intact manifest, or cannot be read in full.
    """

    manifest = read_manifest(directory)
    names = _names_in(directory)
    return [name for name in names if name != MANIFEST and not is_ours(directory, name, manifest, contents)]


def is_empty(directory: Path) -> bool:
    """Returns whether a directory is missing, or holds only locks and temporary files of this program."""
    return not directory.exists() or all(name == LOCK or _HIDDEN.fullmatch(name) for name in os.listdir(directory))


def set_aside(path: Path) -> Path:
    """Rename something damaged, so that a person can look at it; returns its new path, see `damaged_name`."""
    aside = damaged_name(path)
    os.rename(path, aside)
    return aside


def damaged_name(path: Path) -> Path:
    """Returns the first free one of PATH.damaged, PATH.damaged-2, ..."""
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    return aside


def seal(directory: Path, kind: str, files: dict[str, dict[str, int]] | None = None) -> None:
    """Write the manifest of a directory, its last file, when everything in it is on disk.

    Args:
        directory: where the files are.
        kind: what it is.
        files: `describe` of each file by its name, where the writers made them; they are flushed already. None: all
            files there are flushed and described.

    Raises:
        OSError: if that is not possible, or a file named is not there as it was written.
    """
    if files is None:
        files = flush_all(directory)
    for name, entry in files.items():
        if (directory / name).stat().st_size != entry["bytes"]:
            raise OSError(errno.EIO, f"{name} is not as it was written")
    content = {"format": FORMAT, "kind": kind, "files": files}
    (directory / MANIFEST).write_text(json.dumps(with_checksum(content), indent=1) + "\n")
    flush(directory / MANIFEST)
    flush(directory)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns {"format", "kind", "files": {name: {"bytes", "crc32"}}} of a directory.

    Raises:
        OSError: if it has no manifest, or it cannot be read.
        DamagedError: if the manifest is not what was written.
    """
    content = read_object(directory / MANIFEST)
    if content.get("format") != FORMAT or not isinstance(content.get("files"), dict) or "kind" not in content:
        raise DamagedError(f"{directory / MANIFEST} is damaged")
    return content


def verify(directory: Path, names: Iterable[str] | None = None) -> None:
    """Compare the files of a directory with its manifest: all, or those of some names.

    Raises:
        OSError: if there is no manifest.
        DamagedError: if a file is missing, cannot be read, or differs.
    """
    files = read_manifest(directory)["files"]
    for name in files if names is None else names:
        try:
            found = describe(directory / name)
        except OSError as error:
            raise DamagedError(f"{name} cannot be read: {reason(error)}") from error
        if found["bytes"] != files[name]["bytes"]:
            raise DamagedError(f"{name} has {found['bytes']} bytes instead of {files[name]['bytes']}")
        if found != files[name]:
            raise DamagedError(f"{name} was altered: its checksum differs")


def flush(path: Path) -> None:
    """Put a file, or a directory's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


def sweep(path: Path) -> None:
    """Remove what writers of a file or directory that were killed have left, and put back what one had moved aside."""
    prefix = _hidden_prefix(path)
    for hidden in [hidden for hidden in path.parent.iterdir() if hidden.name.startswith(prefix)]:
        _sweep(hidden, path)


def sweep_directory(directory: Path) -> None:
    """`sweep` everything in a directory."""
    for hidden in list(directory.iterdir()) if directory.is_dir() else []:
        if match := _HIDDEN.fullmatch(hidden.name):
            _sweep(hidden, directory / match[1])


def _sweep(hidden: Path, path: Path) -> None:
    if hidden.suffix == ".tmp":
        with suppress(OSError):
            descriptor = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(hidden, ignore_errors=True)
            finally:
                os.close(descriptor)
    elif hidden.suffix in (".old", ".deleted"):
        _remove_empty([hidden])  # all but deleted
        if hidden.suffix == ".old" and not path.exists() and (hidden / MANIFEST).is_file():
            os.rename(hidden, path)
        else:
            _delete(hidden)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A hidden directory beside a path, locked while it is in use, removed at the end."""
    with directories_above(path):
        sweep(path)
        temporary, descriptor = _locked_directory(path)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(descriptor)


def _locked_directory(path: Path) -> tuple[Path, int]:
    while True:
        temporary = _hidden_name(path, ".tmp")
        temporary.mkdir()
        with suppress(FileNotFoundError):
            descriptor = os.open(temporary, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: nobody can sweep there either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if temporary.exists():  # else another writer's sweep came between
                return temporary, descriptor
            os.close(descriptor)


@contextmanager
def directories_above(path: Path) -> Iterator[None]:
    """Make the directories above a path; those that were missing go again if the block fails and leaves them empty."""
    made = [parent for parent in path.parents if not parent.exists()]
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        _remove_empty(made)
        raise


def _remove_empty(directories: Iterable[Path]) -> None:
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def _place(path: Path) -> Path:
    """Returns where a path leads, symbolic links followed."""
    try:
        return path.resolve()
    except RuntimeError:  # Python's word for it
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None


def manifest_of_output(path: Path, kind: str, label: str) -> dict[str, Any] | None:
    """The manifest of a directory that is to be written to; None if nothing is there yet."""
    with writing(f"{label} {path}"):
        place = _place(path)
        above = next((parent for parent in place.parents if parent.exists()), place)
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            number = errno.EACCES if above.is_dir() else errno.ENOTDIR
            raise OSError(number, os.strerror(number))
        if not place.exists():
            return None
        if not place.is_dir():
            raise UserError(f"{label} {path} exists and is not a directory; choose another")
        if all(_is_of_writers(name) for name in os.listdir(place)):
            return None
    try:
        found = read_manifest(path)
    except (OSError, DamagedError):
        raise UserError(f"{label} {path} exists and was not written by this program; choose another") from None
    if found["kind"] != kind:
        raise UserError(f"{label} {path} holds a {found['kind']}, not a {kind}; choose another, or remove it")
    return found


def _is_of_writers(name: str) -> bool:
    """Whether a name in a directory is of a lock, or of a manifest that was being written."""
    return name == LOCK or name.startswith(_hidden_prefix(Path(MANIFEST)))


def changed_message(label: str, directory: Path, name: str) -> str:
    what = "which this program did not write or somebody changed; move it away, or choose another"
    return f"{label} {directory} holds {name}, {what}"


def is_ours(directory: Path, name: str, manifest: dict[str, Any], contents: bool = True) -> bool:
    """Whether a file is what a manifest says of it, byte for byte or in size."""
    path = directory / name
    known = [manifest[key][name] for key in ("files", "replaced") if name in manifest.get(key, {})]
    if not known or path.is_symlink() or not path.is_file():
        return False
    return describe(path) in known if contents else path.stat().st_size in [entry["bytes"] for entry in known]


def flush_all(directory: Path) -> dict[str, dict[str, int]]:
    """Flush all files of a directory; returns `describe` of each by its name."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    for path in paths:
        flush(path)
    return {path.relative_to(directory).as_posix(): describe(path) for path in paths}


def _delete(directory: Path) -> None:
    """Delete the files of a directory that its manifest names, the manifest last, and the directory if that is all."""
    with suppress(OSError, DamagedError):
        files = read_manifest(directory)["files"]
        for folder, _, names in os.walk(directory, topdown=False):
            for path in (Path(folder, name) for name in names):
                if path.relative_to(directory).as_posix() in files:
                    path.unlink()
            if Path(folder) != directory:
                _remove_empty([Path(folder)])
        if os.listdir(directory) == [MANIFEST]:
            (directory / MANIFEST).unlink()
            directory.rmdir()


def _names_in(directory: Path) -> list[str]:
    """Returns the sorted names of all files and links in a directory and those below it."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for folder, directories, names in os.walk(directory, onerror=fail):
        links = [name for name in directories if os.path.islink(os.path.join(folder, name))]
        found += [Path(folder, name).relative_to(directory).as_posix() for name in names + links]
    return sorted(found)


def _hidden_name(path: Path, suffix: str) -> Path:
    return path.parent / f"{_hidden_prefix(path)}{secrets.token_hex(4)}{suffix}"


def _hidden_prefix(path: Path) -> str:
    name = os.fsencode(path.name)
    if len(name) > _NAME_BYTES:
        name = name[:_NAME_BYTES] + f"-{zlib.crc32(name):08x}".encode()
    return f".{os.fsdecode(name)}.flash_stu-"
