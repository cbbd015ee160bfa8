"""Directories that grow by files: other files may lie beside ours, and of ours one that somebody changed stays."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flash_stu.errors import UserError, writing
from flash_stu.files import (
    FORMAT,
    LOCK,
    MANIFEST,
    changed_message,
    flush,
    flush_all,
    is_ours,
    manifest_of_output,
    read_manifest,
    temporary_beside,
    write_object,
)
from flash_stu.locks import holding
from flash_stu.reading import DamagedError, describe


def check_growing(path: str | Path, kind: str, label: str = "output", names: Iterable[str] = ()) -> None:
    """Refuse a directory, which may be missing or empty, to which files of these names cannot be added.

    Args:
        path: the directory.
        kind: what its manifest must call it.
        label: what a message calls the path.
        names: files that will be added.

    Raises:
        UserError: naming the path and what stands in the way: it is something else, or one of the files to be added
            or added before is not as this program wrote it.
    """
    path = Path(path)
    manifest = manifest_of_output(path, kind, label)
    if manifest is not None:
        check_files(path, {*names, *manifest["files"]}, label)


def check_files(directory: Path, names: Iterable[str], label: str = "output") -> None:
    """Refuse files of a directory with a manifest that are there and not as this program wrote them.

    Raises:
        UserError: naming the directory and the first such file.
        OSError, DamagedError: if it has no intact manifest.
    """
    manifest = read_manifest(directory)
    for name in sorted(names):
        if os.path.lexists(directory / name) and not is_ours(directory, name, manifest):
            raise UserError(changed_message(label, directory, name))


@contextmanager
def growing_directory(path: str | Path, kind: str, label: str = "output", names: Iterable[str] = ()) -> Iterator[None]:
    """Hold a directory to which `adding_files` adds, against other processes; see `check_growing` and `holding`.

    One that was made for nothing is removed again.
    """
    directory, names = Path(path), list(names)
    check_growing(directory, kind, label, names)
    with holding(directory, label):
        check_growing(directory, kind, label, names)
        if not (directory / MANIFEST).exists():
            write_object(directory / MANIFEST, {"format": FORMAT, "kind": kind, "files": {}})
        try:
            yield
        finally:
            with suppress(OSError, DamagedError):
                if not read_manifest(directory)["files"] and {*os.listdir(directory)} <= {MANIFEST, LOCK}:
                    (directory / MANIFEST).unlink()


@contextmanager
def adding_files(path: str | Path, label: str = "output") -> Iterator[Path]:
    """Add files to a directory that is being held, or replace files added before, each whole or not at all.

    Yields:
        an empty temporary directory, to be filled in the block with files as they will be called.

    Raises:
        UserError: if they cannot be written, or one would replace what somebody else wrote or changed.
    """
    directory = Path(path)
    with writing(f"{label} {directory}"), temporary_beside(directory / MANIFEST) as temporary:
        yield temporary
        added = flush_all(temporary)
        manifest = read_manifest(directory)
        check_files(directory, added, label)
        # Until all are renamed both the old and the new content is ours.
        before = {name: describe(directory / name) for name in added if (directory / name).exists()}
        write_object(directory / MANIFEST, {**manifest, "files": manifest["files"] | added, "replaced": before})
        for name in added:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, directory / name)
            flush((directory / name).parent)
