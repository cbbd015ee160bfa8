"""Locks between processes that end with the process that has them, however it dies."""

import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, overload

from flash_stu.errors import UserError, writing
from flash_stu.files import LOCK, directories_above

_TEXT_BYTES = 400
_LOCK_TEXT = re.compile(rb"process \d+ on host .*\n|\0*", re.DOTALL)  # empty or zeros: after a kill or power failure
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # from file systems that have none


@overload
def lock(path: Path, wait: Literal[True]) -> int: ...
@overload
def lock(path: Path, wait: Literal[False] = False) -> int | None: ...
def lock(path: Path, wait: bool = False) -> int | None:
    """Lock a file, which is made if needed; whoever holds the lock may delete it.

    Returns:
        a descriptor for `unlock`; the lock ends with this process, and its forks, at the latest. None if another
        process has the lock and is not to be waited for.

    Raises:
        OSError: if the file cannot be opened.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        os.close(descriptor)  # its last holder has deleted it


def unlock(descriptor: int) -> None:
    """Release what `lock` returned."""
    with suppress(OSError):  # closing alone leaves it to processes that were forked meanwhile
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def holding(directory: Path, label: str) -> Iterator[None]:
    """Hold a directory against other processes; a file system without locks (ENOSYS, ENOLCK) holds nobody off.

    Args:
        directory: made if needed, and removed again if the block fails and leaves nothing in it. Its .lock, there as
            long as it is held, names who has it.
        label: what a message calls the directory.

    Raises:
        UserError: if another process holds it, naming its host and process, or the lock cannot be made.
    """
    path = Path(directory) / LOCK
    with ExitStack() as stack:
        with writing(f"{label} {directory}"):
            stack.enter_context(directories_above(path))
            descriptor = lock(path)
            if descriptor is None:
                raise UserError(f"{label} {directory} is in use by {_holder(path)}")
            stack.callback(unlock, descriptor)
            if not _LOCK_TEXT.fullmatch(os.pread(descriptor, _TEXT_BYTES, 0)):
                raise UserError(f"{label} {directory} holds {LOCK}, which this program did not write; move it away")
            stack.callback(_delete_file, path)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
        yield


def _delete_file(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _holder(path: Path) -> str:
    """Returns whom a lock file names."""
    with suppress(OSError):
        return " ".join(path.read_text(encoding="utf-8", errors="replace").split()) or "another process"
    return "another process"
