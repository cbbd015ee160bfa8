"""Files and directories on disk: written whole or not at all, verified when read, deleted only if written by us.

A file or directory is written under a hidden temporary name beside its place, flushed to disk, and renamed. Every
directory written here ends with a manifest, .flash_stu.json: what kind of directory it is and the size and checksum of
each of its files. The manifest decides two things: whether the directory is intact, and whether it holds anything that
this program did not write, in which case it is never replaced or deleted.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from flash_stu.errors import UserError
from flash_stu.utf8 import decode

MANIFEST = ".flash_stu.json"
_FORMAT = 1
_READ_BYTES = 1 << 24
LARGEST_TEXT = 1 << 24  # bytes of a file of settings
_NAME_BYTES = 200  # of the readable part of a temporary name; file systems refuse names of more than 255


class DamagedError(ValueError):
    """Something on disk is not what was written there; the message is one line that names the file."""


def reason(error: BaseException) -> str:
    """Returns the cause of a failed read or write in one line, without the path that it usually repeats."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).split("\n")
    return " ".join(lines[0].split()) or type(error).__name__


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a failure to write into one line that names the target.

    Raises:
        UserError: for an OSError or an error of safetensors in the block.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from error


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all; directories on the way are made.

    Args:
        path: its place. A file that is there stays until the new one is complete.

    Yields:
        a temporary path with the same name, to be written in the block.

    Raises:
        UserError: if it cannot be written; nothing is left behind.
    """
    path = Path(path)
    with writing(path):
        place = path.resolve()  # a symbolic link stays one
        place.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(place) as directory:
            temporary = directory / place.name
            yield temporary
            flush(temporary)
            os.replace(temporary, place)
            flush(place.parent)


def read_text(path: str | Path, label: str = "", largest: int = LARGEST_TEXT) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        path: a regular file: a pipe or device could be endless.
        label: what a message calls it; the path follows.
        largest: bytes it may have.

    Raises:
        UserError: if there is no such file, or it cannot be read, is too large or is not UTF-8.
    """
    named = f"{label} {path}".strip()
    try:
        if not os.path.exists(path):
            raise UserError(f"{named}: no such file")
        if not os.path.isfile(path):
            raise UserError(f"{named}: not a regular file")
        if os.path.getsize(path) > largest:
            raise UserError(f"{named}: larger than {largest:,} bytes")
        return decode(Path(path).read_bytes(), named)
    except OSError as error:
        raise UserError(f"{named}: {reason(error)}") from None


def read_json(path: str | Path, label: str = "", largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """Read a file with one JSON object; see `read_text`.

    Raises:
        UserError: as `read_text`, or if it holds anything else.
    """
    named = f"{label} {path}".strip()
    try:
        content = json.loads(read_text(path, label, largest))
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{named}: not valid JSON: nested too deep") from None
    except ValueError as error:
        raise UserError(f"{named}: not valid JSON: {reason(error).partition(';')[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{named}: not a JSON object but {type(content).__name__}")
    return content


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all, in UTF-8; see `replacing_file`."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing_directory(path: str | Path, kind: str, label: str = "output") -> Iterator[Path]:
    """Write a directory whole or not at all.

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
    with writing(path):
        place = path.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(place) as temporary:
            yield temporary
            seal(temporary, kind)
            check_output(path, kind, label)
            replace_directory(temporary, place)


def replace_directory(temporary: Path, place: Path) -> None:
    """Give a complete directory its final name; what has that name is moved aside first and then deleted.

    Raises:
        OSError: if that is not possible; the old directory is then back in its place.
    """
    aside = _hidden_name(place, ".old")
    exists = place.exists()
    if exists:
        os.rename(place, aside)
    try:
        os.rename(temporary, place)
    except OSError:
        if exists:
            os.rename(aside, place)
        raise
    flush(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def check_output(path: str | Path, kind: str, label: str = "output") -> None:
    """Refuse to replace anything but a directory of the same kind that this program wrote and nobody changed.

    Raises:
        UserError: naming the path and what stands in the way.
    """
    path = Path(path)
    with writing(path):
        if not path.exists():
            return
        if not path.is_dir():
            raise UserError(f"{label} {path} exists and is not a directory; choose another")
        if not any(path.iterdir()):
            return
    try:
        found = read_manifest(path)
    except (OSError, DamagedError):
        raise UserError(f"{label} {path} exists and was not written by this program; choose another") from None
    if found["kind"] != kind:
        raise UserError(f"{label} {path} holds a {found['kind']}, not a {kind}; choose another, or remove it")
    if foreign := foreign_files(path):
        raise UserError(
            f"{label} {path} holds {foreign[0]}, which this program did not write or somebody changed; "
            "move it away, or choose another"
        )


def delete_directory(path: Path) -> bool:
    """Delete a directory that this program wrote, with everything in it; one with other files in it stays.

    Returns:
        whether it was deleted.
    """
    try:
        if foreign_files(path):
            return False
    except (OSError, DamagedError):
        return False
    aside = _hidden_name(path, ".old")  # a half deleted directory must not look complete
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)
    return True


def foreign_files(directory: Path) -> list[str]:
    """Returns the files of a directory that are not, byte for byte, those its manifest names; sorted.

    Raises:
        OSError, DamagedError: if it has no intact manifest.
    """
    files = read_manifest(directory)["files"]
    foreign = []
    for path in directory.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(directory).as_posix()
        if name != MANIFEST and (name not in files or path.is_symlink() or describe(path) != files[name]):
            foreign.append(name)
    return sorted(foreign)


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
        paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        for path in paths:
            flush(path)
        files = {path.relative_to(directory).as_posix(): describe(path) for path in paths}
    for name, entry in files.items():
        if (directory / name).stat().st_size != entry["bytes"]:
            raise OSError(errno.EIO, f"{name} is not as it was written")
    content = {"format": _FORMAT, "kind": kind, "files": files}
    (directory / MANIFEST).write_text(json.dumps({**content, "crc32": _digest(content)}, indent=1) + "\n")
    flush(directory / MANIFEST)
    flush(directory)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns {"format", "kind", "files": {name: {"bytes", "crc32"}}} of a directory.

    Raises:
        OSError: if it has no manifest.
        DamagedError: if the manifest is not what was written.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        expected = content.pop("crc32")
        intact = expected == _digest(content) and content["format"] == _FORMAT
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise DamagedError(f"{path} is damaged")
    return content


def verify(directory: Path, names: Iterable[str] | None = None) -> None:
    """Compare the files of a directory with its manifest.

    Args:
        directory: where the manifest is.
        names: which of its files; None for all.

    Raises:
        OSError: if a file is missing or cannot be read.
        DamagedError: if one differs.
    """
    files = read_manifest(directory)["files"]
    for name in files if names is None else names:
        found = describe(directory / name)
        if found["bytes"] != files[name]["bytes"]:
            raise DamagedError(f"{name} has {found['bytes']} bytes instead of {files[name]['bytes']}")
        if found != files[name]:
            raise DamagedError(f"{name} was altered: its checksum differs")


def describe(path: Path) -> dict[str, int]:
    """Returns a file's size and checksum, {"bytes", "crc32"}."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            value = zlib.crc32(block, value)
        return {"bytes": file.tell(), "crc32": value}


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a file with one JSON object per line, whatever has happened to it.

    Returns:
        the objects, and the numbers (from 1 on) of the lines that are none; both empty if there is no file.
    """
    records, unreadable = [], []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            unreadable.append(number)
    return records, unreadable


@contextmanager
def holding(directory: Path, label: str) -> Iterator[None]:
    """Hold a directory against other processes; the operating system lets go when this one dies, however it does.

    Args:
        directory: made if needed. Its .lock is the lock and .lock.holder names who has it.
        label: what a message calls the directory.

    Raises:
        UserError: if another process holds it, naming its host and process, or the lock cannot be made.
    """
    holder = directory / ".lock.holder"
    with writing(f"{label} {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with suppress(OSError):
                raise UserError(f"{label} {directory} is in use by {holder.read_text().strip()}") from None
            raise UserError(f"{label} {directory} is in use by another process") from None
    try:
        write_text(holder, f"process {os.getpid()} on host {socket.gethostname()}\n")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def flush(path: Path) -> None:
    """Put a file, or a directory's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A hidden directory beside a path, locked while it is in use, removed at the end."""
    _sweep(path)
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


def _sweep(path: Path) -> None:
    """Remove what writers that were killed have left beside a path, and put back what one had moved aside."""
    prefix = _hidden_prefix(path)
    for other in [other for other in path.parent.iterdir() if other.name.startswith(prefix)]:
        if other.suffix == ".tmp":
            with suppress(OSError):
                descriptor = os.open(other, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(other, ignore_errors=True)
                finally:
                    os.close(descriptor)
        elif other.suffix == ".old" and (other / MANIFEST).is_file():
            if path.exists():
                shutil.rmtree(other, ignore_errors=True)
            else:
                os.rename(other, path)


def _hidden_name(path: Path, suffix: str) -> Path:
    return path.with_name(f"{_hidden_prefix(path)}{secrets.token_hex(4)}{suffix}")


def _hidden_prefix(path: Path) -> str:
    return f".{os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])}.flash_stu-"


def _digest(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
